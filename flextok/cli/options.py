"""Options that several commands take, with the ranges of their numbers, and how a command is added.
Importing this imports no torch, which --help would wait for."""

import argparse
import pkgutil
import textwrap
from collections.abc import Callable
from typing import Any, TypeAlias

from flextok.schema import NotFinite, check_number

# the models that come with the package: a tokenizer, and generators by class and by prompt
TOKENIZER, BY_CLASS, BY_PROMPT = "emoji", "emoji-class", "emoji-text"
MOST_CLASSES = 16  # in a grid whose classes nobody named
RECONSTRUCTED = "outputs/reconstructed"
Run = Callable[[argparse.Namespace], Any]
Table = dict[str, tuple[list[str], type, str]]  # a field of some options: its flags, type and help


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
# of decode() and of generate()
DECODING: Table = {
    "num_steps": (["--steps"], int, "decoder steps"),
    "guidance_scale": (["--guidance-scale"], float, "decoder guidance, 1 = none"),
    "solver": (["--solver"], str, "euler, heun or ab2"),
    "guidance_interval": (["--guidance-interval"], float, "LOW HIGH: guided times"),
    "time_shift": (["--time-shift"], float, "> 1: more steps near the noise"),
}
SAMPLING: Table = {
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


Commands: TypeAlias = "argparse._SubParsersAction[AnyOrder]"


def add_command(
    commands: Commands,
    name: str,
    run: Run | str,
    help: str,
    description: str,
    examples: str,
    *shared: str,
) -> argparse.ArgumentParser:
    """A command whose --help explains it with examples; `run`, a function or the name of one below
    flextok.cli, does the work and returns what --json writes. shared: its options of SHARED."""
    parser = commands.add_parser(
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


def checked(run: Run | str) -> Run:
    """`run`, before which the numbers are held to RANGES, and whose NotFinite errors say which
    model's numbers are not finite."""

    def work(options: argparse.Namespace) -> Any:
        for name, (low, high) in RANGES.items():
            if (value := vars(options).get(name)) is not None:
                check_number(f"--{name.replace('_', '-')}", value, low, high, whole=True)
        try:
            found = pkgutil.resolve_name(f"flextok.cli.{run}") if isinstance(run, str) else run
            return found(options)
        except NotFinite as error:
            model = vars(options).get("model")
            raise NotFinite(f"{model}: {error}" if model else str(error)) from error

    return work


def add_solving(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """The decoder's options; several: of steps and scales, to be compared."""
    add_fields(parser, DECODING, ("num_steps", "guidance_scale") if several else ())


def add_fields(
    parser: argparse.ArgumentParser,
    table: Table,
    several: tuple[str, ...] = (),
) -> None:
    for field, (flags, kind, text) in table.items():
        number = 2 if field == "guidance_interval" else "+" if field in several else None
        parser.add_argument(*flags, type=kind, help=text, nargs=number)


def chosen(options: argparse.Namespace, table: Table) -> dict[str, Any]:
    """The fields that were asked for."""
    dests = {field: flags[0].strip("-").replace("-", "_") for field, (flags, *_) in table.items()}
    found = {field: vars(options)[dest] for field, dest in dests.items()}
    return {field: value for field, value in found.items() if value is not None}


def decoding_options(options: argparse.Namespace) -> dict[str, Any]:
    return chosen(options, DECODING)
