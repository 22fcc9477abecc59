"""Checked configuration: plain mappings in, dataclasses and components out.

One strict reader serves YAML files, command-line overrides and the config.json of a saved model.
A component is chosen by a short name from a registry, which is a plain dict: {"name": "fsq", ...}.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import operator
import re
import types
import typing
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Which numbers a field takes, written into its type: Annotated[int, Bounds(1)]. Both ends
    belong to the range unless they are open."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def check(self, value: Any, where: str) -> None:
        """Raises ConfigError for a number, or a number in a list or mapping, that lies outside."""
        if isinstance(value, list | dict):
            entries = value.items() if isinstance(value, dict) else enumerate(value)
            for key, entry in entries:
                self.check(entry, f"{where}[{key}]")
        elif isinstance(value, int | float):
            above = value > self.low if self.open_low else value >= self.low
            below = value < self.high if self.open_high else value <= self.high
            if not (above and below):
                raise ConfigError(f"{where}={value!r} must be {self}.")

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.open_low else f"at least {self.low:g}"
        high = f"below {self.high:g}" if self.open_high else f"at most {self.high:g}"
        return low if self.high == math.inf else f"{low} and {high}"


# of networks: far above any that fits a machine, and small enough to be built without weights
Size = typing.Annotated[int, Bounds(1, 65_536)]
Many = typing.Annotated[int, Bounds(1, 2**24)]  # rows of an embedding
Depth = typing.Annotated[int, Bounds(1, 512)]
Share = typing.Annotated[float, Bounds(0, 1)]
Weight = typing.Annotated[float, Bounds(0)]  # of a loss


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and the remedy."""


class NotFinite(ValueError):
    """A model computed a value that is NaN or infinite."""


def check_number(
    where: str, value: Any, low: float, high: float, whole: bool = False, hint: str = ""
) -> None:
    """Raises ConfigError unless the value is a number, a whole one if asked, in [low, high]."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)  # NumPy's, too
    if not is_number or not low <= value <= high or (whole and whole_number(value) is None):
        kind = "a whole number" if whole else "a number"
        found = f"{where}{' ' if where.startswith('--') else '='}{value!r}"
        raise ConfigError(f"{found} must be {kind} from {low:g} to {high:g}{hint}.")


def unknown_key(kind: str, key: str, known: list[str], where: str = "") -> ConfigError:
    guess = difflib.get_close_matches(str(key), known, n=1)
    hint = f" Did you mean {guess[0]!r}?" if guess else ""
    place = f" in {where!r}" if where else ""
    return ConfigError(f"unknown {kind} {key!r}{place}.{hint} Known: {', '.join(sorted(known))}.")


def whole_number(label: object) -> int | None:
    """A label of any integer type, such as a tensor's; None for what is no whole number."""
    try:
        return operator.index(label)  # type: ignore[arg-type]
    except TypeError:
        return None


def find_name(table: Mapping[str, int], text: str) -> int | None:
    """The number of a name in a table of them, however its accents are encoded (Unicode's forms: a
    Mac writes others than most); None where it is not there."""
    if text in table or text.isascii():
        return table.get(text)
    same = {unicodedata.normalize("NFC", name): number for name, number in table.items()}
    return same.get(unicodedata.normalize("NFC", text))


def find_class(table: Mapping[str, int], label: int | str) -> int | None:
    """The number of a class by its name, else by its number; None where it has neither. table: the
    number of each name."""
    text = str(label)
    if (named := find_name(table, text)) is not None:
        return named
    is_number = re.fullmatch("[0-9]{1,18}", text)
    number = int(text) if is_number else {"false": 0, "true": 1}.get(text, len(table))
    return number if number < len(table) else None


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Read a dataclass from a mapping. Unknown keys, missing keys and wrong types are errors."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or cls.__name__} must be a mapping of keys, got {values!r}.")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls, include_extras=True)
    for key in values:
        if key not in fields:
            raise unknown_key("key", key, list(fields), where)
    kwargs = {k: _coerce(hints[k], v, f"{where}.{k}".lstrip(".")) for k, v in values.items()}
    for name, field in fields.items():
        no_default = field.default is dataclasses.MISSING
        if name not in kwargs and no_default and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"missing key {f'{where}.{name}'.lstrip('.')!r} ({cls.__name__}).")
    return cls(**kwargs)


def to_mapping(config: Any) -> dict[str, Any]:
    """The plain mapping that from_mapping reads back."""
    return dataclasses.asdict(config)


def with_options(defaults: T, asked: Mapping[str, Any], what: str) -> T:
    """A dataclass of options with those that are asked and not None. Raises ConfigError, also for
    one that it does not have."""
    known = [f.name for f in dataclasses.fields(defaults)]  # type: ignore[arg-type]
    given = {key: value for key, value in asked.items() if value is not None}
    for key in given:
        if key not in known:
            raise unknown_key(what, key, known)
    return dataclasses.replace(defaults, **given)  # type: ignore[type-var]


def merged(key: str, base: Any, value: Any) -> Any:
    """`value` over `base`: mappings are merged key by key. All else, an empty mapping and one that
    names another component (an optimizer is none) replace what was there."""
    if not (value and isinstance(value, dict) and isinstance(base, dict)):
        return value
    if key != "optim" and value.get("name") not in (None, base.get("name")):
        return value
    return {**base, **{key: merged(key, base.get(key), below) for key, below in value.items()}}


def named_spec(value: Any, what: str, known: list[str]) -> dict[str, Any]:
    """A component's spec as a mapping; its name alone is one, too. Raises ConfigError."""
    spec = {"name": value} if isinstance(value, str) else value
    if not isinstance(spec, Mapping):
        raise ConfigError(f"{what}={value!r} must be a mapping of keys, such as {{name: ...}}.")
    if "name" not in spec:
        raise ConfigError(f"{what} needs a name. Known: {', '.join(sorted(known))}.")
    if spec["name"] not in known:
        raise unknown_key(what, spec["name"], known)
    return dict(spec)


def options_of(factory: Callable[..., Any]) -> dict[str, Any]:
    """The types of the options that a component's spec may state: a class's parameters, and those
    of a function that have a default, for its caller gives the others."""
    maker = factory.__init__ if inspect.isclass(factory) else factory
    hints = typing.get_type_hints(maker, include_extras=True)
    return {
        p.name: hints.get(p.name, Any)
        for p in inspect.signature(factory).parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and (inspect.isclass(factory) or p.default is not p.empty)
    }


def defaults_of(factory: Callable[..., Any]) -> dict[str, Any]:
    """The options of a component, with their defaults (inspect.Parameter.empty where none is)."""
    return {p.name: p.default for p in inspect.signature(factory).parameters.values()}


def build(registry: Mapping[str, Callable[..., Any]], spec: Mapping[str, Any] | str, what: str):
    """Build the component that a spec names: {"name": "fsq", "levels": [8]} -> FSQ(levels=[8]).

    A registry entry that is a class is instantiated; a function becomes a partial with its
    parameters bound. Parameters are checked against the signature and its types.
    """
    spec = named_spec(spec, what, list(registry))
    name = spec.pop("name")
    factory = registry[name]
    known = options_of(factory)
    for key in spec:
        if key not in known:
            raise unknown_key("key", key, list(known), f"{what} {name}")
    options = {key: _coerce(known[key], value, f"{what}.{key}") for key, value in spec.items()}
    if not inspect.isclass(factory):
        return functools.partial(factory, **options)
    parameters = inspect.signature(factory).parameters
    required = [key for key in known if parameters[key].default is inspect.Parameter.empty]
    if missing := [key for key in required if key not in spec]:
        raise ConfigError(f"{what} {name!r} needs {', '.join(missing)}.")
    return factory(**options)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is typing.Annotated:
        value = _coerce(args[0], value, where)
        for bounds in args[1:]:
            if isinstance(bounds, Bounds):  # beside a command's help
                bounds.check(value, where)
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        errors = []
        for option in (a for a in args if a is not type(None)):
            try:
                return _coerce(option, value, where)
            except ConfigError as error:
                errors.append(error)
        raise errors[-1]
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_mapping(hint, value, where)  # type: ignore
    if origin is typing.Literal:
        if value in args:
            return value
        raise ConfigError(f"{where}={value!r} must be one of {', '.join(map(repr, args))}.")
    if origin in (list, tuple, Sequence):
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}={value!r} must be a list.")
        item, kind = (args[0] if args else Any), (tuple if origin is tuple else list)
        return kind(_coerce(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin in (dict, Mapping) or hint is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}={value!r} must be a mapping of keys.")
        if odd := [key for key in value if not isinstance(key, str)]:
            raise ConfigError(f"{where}: the key {odd[0]!r} must be a text: put it into quotes.")
        item = args[1] if args else Any
        return {k: _coerce(item, v, f"{where}.{k}") for k, v in value.items()}
    if hint is Path:
        return Path(_coerce(str, value, where))
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            value = float(value)  # YAML 1.1 reads 1e-4 as a string
        except (ValueError, OverflowError):
            pass
        else:
            if not math.isfinite(value):
                raise ConfigError(f"{where}={value!r} must be a finite number.")
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    quote = ": put it into quotes" if hint is str and isinstance(value, int | float) else ""
    raise ConfigError(f"{where}={value!r} must be of type {hint.__name__}{quote}.")
