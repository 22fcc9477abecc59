"""The engine of the maps: tensors renamed and changed by rules, shapes read with errors that name
the tensor, config sections found and checked against the weights."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

State = Mapping[str, Tensor]
Section = Mapping[str, Any]
Documents = Sequence[Mapping[str, Any]]
Change = Callable[[State, str], Tensor | Sequence[Tensor]]  # of the tensor of a published key


class Published(NamedTuple):
    """A published model in our terms."""

    model_type: str
    config: dict[str, Any]
    state: dict[str, Tensor]
    provenance: dict[str, Any]  # layout, license, and what the files leave open


class Rule(NamedTuple):
    r"""What becomes of published tensors. pattern: of their keys, a regular expression in which
    "." is a dot, "#" the group (\d+) and "*" the group (.+). name: ours, with \1 for a group;
    as many as `change` gives tensors where it gives a tuple."""

    pattern: str
    name: str | Callable[[re.Match[str]], str]
    change: Change | None = None
    change_back: Change | None = None  # from ours

    def match(self, key: str) -> re.Match[str] | None:
        pattern = self.pattern.replace(".", r"\.").replace("#", r"(\d+)").replace("*", "(.+)")
        return re.fullmatch(pattern, key)

    def reversed(self) -> "Rule":
        """The rule from our name to the published one. Of a pattern whose groups are "#" and "*"
        alone, all of them in the name."""
        assert isinstance(self.name, str)
        groups = re.findall(r"[#*]", self.pattern)
        numbers = iter(range(1, len(groups) + 1))
        published = re.sub(r"[#*]", lambda _: rf"\{next(numbers)}", self.pattern)
        ours = re.sub(r"\\(\d)", lambda group: groups[int(group[1]) - 1], self.name)
        return Rule(ours, published, self.change_back)


def translate(
    published: State, rules: Sequence[Rule], unknown: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A published state dict in our names and shapes; the first rule that matches a key counts.
    A key of none goes into `unknown`, or without it raises ValueError."""
    state: dict[str, Tensor] = {}
    for key, value in published.items():
        matches = ((rule, match) for rule in rules if (match := rule.match(key)))
        rule, match = next(matches, (None, None))
        if rule and match:
            name = match.expand(rule.name) if isinstance(rule.name, str) else rule.name(match)
            changed = rule.change(published, key) if rule.change else value
            if isinstance(changed, Tensor):
                state[name] = changed
            else:
                state |= zip(name.split(), changed, strict=True)
        elif unknown is None:
            raise unknown_key(key)
        else:
            unknown[key] = value
    return state


def unknown_key(key: str) -> ValueError:
    return ValueError(f"unknown published key {key!r}: is this the model that you think it is?")


def without_ones(leading: int = 0, trailing: int = 0) -> Callable[[State, str], Tensor]:
    """Takes away axes of length one at a tensor's start or end, which must be there."""

    def change(state: State, key: str) -> Tensor:
        value = state[key]
        ones = value.shape[:leading] + value.shape[value.ndim - trailing :]
        if value.ndim < leading + trailing or any(n != 1 for n in ones):
            raise ValueError(f"{key!r} has the unexpected shape {list(value.shape)}")
        return value[(0,) * leading + (...,) + (0,) * trailing]

    return change


def shape(state: State, key: str, ndim: int) -> tuple[int, ...]:
    """The shape of a tensor of `ndim` axes. Raises ValueError if it is missing or has others."""
    if key not in state:
        raise ValueError(f"tensor {key!r} is missing")
    if state[key].ndim != ndim:
        raise ValueError(f"{key!r} has shape {list(state[key].shape)}, expected {ndim} axes")
    return tuple(state[key].shape)


def count(state: State, prefix: str) -> int:
    """How many numbers follow the prefix in the keys: 0 to the largest."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return 1 + max((int(m[1]) for key in state if (m := pattern.match(key))), default=-1)


def find_section(documents: Documents, name: str) -> Section:
    """The section of that name in the "model" section of a published config; empty without one."""
    for document in documents:
        model = document.get("model")
        if isinstance(model, Mapping) and isinstance(model.get(name), Mapping):
            return model[name]
    return {}


def agree(section: Section, expected: Section, name: str = "", by: str = "the weights") -> None:
    """Raise ValueError for a key of a published config's section that contradicts what `by` has."""
    for key, value in expected.items():
        if section.get(key, value) != value:
            stated = f"{name}.{key}".lstrip(".")
            raise ValueError(f"the config has {stated} = {section[key]!r}, {by} have {value!r}")
