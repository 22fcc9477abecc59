"""What the commands share: their style, devices, data and JSON."""

import argparse
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flextok.schema import NotFinite, check_number

# the models that come with the package: a tokenizer, and generators by class and by prompt
TOKENIZER, BY_CLASS, BY_PROMPT = "emoji", "emoji-class", "emoji-text"
# options of several commands, with the least and the most that makes sense
COUNTS = [("seed", 0, 2**63 - 1), ("num_workers", 0, 1000), ("batch_size", 1, 1_000_000)]
COUNTS += [("limit", 1, 2**63 - 1), ("probe_steps", 1, 1_000_000)]


class AnyOrder(argparse.ArgumentParser):
    """Takes options before, after and between the other arguments: `plan CONFIG --gpus 8 key=value`
    too, where argparse by itself takes a list of arguments in one piece only."""

    mixing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.mixing:  # argparse calls this for each of its two passes
            return super().parse_known_args(args, namespace)
        self.mixing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self.mixing = False


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], Any],
    help: str,
    description: str,
    examples: str,
) -> argparse.ArgumentParser:
    """A command whose --help says what it does and shows how; `run` does it, and returns what
    --json writes."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=textwrap.fill(description, 88),
        epilog="examples:\n" + textwrap.indent(examples, "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=naming_the_model(run))
    return parser


def naming_the_model(run: Callable[[argparse.Namespace], Any]) -> Callable[..., Any]:
    """`run`, whose NotFinite errors say which model's numbers are not finite. A seed or count out
    of its range is refused first."""

    def named(options: argparse.Namespace) -> Any:
        for name, low, high in COUNTS:
            if (value := vars(options).get(name)) is not None:
                check_number(f"--{name.replace('_', '-')}", value, low, high, whole=True)
        try:
            return run(options)
        except NotFinite as error:
            model = vars(options).get("model")
            raise NotFinite(f"{model}: {error}" if model else str(error)) from error

    return named


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        type=json_file,
        metavar="FILE.json",
        help="write the numbers to a file; without a name to standard output, and nothing else",
    )


def json_file(name: str) -> str:
    """Refuses what is no JSON file's name: the option would swallow the argument behind it."""
    if name != "-" and not name.endswith(".json"):
        raise argparse.ArgumentTypeError(f"{name!r} must end in .json, or put --json last")
    return name


def write_json(path: str, content: Any) -> None:
    from flextok.files import write_text

    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    if path == "-":
        sys.stdout.write(text)
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(path), text)


def add_decoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        metavar="SET",
        help="emoji:validation, emoji_scenes:train, a picture folder, shards (*.tar), or "
        "{name: ...} as in configs",
    )
    parser.add_argument("--limit", type=int, help="take this many of --data, evenly spread")
    parser.add_argument("--num-tokens", type=int, nargs="+", help="default 1 2 4 ... all, or all")
    add_solving(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; a GPU where there is one")


def add_solving(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """several: of steps and scales, to be compared."""
    many: dict[str, Any] = {"nargs": "+"} if several else {}
    parser.add_argument("--steps", type=int, help="decoder steps", **many)
    parser.add_argument("--guidance-scale", type=float, help="decoder guidance, 1 = none", **many)
    parser.add_argument("--solver", help="euler, heun or ab2")
    parser.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="guided times"
    )
    parser.add_argument("--time-shift", type=float, help="> 1: more steps near the noise")


def pick_device(name: str | None) -> str:
    """The device of that name. By default this process's GPU, else MPS, else the CPU."""
    import torch

    from flextok.data.processes import local_device

    if name is not None:
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {name}: {error}") from None
    return name or local_device()


def token_lengths(asked: list[int] | None, tokenizer: Any, total: int) -> list[int]:
    """Those asked for, sorted; by default 1, 2, 4, ... where the tokenizer decodes prefixes."""
    from flextok.pipeline import decodable_lengths

    return check_lengths(asked or decodable_lengths(tokenizer, total), total)


def check_lengths(lengths: list[int], total: int) -> list[int]:
    if bad := [k for k in lengths if not 1 <= k <= total]:
        raise ValueError(f"--num-tokens {min(bad)} must be in [1, {total}]")
    return sorted(set(lengths))


def data_of(asked: str | None, model: str, part: str = "validation") -> Any:
    """The data set asked for; by default the one a model was validated (or, with part train,
    trained) on, as its folder's config.yaml has it, and the emoji for the package's own models.
    Raises ValueError for any other model."""
    from flextok.config import load_experiment
    from flextok.places import released
    from flextok.training.run import make_dataset

    if asked is not None:
        return open_data(asked)
    if model in released():
        return open_data(f"emoji:{part}")
    config = Path(model) / "config.yaml"
    spec = getattr(load_experiment(config).data, part) if config.is_file() else None
    if not spec or (isinstance(spec, dict) and spec.get("name") == "tokens"):
        option = "--train" if part == "train" else "--data"
        raise ValueError(
            f"{model} does not say which images it belongs to: name them with {option}"
        )
    return make_dataset(spec)


def output_of(asked: str | None, command: str, model: str) -> str:
    """The folder asked for; by default one of the command's own for each model."""
    name = re.sub(r"[^\w.-]+", "-", model).strip("-.") or "model"
    return asked or f"outputs/{command}/{name}"


def decoding_options(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "num_steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "solver": options.solver,
        "guidance_interval": options.guidance_interval,
        "time_shift": options.time_shift,
    }


def open_data(name: str) -> Any:
    from flextok.data.datasets import DATASETS
    from flextok.schema import build

    return build(DATASETS, data_spec(name), "dataset")


def data_spec(name: str) -> dict[str, Any]:
    """emoji, emoji:validation, emoji_scenes:train, a folder of pictures, WebDataset shards (*.tar)
    or a spec as in configs, {name: folder, root: pictures}."""
    if name.startswith("{"):
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError

        try:
            spec: Any = OmegaConf.to_container(OmegaConf.create(name))
        except (OmegaConfBaseException, YAMLError) as error:
            raise ValueError(f"--data {name!r} is no mapping: {error}") from None
        return spec
    if os.path.isdir(name):
        return {"name": "folder", "root": name}
    if ".tar" in name:
        return {"name": "webdataset", "urls": name}
    dataset, _, split = name.partition(":")
    if dataset not in ("emoji", "emoji_scenes"):
        raise ValueError(
            f"--data {name!r} is neither a folder nor shards (*.tar) nor emoji[:split] nor "
            "emoji_scenes[:split] nor {name: ...}"
        )
    return {"name": dataset, "split": split or "validation"}
