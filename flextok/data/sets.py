"""What a data set of images is: any map-style torch data set. What is asked of it beyond that is
here, and how several become one, some of one are taken, and labels change their numbers."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset

from flextok.data.labels import (
    as_label,
    captioned,
    check_names,
    label_table,
    renumbering,
    texts_of,
    union,
)
from flextok.data.pictures import UNLABELLED, CorruptPicture
from flextok.draws import sample_evenly
from flextok.schema import find_class, whole_number

NO_CLASS = -1  # the label of what has none where others have


@runtime_checkable
class ImageSet(Protocol):
    """A data set with class names. Its items: image (whatever ImageTransform takes), label
    (an index into class_names), caption and key (texts) and, of an image with several, captions."""

    class_names: Sequence[str]


@runtime_checkable
class HasClasses(Protocol):
    """A data set with torchvision's name for its class names."""

    classes: Sequence[str]


@runtime_checkable
class Files(Protocol):
    """A data set that lists the files that it reads: a line for each, with its size and time."""

    def state(self) -> Iterator[str]: ...


@runtime_checkable
class Counting(Protocol):
    """A data set whose labels may be numbers of something, as those of scenes, rather than numbers
    of classes."""

    labels_count: bool


def adapt(dataset: Any, class_names: Sequence[str] | int | None = None) -> Any:
    """Any map-style torch data set as an ImageSet; one of this package as it is. Its items may be
    mappings with "image" and, perhaps, "label" and "caption", or tuples (image, label), or images.
    class_names: the labels' names, or how many there are; by default its `class_names`, or
    torchvision's `classes`."""
    if class_names is None and is_ours(dataset):
        return dataset
    if isinstance(dataset, Subset):
        if type(dataset).__getitem__ is Subset.__getitem__:
            return Taken(adapt(dataset.dataset, class_names), dataset.indices)
        if class_names is None and not isinstance(dataset, ImageSet | HasClasses):
            class_names = adapt(dataset.dataset).class_names
    known = all(hasattr(dataset, name) for name in ("__getitem__", "__len__"))
    if not known or isinstance(dataset, IterableDataset):
        raise ValueError(
            f"a {type(dataset).__name__} has no items by number: give a map-style data set, with "
            "__getitem__ and __len__ (of a DataLoader its dataset), or shards as webdataset_stream"
        )
    return Adapted(dataset, class_names)


def is_ours(dataset: Any) -> bool:
    """Whether a data set is of one of this package's types, whose items need no adapting."""
    return any(kind.__module__.partition(".")[0] == "flextok" for kind in type(dataset).__mro__)


class Adapted(Dataset[dict[str, Any]]):
    """A data set of a user's own. An item that it cannot read raises CorruptPicture."""

    def __init__(self, dataset: Any, class_names: Sequence[str] | int | None = None) -> None:
        self.dataset, self.labels_count = dataset, labels_count(dataset)
        if class_names is None and isinstance(dataset, ImageSet):
            class_names = [str(name) for name in dataset.class_names or ()] or None
        elif class_names is None and isinstance(dataset, HasClasses):
            class_names = [str(name) for name in dataset.classes]
        self.class_names = check_names([UNLABELLED] if class_names is None else class_names)
        self.table = label_table(self.class_names)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            found = self.dataset[index]
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # as Pillow raises
            raise CorruptPicture(f"item {index} of {type(self.dataset).__name__}", error) from None
        if not isinstance(found, Mapping):
            several = found if isinstance(found, tuple | list) else (found,)
            found = dict(zip(("image", "label"), several, strict=False))
        if "image" not in found:
            keys = ", ".join(map(repr, found)) or "nothing"
            raise ValueError(
                f"item {index} of {type(self.dataset).__name__} holds {keys} and no 'image': name "
                "its image so"
            )
        label, names = self.number_of(found.get("label", 0)), self.class_names
        name = names[label] if label in range(len(names)) else ""
        texts = [found[key] for key in ("captions", "caption") if found.get(key) is not None]
        captions = texts_of(texts[0]) if texts else []
        item = captioned(captions, "" if texts else name)
        return {
            "image": found["image"],
            "label": label,
            "key": str(found.get("key", index)),
            **item,
        }

    def number_of(self, label: object) -> int:
        """An item's label as an index into class_names: a name is looked up, and a whole number is
        one, also one beyond them, which what reads classes refuses. NO_CLASS for what is none of
        the classes, and 0 where there are none."""
        if isinstance(label, torch.Tensor | np.generic) and label.ndim == 0:
            label = label.item()
        try:
            label = as_label(label)
        except ValueError:
            label = whole_number(label)
        found = find_class(self.table, label) if isinstance(label, str) else label
        if found is None:
            return 0 if self.class_names == [UNLABELLED] else NO_CLASS
        return found

    def state(self) -> Iterator[str]:
        return state_of(self.dataset)


class Relabelled(Dataset[dict[str, Any]]):
    """A data set whose labels count in other class names."""

    def __init__(self, dataset: Any, class_names: Sequence[str]) -> None:
        self.dataset, self.class_names = dataset, list(class_names)
        self.numbers = renumbering(dataset.class_names, class_names)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.dataset[index]
        label = item["label"]
        known = label in range(len(self.numbers))
        return {**item, "label": self.numbers[label] if known else NO_CLASS}

    def state(self) -> Iterator[str]:
        return state_of(self.dataset)


class Joined(ConcatDataset[dict[str, Any]]):
    """Data sets one after the other; their classes are all that any of them has, by name."""

    def __init__(self, datasets: Sequence[Any]) -> None:
        parts = [adapt(one) for one in datasets]
        self.class_names = union(name for part in parts for name in part.class_names)
        super().__init__([by_name(part, self.class_names) for part in parts])

    def state(self) -> Iterator[str]:
        for part in dict.fromkeys(self.datasets):  # a repeated one once
            yield from state_of(part)


class Taken(Subset[dict[str, Any]]):
    """Some items of a data set."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        super().__init__(dataset, indices)
        self.class_names, self.labels_count = dataset.class_names, labels_count(dataset)

    def state(self) -> Iterator[str]:
        return state_of(self.dataset)


def origins(dataset: Any) -> list[Any]:
    """The data sets that the items of joined, relabelled or taken ones come from."""
    if isinstance(dataset, Joined):
        return [one for part in dataset.datasets for one in origins(part)]
    return origins(dataset.dataset) if isinstance(dataset, Relabelled | Taken) else [dataset]


def by_name(dataset: Any, class_names: Sequence[str]) -> Any:
    """The data set with labels that count in class_names. Raises ValueError as renumbering."""
    dataset = adapt(dataset)
    same = list(dataset.class_names) == list(class_names)
    return dataset if same else Relabelled(dataset, class_names)


def take(dataset: Any, limit: int | None) -> Any:
    """At most `limit` items of a data set, see sample_evenly; None takes all."""
    if limit is None or limit >= len(dataset):
        return dataset
    if limit < 1:
        raise ValueError(f"limit {limit} must be at least 1")
    return Taken(adapt(dataset), sample_evenly(limit, len(dataset)))


def labels_count(dataset: Any) -> bool:
    """Whether a data set's labels are numbers of something, and not just numbers of classes."""
    return isinstance(dataset, Counting) and dataset.labels_count


def state_of(dataset: Any) -> Iterator[str]:
    """The files behind a data set; none are known of one that was made in Python."""
    return dataset.state() if isinstance(dataset, Files) else iter(())


def chosen_items(dataset: Any) -> str:
    """A hash of which items of other data sets these are; "" where they are all of them."""
    parts = dataset.datasets if isinstance(dataset, Joined) else [getattr(dataset, "dataset", None)]
    own = [int(index) for index in dataset.indices] if isinstance(dataset, Taken) else []
    found = [own, *(chosen_items(part) for part in parts if is_ours(part))]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16] if any(found) else ""


def data_files(dataset: Any) -> str:
    """A hash of the names, sizes and times of the files behind a data set."""
    lines = "\n".join(state_of(dataset)).encode("utf-8", "surrogateescape")
    return hashlib.sha256(lines).hexdigest()[:16]
