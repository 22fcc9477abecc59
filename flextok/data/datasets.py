"""Data sets that read a user's own pictures, and their names in configs.

Each is an ImageSet (flextok/data/sets.py) whose images are PIL images in mode RGB. What cannot be
read raises CorruptPicture; training skips and counts it. state() yields a line for each file that
is read, with its size and time: a cache is refused when they change.
"""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from flextok.data.labels import (
    as_label,
    captioned,
    check_names,
    index_labels,
    label_table,
    list_names,
    texts_of,
)
from flextok.data.pictures import (
    EXTENSIONS,
    UNLABELLED,
    CorruptPicture,
    list_pictures,
    load_picture,
    read_text_file,
)
from flextok.data.shards import state_of
from flextok.data.web import WebDatasetImages, WebDatasetStream
from flextok.schema import find_name


class ImageFolder(Dataset[dict[str, Any]]):
    """Pictures under a folder, at any depth; the top folder's name is the class.

    A flat folder is one class, "unlabelled". The caption is the text of `<picture>.txt` beside the
    picture, else the class name. Give class_names where a folder (a validation set, say) may lack
    some of the classes.
    """

    def __init__(
        self,
        root: str | Path,
        label_from: str = "folder",
        extensions: Sequence[str] = EXTENSIONS,
        class_names: Sequence[str] | None = None,
    ) -> None:
        """label_from: folder or none (a single class). extensions: with the dot, any case."""
        if label_from not in ("folder", "none"):
            raise ValueError(f"label_from={label_from!r} must be folder or none")
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise ValueError(f"root={str(root)!r} is not a folder; give the folder of the pictures")
        endings = tuple(e.lower() for e in extensions)
        self.paths = [path.relative_to(self.root) for path in list_pictures(self.root, endings)]
        if not self.paths:
            raise ValueError(f"root={str(root)!r} holds no pictures ({', '.join(endings)})")
        flat = label_from == "none" or all(len(path.parts) == 1 for path in self.paths)
        if not flat and (loose := [p for p in self.paths if len(p.parts) == 1]):
            raise ValueError(
                f"root={str(root)!r} holds pictures beside its class folders, {loose[0]} for one; "
                "move them into a folder or set label_from=none"
            )
        # accents in one form, in which most systems write them
        folders = [unicodedata.normalize("NFC", path.parts[0]) for path in self.paths]
        labels = [UNLABELLED] * len(folders) if flat else folders
        # a folder's name is a name, even if it looks like a number
        names = sorted(set(labels)) if class_names is None else check_names(class_names)
        known = label_table(names)
        table = {label: find_name(known, label) for label in dict.fromkeys(labels)}
        if unknown := [label for label, number in table.items() if number is None]:
            raise ValueError(
                f"root={str(root)!r}: the folder {unknown[0]!r} is none of the "
                f"{list_names(names)}; rename or move it, or add it to class_names"
            )
        self.class_names = names
        self.labels: list[int] = [table[label] for label in labels]  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, label = self.root / self.paths[index], self.labels[index]
        text = path.with_suffix(".txt")
        caption = read_text_file(text) if text.is_file() else ""
        return {
            "image": load_picture(path),
            "label": label,
            **captioned([caption], self.class_names[label]),
            "key": self.paths[index].as_posix(),
        }

    def state(self) -> Iterator[str]:
        for path in self.paths:
            for file in (self.root / path, (self.root / path).with_suffix(".txt")):
                yield f"{path.as_posix()} {state_of(file)}"


class PictureFiles(Dataset[dict[str, Any]]):
    """Named picture files, and those in named folders, without labels."""

    class_names = (UNLABELLED,)

    def __init__(self, names: Sequence[str | Path]) -> None:
        self.paths: list[Path] = []
        for path in map(Path, names):
            found = list_pictures(path, EXTENSIONS) if path.is_dir() else [path]
            self.paths += found
        if not self.paths:
            raise ValueError(f"no pictures in {', '.join(map(str, names))}")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        return {"image": load_picture(path), "label": 0, "caption": path.stem, "key": str(path)}


class HuggingFaceImages(Dataset[dict[str, Any]]):
    """An image data set of the Hugging Face hub, or a folder written by its save_to_disk."""

    def __init__(
        self,
        path: str,
        split: str | None = None,
        config: str | None = None,
        image_column: str = "image",
        label_column: str | None = "label",
        caption_column: str | None = None,
    ) -> None:
        """split: train by default, or the only one of a saved folder. config: the hub's name of a
        variant. label_column None: a single class."""
        try:
            import datasets
        except ImportError as error:
            raise ValueError(
                "Hugging Face data sets need the package datasets: pip install flextok[data]"
            ) from error
        table, split = load_huggingface(datasets, path, split, config)
        for column in (image_column, label_column, caption_column):
            if column is not None and column not in table.column_names:
                known = ", ".join(table.column_names)
                raise ValueError(f"column {column!r} is not in {path!r}; its columns: {known}")
        if len(table) == 0:
            raise ValueError(f"split={split!r} of {path!r} is empty")
        self.fingerprint: str = table._fingerprint  # datasets has no other name for it
        # undecoded: load_picture treats alpha, EXIF and damage alike for every data set
        self.table = table.cast_column(image_column, datasets.Image(decode=False))
        self.path, self.split = path, split
        self.image_column, self.caption_column = image_column, caption_column
        labels: list[Any] = [UNLABELLED] * len(table)
        if label_column is not None:
            labels = list(table[label_column])
        kind = table.features.get(label_column)
        names = kind.names if isinstance(kind, datasets.ClassLabel) else None
        if names is not None:  # its numbers are indices, whatever the names look like
            labels = [names[n] if n is not None and 0 <= n < len(names) else n for n in labels]
        try:
            self.class_names, self.labels = index_labels([as_label(v) for v in labels], names)
        except ValueError as error:
            raise ValueError(f"column {label_column!r} of {path!r}: {error}") from None

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, label = self.table[index], self.labels[index]
        key = f"{self.split}-{index}"
        picture = row[self.image_column]
        if picture is None:
            raise CorruptPicture(f"{self.path} {key}", "no picture")
        source = picture["path"] if picture["bytes"] is None else picture["bytes"]
        try:
            captions = texts_of(row.get(self.caption_column))
        except ValueError as error:
            raise CorruptPicture(f"{self.path} {key}", error) from None
        return {
            "image": load_picture(source, f"{self.path} {key}"),
            "label": label,
            **captioned(captions, self.class_names[label]),
            "key": key,
        }

    def state(self) -> Iterator[str]:
        yield self.fingerprint
        if Path(self.path).expanduser().is_dir():  # written again, it may keep its fingerprint
            yield from (state_of(file["filename"]) for file in self.table.cache_files)


DATASETS: dict[str, Callable[..., Dataset[dict[str, Any]]]] = {
    "folder": ImageFolder,
    "huggingface": HuggingFaceImages,
    "webdataset": WebDatasetImages,
    "webdataset_stream": WebDatasetStream,
}


def load_huggingface(
    datasets: Any, path: str, split: str | None, config: str | None
) -> tuple[Any, str]:
    """The split of a saved folder, if path is one, else of what load_dataset finds; and its name.
    Raises ValueError for one that is not there, or not known to be that one."""
    folder = Path(path).expanduser()
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        if config is not None:
            raise ValueError(f"config={config!r} is of the hub: {path!r} is a saved folder of one")
        saved = datasets.load_from_disk(str(folder))
        if not isinstance(saved, dict):
            known = str(saved.split or "")
            if split not in (None, known):
                stated = f"holds the split {known}" if known else "states no split"
                raise ValueError(f"split={split!r}: {path!r} {stated}; leave split out to take it")
            return saved, known or "train"
        if (name := split or "train") not in saved:
            raise ValueError(f"split={name!r} is not in {path!r}, which has {', '.join(saved)}")
        return saved[name], name
    split = split or "train"
    try:
        return datasets.load_dataset(path, config, split=split, trust_remote_code=False), split
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # the library names what it knows
        raise ValueError(f"path={path!r}, split={split!r}, config={config!r}: {error}") from error
