"""A command's arguments are a dataclass: this turns its fields into argparse's, and what was parsed
into the dataclass. And the options that several commands take. Importing this imports no torch,
which --help would wait for."""

import argparse
import dataclasses
import functools
import inspect
import json
import pkgutil
import sys
import textwrap
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from flextok.files import write_text
from flextok.schema import Bounds, NotFinite, from_mapping

# the models that come with the package: a tokenizer, and generators by class and by prompt
TOKENIZER, BY_CLASS, BY_PROMPT = "emoji", "emoji-class", "emoji-text"
FEW_STEP = "emoji-few-step"  # a faster decoder of the same tokens
# field of the options of decode() -> field of Decoding; the same of generate() and Sampling
DECODING = {
    "num_steps": "steps",
    **{name: name for name in ("guidance_scale", "solver", "guidance_interval", "time_shift")},
    **{name: name for name in ("noise_scale", "height", "width")},
}
SAMPLING = {
    **{name: name for name in ("temperature", "top_k", "top_p")},
    "guidance_scale": "class_guidance",
    "num_steps": "generator_steps",
}
Count = Annotated[int, Bounds(1, 2**40)]
SETS = "emoji:validation, emoji_scenes:train, a picture folder, shards (*.tar), {name: ...}"
Data = Annotated[str | None, SETS]
OwnData = Annotated[str | None, f"{SETS}; default: the model's validation set"]
Limit = Annotated[Count | None, "use only this many images, spread evenly over the set"]
Lengths = Annotated[
    list[int] | None,
    "how many of the first tokens to use; default: 1 2 4 ... and all, or all alone where the model "
    "decodes no prefixes",
]
ItsTokenizer = Annotated[
    str | None, "for a generator: decode with this tokenizer in place of its own"
]


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


def add_command(commands: Commands, name: str, kind: type, work: str) -> None:
    """A command that parses into the dataclass `kind` and gives it to the function named `work`
    below flextok.cli. The docstring of `kind` holds what it does, more about it, and examples."""
    summary, description, examples = inspect.cleandoc(kind.__doc__ or "").split("\n\n")
    parser = commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, 88),
        epilog="examples:\n" + textwrap.indent(examples, "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hints = typing.get_type_hints(kind, include_extras=True)
    own = inspect.get_annotations(kind)  # first in the help, before those of many commands
    for field in sorted(dataclasses.fields(kind), key=lambda field: field.name not in own):
        add_field(parser, field, hints[field.name])
    parser.set_defaults(run=functools.partial(run_command, kind, work))


def add_field(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], hint: Any) -> None:
    """The argument of a field: an option if it is keyword-only, else positional. Beside its type
    stand its help and, in a mapping, what argparse is to do otherwise."""
    notes: list[Any] = []
    while typing.get_origin(hint) in (Annotated, typing.Union, types.UnionType):
        hint, *more = typing.get_args(hint)  # of a union with None the first counts
        notes += more
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    default = None if field.default is dataclasses.MISSING else field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    settings: dict[str, Any] = {"type": hint, "default": default}
    if hint is bool:
        settings = {"action": "store_true"}
    elif origin is Literal:
        settings |= {"type": type(arguments[0]), "choices": arguments}
    elif origin is tuple:
        settings |= {"type": arguments[0], "nargs": len(arguments)}
    elif origin is list:
        settings |= {"type": arguments[0], "nargs": "+"}
    settings["help"] = next((note for note in notes if isinstance(note, str)), None)
    optional = default is not None
    if not field.kw_only and optional:
        settings["nargs"] = "*" if origin is list else "?"
    for note in notes:
        settings |= note if isinstance(note, dict) else {}
    flags = [f"--{field.name.replace('_', '-')}", *settings.pop("also", ())]
    if field.kw_only:
        required = field.default is field.default_factory is dataclasses.MISSING
        parser.add_argument(*flags, dest=field.name, required=required, **settings)
    else:
        parser.add_argument(field.name, **settings)


def run_command(kind: type, work: str, parsed: argparse.Namespace) -> Any:
    """What a command's work returns. Its arguments are checked before; NotFinite errors say which
    model's numbers are not finite."""
    values = {field.name: vars(parsed)[field.name] for field in dataclasses.fields(kind)}
    options: object = from_mapping(kind, values)
    try:
        module, name = work.split(".")
        return pkgutil.resolve_name(f"flextok.cli.{module}:{name}")(options)
    except NotFinite as error:
        model = values.get("model")
        raise NotFinite(f"{model}: {error}" if model else str(error)) from error


def json_file(name: str) -> str:
    """Refuses what is no JSON file's name: the option would swallow the argument behind it."""
    if name != "-" and not name.endswith(".json"):
        raise argparse.ArgumentTypeError(f"{name!r} must end in .json, or put --json last")
    return name


JSON = {"nargs": "?", "const": "-", "type": json_file, "metavar": "FILE.json"}


@dataclass(kw_only=True)
class Json:
    json: Annotated[
        str | None,
        "write the numbers to this file; without a name to standard output, and print nothing else",
        JSON,
    ] = None


@dataclass(kw_only=True)
class Device:
    device: Annotated[str | None, "cpu, cuda, ...; default: a GPU where there is one"] = None


@dataclass(kw_only=True)
class Seed:
    seed: Annotated[int, Bounds(0, 2**63 - 1), "decides all random draws; default 0"] = 0


@dataclass(kw_only=True)
class Loading:
    batch_size: Annotated[int, Bounds(1, 1_000_000), "images at a time; default 64"] = 64
    num_workers: Annotated[int, Bounds(0, 1000), "processes that read images; default 0"] = 0


@dataclass(kw_only=True)
class Solving:
    """Options of a decoder that solves an equation in steps."""

    solver: Annotated[str | None, "the decoder's: euler, heun or ab2; default: the model's own"] = (
        None
    )
    guidance_interval: Annotated[
        tuple[float, float] | None,
        "guide the decoder only between these times",
        {"metavar": ("LOW", "HIGH")},
    ] = None
    time_shift: Annotated[float | None, "above 1: more decoder steps near the noise"] = None
    noise_scale: Annotated[
        tuple[float, float] | None,
        "factor of the decoder's initial noise for one token, and for all",
        {"metavar": ("ONE", "ALL")},
    ] = None


@dataclass(kw_only=True)
class Decoding(Solving):
    steps: Annotated[int | None, "how many the decoder takes; default: the model's own"] = None
    guidance_scale: Annotated[
        float | None, "of the decoder; 1 is no guidance; default: the model's own"
    ] = None


@dataclass(kw_only=True)
class Shape:
    """The size of images that are not square, for models that take them."""

    height: Annotated[int | None, "of the images, in pixels; default: the model's square"] = None
    width: Annotated[int | None, "of the images, in pixels; default: as for --height"] = None


@dataclass(kw_only=True)
class Sampling:
    """Options of a generator."""

    temperature: Annotated[
        float | None, "of the generator's draws; 0 takes the likeliest index"
    ] = None
    top_k: Annotated[int | None, "draw from this many likeliest indices only; 0: from all"] = None
    top_p: Annotated[float | None, "draw from the likeliest indices of this total probability"] = (
        None
    )
    class_guidance: Annotated[
        float | None,
        "of the generator; 1 is no guidance, and 0 for a MaskGIT with linear or constant decay",
        {"also": ["--text-guidance"]},
    ] = None
    generator_steps: Annotated[int | None, "MaskGIT's sampling steps"] = None


def chosen(options: object, table: dict[str, str]) -> dict[str, Any]:
    """The options of decode() (table: DECODING) or generate() (SAMPLING) that were asked for."""
    found = {field: vars(options).get(name) for field, name in table.items()}
    return {field: value for field, value in found.items() if value is not None}


def decoding_options(options: Solving) -> dict[str, Any]:
    return chosen(options, DECODING)


def refuse_given(options: object, names: Iterable[str], reason: str) -> None:
    """Raise ValueError where an option of one of these names was given: it would be ignored."""
    if given := [name for name in names if vars(options)[name] is not None]:
        raise ValueError(f"{reason}: leave --{given[0].replace('_', '-')} out")


class Incomplete(ValueError):
    """Some of what a command was given could not be read. report: what --json writes of the rest,
    and of what failed."""

    def __init__(self, message: str, report: Any):
        super().__init__(message)
        self.report = report


def write_json(path: str, content: Any) -> None:
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    if path == "-":
        sys.stdout.write(text)
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(path), text)
