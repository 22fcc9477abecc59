"""What the maps share: renaming by rules, and reading shapes with errors that name the tensor."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

Rules = list[tuple[str, str]]  # (pattern of a published key, our key)


class Published(NamedTuple):
    """A published model in our terms."""

    model_type: str
    config: dict[str, Any]
    state: dict[str, Tensor]
    provenance: dict[str, Any]  # layout, license, and what the files leave open


def rename(key: str, rules: Rules, whole: str | None = None) -> str:
    """Our name of a published key. Raises ValueError for an unknown one, naming it `whole`."""
    for pattern, replacement in rules:
        if match := re.fullmatch(pattern, key):
            return match.expand(replacement)
    raise unknown_key(whole or key)


def unknown_key(key: str) -> ValueError:
    return ValueError(f"unknown published key {key!r}: is this the model that you think it is?")


def shape(state: Mapping[str, Tensor], key: str, ndim: int) -> tuple[int, ...]:
    """The shape of a tensor of `ndim` axes. Raises ValueError if it is missing or has others."""
    if key not in state:
        raise ValueError(f"tensor {key!r} is missing")
    if state[key].ndim != ndim:
        raise ValueError(f"{key!r} has shape {list(state[key].shape)}, expected {ndim} axes")
    return tuple(state[key].shape)


def without_ones(key: str, value: Tensor, leading: int = 0, trailing: int = 0) -> Tensor:
    """value without axes of length one at its start or end, which must be there."""
    ones = value.shape[:leading] + value.shape[value.ndim - trailing :]
    if value.ndim < leading + trailing or any(n != 1 for n in ones):
        raise ValueError(f"{key!r} has the unexpected shape {list(value.shape)}")
    return value[(0,) * leading + (...,) + (0,) * trailing]


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many numbers occur at the pattern's group, which starts a key: 0 to the largest."""
    return 1 + max((int(m[1]) for key in state if (m := re.match(pattern, key))), default=-1)


def agree(
    section: Mapping[str, Any], expected: Mapping[str, Any], name: str = "", by: str = "the weights"
) -> None:
    """Raise ValueError for a key of a published config's section that contradicts what `by` has."""
    for key, value in expected.items():
        if section.get(key, value) != value:
            stated = f"{name}.{key}".lstrip(".")
            raise ValueError(f"the config has {stated} = {section[key]!r}, {by} have {value!r}")
