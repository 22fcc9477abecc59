"""Labels are indices into class names, and classes are the same where their names are: whatever a
file calls a class is looked up by name first and by number second, and data sets are joined and
compared by name."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from flextok.data.pictures import UNLABELLED, clean_text
from flextok.schema import find_class, find_name

MAX_CLASSES = 1_000_000
NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")  # as a label is written: 7, and not 007


def as_label(value: object) -> int | str:
    """A label as a file states it: a whole number stays one, all else is a name. Raises ValueError
    for what is neither."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, int | str):
        return value
    raise ValueError(f"label {value!r} is neither a name nor a whole number")


def check_names(class_names: Sequence[str] | int) -> list[str]:
    """Class names, or how many numbers there are. Raises ValueError for names that are no text or
    are there twice."""
    if isinstance(class_names, int):
        if isinstance(class_names, bool) or not 1 <= class_names <= MAX_CLASSES:
            raise ValueError(f"class_names={class_names} must be names or from 1 to {MAX_CLASSES}")
        return [str(number) for number in range(class_names)]
    names = class_names
    if isinstance(names, str) or not names:
        raise ValueError(f"class_names={names!r} must be a list of names")
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f'class_names holds {name!r}, which is no text: write it as "{name}"')
    if len(different := union(names)) < len(names):
        pairs = zip(names, [*different, None], strict=False)
        twice = next(name for name, other in pairs if name != other)
        raise ValueError(f"class_names holds {twice!r} twice: each class has one name")
    return list(names)


def balanced(labels: Tensor, balance: float) -> list[int]:
    """Indices of samples, whose labels are given, (N,), with those of the smaller classes repeated:
    a class of n samples then has n * (largest / n)^balance. So 0 leaves the classes as they are and
    1 makes them equal; LVIS (arXiv 1908.03195) has such a rule, with 0.5."""
    indices: list[int] = []
    rng = torch.Generator().manual_seed(0)  # which of a class are repeated once more
    counts = labels.bincount().tolist()
    largest = max(counts)
    for some in labels.argsort(stable=True).split(counts):
        if count := len(some):
            wanted = round(count * (largest / count) ** balance)
            more = some[torch.randperm(count, generator=rng)[: wanted % count]]
            indices += [*some.tolist() * (wanted // count), *more.tolist()]
    return indices


def union(names: Iterable[str]) -> list[str]:
    """The different ones in their order, however their accents are encoded (see find_name)."""
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(unicodedata.normalize("NFC", name), name)
    return list(found.values())


def label_table(names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def index_labels(
    labels: Sequence[int | str], class_names: Sequence[str] | int | None
) -> tuple[list[str], list[int]]:
    """Class names (given, or found: all numbers up to the largest, or sorted names) and the label
    of every sample as their index. Raises ValueError for a label that is none of them."""
    distinct = dict.fromkeys(labels)
    if class_names is None:
        numbers = [label for label in distinct if isinstance(label, int)]
        if len(numbers) < len(distinct):
            class_names = sorted({unicodedata.normalize("NFC", str(label)) for label in distinct})
        elif not 0 <= max(numbers) < MAX_CLASSES or min(numbers) < 0:
            wrong = min(numbers) if min(numbers) < 0 else max(numbers)
            raise ValueError(
                f"label {wrong} is no class number from 0 to {MAX_CLASSES - 1}: is it an id? Name "
                "another column or key, give class_names, or leave the labels out"
            )
        else:
            class_names = max(numbers) + 1
    names = check_names(class_names)
    table = label_table(names)
    found = {label: find_class(table, label) for label in distinct}
    if unknown := [label for label, number in found.items() if number is None]:
        raise ValueError(
            f"label {unknown[0]!r} is none of the {list_names(names)}; mend it, name another "
            "column, key or folder, or leave the labels out"
        )
    return names, [found[label] for label in labels]  # type: ignore[misc]


def list_names(names: Sequence[str]) -> str:
    return f"{len(names)} classes {', '.join(names[:9])}{', ...' if len(names) > 9 else ''}"


def renumbering(found: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """For each of the classes `found`, the number that it has among `wanted`, by name. Raises
    ValueError naming the classes that `wanted` lacks."""
    table = label_table(wanted)
    numbers = {name: find_name(table, name) for name in found}
    if unknown := [name for name, number in numbers.items() if number is None]:
        raise ValueError(
            f"the data has the {list_names(unknown)}, which are none of the model's "
            f"{list_names(wanted)}: leave them out, or mend their names"
        )
    return [numbers[name] for name in found]  # type: ignore[misc]


def texts_of(value: object) -> list[str]:
    """A picture's captions as a file states them: a text, several, or none. Raises ValueError for
    anything else."""
    several = value if isinstance(value, list | tuple) else [value]
    if wrong := [one for one in several if not isinstance(one, str | int | float | None)]:
        raise ValueError(f"caption {wrong[0]!r} is no text")
    return [text for one in several if one is not None and (text := clean_text(str(one)))]


def captioned(captions: Sequence[str], class_name: str) -> dict[str, Any]:
    """An item's caption, by default its class, if it has one; and `captions`, where it has several
    (a token cache takes them in turn)."""
    if len(captions) > 1:
        return {"caption": captions[0], "captions": list(captions)}
    named = "" if class_name == UNLABELLED else class_name
    return {"caption": captions[0] if captions and captions[0] else named}
