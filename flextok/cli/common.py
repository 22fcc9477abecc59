"""What the commands share: options, ranges of numbers, devices, models, data, JSON."""

import argparse
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flextok.schema import NotFinite, check_number

if TYPE_CHECKING:  # importing torch takes seconds, which --help would wait for
    from flextok.tokenizers.base import Tokenizer

# the models that come with the package: a tokenizer, and generators by class and by prompt
TOKENIZER, BY_CLASS, BY_PROMPT = "emoji", "emoji-class", "emoji-text"
Run = Callable[[argparse.Namespace], Any]


def json_file(name: str) -> str:
    """Refuses what is no JSON file's name: the option would swallow the argument behind it."""
    if name != "-" and not name.endswith(".json"):
        raise argparse.ArgumentTypeError(f"{name!r} must end in .json, or put --json last")
    return name


# options of several commands
SHARED: dict[str, dict[str, Any]] = {
    "--data": {
        "metavar": "SET",
        "help": "emoji:validation, emoji_scenes:train, a picture folder, shards (*.tar), or "
        "{name: ...} as in configs",
    },
    "--limit": {"type": int, "help": "take this many of --data, evenly spread"},
    "--num-tokens": {"type": int, "nargs": "+", "help": "default 1 2 4 ... all, or all"},
    "--num-samples": {"type": int, "default": 1, "help": "images a class or prompt"},
    "--tokenizer": {"help": "generator: another place to find its tokenizer"},
    "--seed": {"type": int, "default": 0},
    "--batch-size": {"type": int, "default": 64},
    "--num-workers": {"type": int, "default": 0},
    "--device": {"help": "cpu, cuda, ...; a GPU where there is one"},
    "--json": {
        "nargs": "?",
        "const": "-",
        "type": json_file,
        "metavar": "FILE.json",
        "help": "write the numbers to a file; without a name to standard output, and nothing else",
    },
}
# the least and the most that makes sense, of whole numbers
RANGES = {
    "seed": (0, 2**63 - 1),
    "num_workers": (0, 1000),
    "batch_size": (1, 1_000_000),
    "limit": (1, 2**63 - 1),
    "num_samples": (1, 1_000_000),
    "probe_steps": (1, 1_000_000),
}
# a field of the options of decode() or generate() -> its flags, type and help
DECODING: dict[str, tuple[list[str], type, str]] = {
    "num_steps": (["--steps"], int, "decoder steps"),
    "guidance_scale": (["--guidance-scale"], float, "decoder guidance, 1 = none"),
    "solver": (["--solver"], str, "euler, heun or ab2"),
    "guidance_interval": (["--guidance-interval"], float, "LOW HIGH: guided times"),
    "time_shift": (["--time-shift"], float, "> 1: more steps near the noise"),
}
SAMPLING: dict[str, tuple[list[str], type, str]] = {
    "temperature": (["--temperature"], float, "1 = the model's own probabilities"),
    "top_k": (["--top-k"], int, "draw from so many of the likeliest indices"),
    "top_p": (["--top-p"], float, "draw from the likeliest indices of this total probability"),
    "guidance_scale": (
        ["--class-guidance", "--text-guidance"],
        float,
        "generator's guidance; none is 1, and 0 for a MaskGIT with linear or constant decay",
    ),
    "num_steps": (["--generator-steps"], int, "MaskGIT's sampling steps"),
}


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
    commands: Any, name: str, run: Run, help: str, description: str, examples: str, *shared: str
) -> argparse.ArgumentParser:
    """A command whose --help says what it does and shows how; `run` does it, and returns what
    --json writes. shared: its options among SHARED."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=textwrap.fill(description, 88),
        epilog="examples:\n" + textwrap.indent(examples, "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=checked(run))
    for flag in shared:
        parser.add_argument(flag, **SHARED[flag])
    return parser


def checked(run: Run) -> Run:
    """`run`, before which the numbers are held to RANGES, and whose NotFinite errors say which
    model's numbers are not finite."""

    def work(options: argparse.Namespace) -> Any:
        for name, (low, high) in RANGES.items():
            if (value := vars(options).get(name)) is not None:
                check_number(f"--{name.replace('_', '-')}", value, low, high, whole=True)
        try:
            return run(options)
        except NotFinite as error:
            model = vars(options).get("model")
            raise NotFinite(f"{model}: {error}" if model else str(error)) from error

    return work


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", **SHARED["--json"])


def write_json(path: str, content: Any) -> None:
    from flextok.files import write_text

    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    if path == "-":
        sys.stdout.write(text)
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(path), text)


def add_solving(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """The decoder's options; several: of steps and scales, to be compared."""
    add_fields(parser, DECODING, ("num_steps", "guidance_scale") if several else ())


def add_fields(
    parser: argparse.ArgumentParser,
    table: dict[str, tuple[list[str], type, str]],
    several: tuple[str, ...] = (),
) -> None:
    for field, (flags, kind, text) in table.items():
        number = 2 if field == "guidance_interval" else "+" if field in several else None
        parser.add_argument(*flags, type=kind, help=text, nargs=number)


def chosen(
    options: argparse.Namespace, table: dict[str, tuple[list[str], type, str]]
) -> dict[str, Any]:
    """The fields that were asked for."""
    dests = {field: flags[0].strip("-").replace("-", "_") for field, (flags, *_) in table.items()}
    found = {field: vars(options)[dest] for field, dest in dests.items()}
    return {field: value for field, value in found.items() if value is not None}


def decoding_options(options: argparse.Namespace) -> dict[str, Any]:
    return chosen(options, DECODING)


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


def load_tokenizer(name: str, device: str | None) -> "Tokenizer":
    from flextok.pipeline import load_model
    from flextok.tokenizers.base import Tokenizer

    model = load_model(name, pick_device(device))
    if not isinstance(model, Tokenizer):
        raise ValueError(f"{name} is a generator: name the tokenizer whose indices it predicts")
    return model


def token_lengths(asked: list[int] | None, tokenizer: "Tokenizer", total: int) -> list[int]:
    """Those asked for, sorted; by default 1, 2, 4, ... where the tokenizer decodes prefixes."""
    from flextok.pipeline import decodable_lengths

    return check_lengths(asked or decodable_lengths(tokenizer, total), total)


def check_lengths(lengths: list[int], total: int) -> list[int]:
    if bad := [k for k in lengths if not 1 <= k <= total]:
        raise ValueError(f"--num-tokens {min(bad)} must be in [1, {total}]")
    return sorted(set(lengths))


def output_of(asked: str | None, command: str, model: str) -> str:
    """The folder asked for; by default one of the command's own for each model."""
    name = re.sub(r"[^\w.-]+", "-", model).strip("-.") or "model"
    return asked or f"outputs/{command}/{name}"


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
    data = load_experiment(config).data if config.is_file() else None
    spec = data and (data.train if part == "train" else data.validation)
    if not spec or (isinstance(spec, dict) and spec.get("name") == "tokens"):
        option = "--train" if part == "train" else "--data"
        raise ValueError(
            f"{model} does not say which images it belongs to: name them with {option}"
        )
    return make_dataset(spec)


def open_data(name: str) -> Any:
    from flextok.data.datasets import DATASETS
    from flextok.schema import build

    return build(DATASETS, data_spec(name), "dataset")


def data_spec(name: str) -> dict[str, Any]:
    """emoji, emoji:validation, emoji_scenes:train, a folder of pictures, WebDataset shards (*.tar)
    or a spec as in configs, {name: folder, root: pictures}."""
    if name.startswith("{"):
        import yaml

        try:
            return yaml.safe_load(name)
        except yaml.YAMLError as error:
            raise ValueError(f"--data {name!r} is no mapping: {error}") from None
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
