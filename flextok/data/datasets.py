"""The registry of data sets, and those that read a user's own pictures.

Every data set is map-style, has `class_names`, and gives the same item: image (PIL RGB), label
(int, an index into class_names), caption (str), key (str). What cannot be read raises
CorruptPicture; the stream skips and counts it. A new data set is one class here and one line in
DATASETS.
"""

import glob
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Subset
from webdataset.shardlists import expand_urls

from flextok.data.emoji import Emoji, EmojiScenes
from flextok.data.pictures import UNLABELLED, CorruptPicture, list_pictures, load_picture

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")


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
        labels = [UNLABELLED if flat else path.parts[0] for path in self.paths]
        self.class_names, self.labels = index_labels(labels, class_names)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, label = self.root / self.paths[index], self.labels[index]
        text = path.with_suffix(".txt")
        caption = text.read_text("utf-8", "replace").strip() if text.is_file() else ""
        return {
            "image": load_picture(path),
            "label": label,
            "caption": caption or self.class_names[label],
            "key": self.paths[index].as_posix(),
        }


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
        split: str = "train",
        config: str | None = None,
        image_column: str = "image",
        label_column: str | None = "label",
        caption_column: str | None = None,
    ) -> None:
        """config: the hub's name of a variant. label_column None: a single class."""
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                "Hugging Face data sets need the package datasets: pip install flextok[data]"
            ) from error
        table = load_huggingface(datasets, path, split, config)
        for column in (image_column, label_column, caption_column):
            if column is not None and column not in table.column_names:
                known = ", ".join(table.column_names)
                raise ValueError(f"column {column!r} is not in {path!r}; its columns: {known}")
        if len(table) == 0:
            raise ValueError(f"split={split!r} of {path!r} is empty")
        # undecoded: load_picture treats alpha, EXIF and damage alike for every data set
        self.table = table.cast_column(image_column, datasets.Image(decode=False))
        self.path, self.split = path, split
        self.image_column, self.caption_column = image_column, caption_column
        labels = [UNLABELLED] * len(table) if label_column is None else list(table[label_column])
        names = getattr(table.features.get(label_column), "names", None)  # of a ClassLabel
        self.class_names, self.labels = index_labels(labels, names)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, label = self.table[index], self.labels[index]
        key = f"{self.split}-{index}"
        picture = row[self.image_column]
        if picture is None:
            raise CorruptPicture(f"{self.path} {key}", "no picture")
        source = picture["path"] if picture["bytes"] is None else picture["bytes"]
        caption = row[self.caption_column] if self.caption_column is not None else None
        if isinstance(caption, list):  # several captions of one picture
            caption = caption[0] if caption else None
        return {
            "image": load_picture(source, f"{self.path} {key}"),
            "label": label,
            "caption": caption or self.class_names[label],
            "key": key,
        }


class WebDatasetImages(Dataset[dict[str, Any]]):
    """Local WebDataset shards (tar), read at random: each is indexed once, by member offset.

    Keys are alternatives joined by ";", the first that a sample has counts: an extension ("cls") or
    a field of its .json. Labels are class numbers or class names.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        image_key: str = "jpg;jpeg;png;webp",
        label_key: str | None = "cls;label",
        caption_key: str = "txt;caption",
        class_names: Sequence[str] | None = None,
    ) -> None:
        """urls: paths, with {000..012} or * where there are many. label_key None: one class."""
        self.shards = expand_shards(urls)
        self.caption_key = caption_key
        self.keys: list[str] = []
        rows: list[tuple[int, ...]] = []
        labels: list[int | str] = []
        for number, shard in enumerate(self.shards):
            for key, members in read_index(shard):
                image = next((members[k] for k in image_key.split(";") if k in members), (0, -1))
                label = UNLABELLED if label_key is None else find(shard, members, label_key)
                if label is None:
                    raise ValueError(
                        f"label_key={label_key!r} is not in {shard}: {key}, which has "
                        f"{', '.join(members)}; name another or set label_key to null"
                    )
                text = members.get(next((k for k in caption_key.split(";") if k in members), ""))
                field = members.get("json")
                self.keys.append(key)
                labels.append(label)
                rows.append((number, *image, *(text or (0, -1)), *(field or (0, -1))))
        # arrays, not objects: a data set of millions is shared between workers without copies
        self.table = np.array(rows, dtype=np.int64).reshape(-1, 7)
        if (self.table[:, 2] < 0).all():
            raise ValueError(f"image_key={image_key!r} is in no sample of urls={urls!r}")
        self.class_names, self.labels = index_labels(labels, class_names)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard = self.shards[self.table[index, 0]]
        offsets = self.table[index, 1:].reshape(3, 2).tolist()
        image, text, field = (None if size < 0 else (offset, size) for offset, size in offsets)
        key, label = self.keys[index], self.labels[index]
        name = f"{shard}: {key}"
        if image is None:
            raise CorruptPicture(name, "the sample holds no picture")
        caption = ""
        if text is not None:
            caption = read_member(shard, text).decode("utf-8", "replace").strip()
        elif field is not None:
            caption = str(find(shard, {"json": field}, self.caption_key) or "")
        return {
            "image": load_picture(read_member(shard, image), name),
            "label": label,
            "caption": caption or self.class_names[label],
            "key": key,
        }


DATASETS: dict[str, Callable[..., Dataset[dict[str, Any]]]] = {
    "emoji": Emoji,
    "emoji_scenes": EmojiScenes,
    "folder": ImageFolder,
    "huggingface": HuggingFaceImages,
    "webdataset": WebDatasetImages,
}


def take(dataset: Any, limit: int | None) -> Any:
    """At most `limit` items of a data set, evenly spread; None takes all."""
    if limit is None or limit >= len(dataset):
        return dataset
    if limit < 1:
        raise ValueError(f"limit {limit} must be at least 1")
    chosen: Any = Subset(dataset, [i * len(dataset) // limit for i in range(limit)])
    chosen.class_names = dataset.class_names
    return chosen


def index_labels(
    labels: Sequence[int | str], class_names: Sequence[str] | None
) -> tuple[list[str], list[int]]:
    """Class names (given, or found and sorted) and the label of every sample as their index."""
    numbers = {label for label in labels if isinstance(label, int)}
    if class_names is None:
        words = sorted({label for label in labels if isinstance(label, str)})
        class_names = [str(i) for i in range(max(numbers) + 1)] if numbers else words
    names = list(class_names)
    table: dict[int | str, int] = {name: i for i, name in enumerate(names)}
    table |= {i: i for i in range(len(names))}
    if unknown := [label for label in dict.fromkeys(labels) if label not in table]:
        raise ValueError(
            f"label {unknown[0]!r} is none of the {len(names)} classes {', '.join(names[:9])}"
            f"{', ...' if len(names) > 9 else ''}; mend it, name another column, key or folder, "
            "or leave the labels out"
        )
    return names, [table[label] for label in labels]


def load_huggingface(datasets: Any, path: str, split: str, config: str | None) -> Any:
    """The split of a saved folder, if path is one, else of what load_dataset finds."""
    folder = Path(path).expanduser()
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        saved = datasets.load_from_disk(str(folder))
        splits = saved if isinstance(saved, dict) else {str(saved.split or split): saved}
        if split not in splits:
            raise ValueError(f"split={split!r} is not in {path!r}, which has {', '.join(splits)}")
        return splits[split]
    try:
        return datasets.load_dataset(path, config, split=split)
    except (ValueError, FileNotFoundError) as error:  # the library names what it knows
        raise ValueError(f"path={path!r}, split={split!r}, config={config!r}: {error}") from error


def expand_shards(urls: str | Sequence[str]) -> list[str]:
    """Braces and globs to local files, in order."""
    shards: list[str] = []
    given = [urls] if isinstance(urls, str) else urls
    for url in (expanded for one in given for expanded in expand_urls(one)):
        if "://" in url or url.startswith("pipe:"):
            raise ValueError(f"urls={url!r} is remote, which is not supported yet; download it")
        path = str(Path(url).expanduser())
        found = sorted(glob.glob(path)) or ([path] if Path(path).is_file() else [])
        if not found:
            raise ValueError(f"urls={url!r} matches no file")
        shards += found
    if not shards:
        raise ValueError(f"urls={urls!r} names no shard")
    return shards


Span = tuple[int, int]  # offset and size in the shard


def read_index(shard: str) -> Iterator[tuple[str, dict[str, Span]]]:
    """(key, extension -> span) of each sample: consecutive members with one name up to the dot."""
    key, members = "", dict[str, Span]()
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                match = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]+)", member.name)
                if not member.isfile() or match is None:
                    continue
                stem, extension = match[1], match[2].lower()
                if stem != key:
                    if members:
                        yield key, members
                    key, members = stem, {}
                members[extension] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ValueError(f"{shard} is no readable, uncompressed tar: {error}") from error
    if members:
        yield key, members


def read_member(shard: str, span: Span) -> bytes:
    """Opened anew for each read: nothing to share between, or to send to, worker processes."""
    with open(shard, "rb") as file:
        file.seek(span[0])
        return file.read(span[1])


def find(shard: str, members: dict[str, Span], keys: str) -> int | str | None:
    """The value of the first of keys that is a member of the sample or a field of its .json."""
    fields: dict[str, Any] = {}
    if "json" in members:
        try:
            fields = json.loads(read_member(shard, members["json"]))
        except ValueError as error:
            raise ValueError(f"{shard}: unreadable .json at byte {members['json'][0]}") from error
    for key in keys.split(";"):
        if key in members:
            text = read_member(shard, members[key]).decode("utf-8", "replace").strip()
            return int(text) if re.fullmatch(r"-?\d+", text) else text
        if fields.get(key) is not None:
            return fields[key] if isinstance(fields[key], int | str) else str(fields[key])
    return None
