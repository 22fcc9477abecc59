"""Fashion-MNIST (arXiv 1708.07747): 60,000 training and 10,000 test images of clothes in shades of
grey, 28 px, ten classes, MIT licence."""

import gzip
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import torchvision
from PIL import Image
from torch.utils.data import Dataset

from flextok.data.shards import state_of

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts the files
BELOW = "FashionMNIST/raw"  # where torchvision puts them in its root
PREFIX = {"train": "train", "test": "t10k"}  # of the file names of each split
SIDE = 28


class FashionMNIST(Dataset[dict[str, Any]]):
    """Items: image PIL RGB 28 x 28 (light clothes on black), label int, caption (the class name),
    key.

    The files are looked for in `root`, in torchvision's folder below it (FashionMNIST/raw) and
    where Debian's package dataset-fashion-mnist puts them; gzip-compressed files are read too. Only
    if they are in none of these places does torchvision download them into `root`."""

    class_names = tuple(torchvision.datasets.FashionMNIST.classes)  # T-shirt/top ... Ankle boot

    def __init__(
        self, root: str | Path = "data", split: str = "train", limit: int | None = None
    ) -> None:
        """split: train or test. limit: take only so many images, the first ones; the files are in
        random order. Raises ValueError where the files cannot be found or are damaged."""
        if split not in PREFIX:
            raise ValueError(f"split={split!r} must be one of {', '.join(PREFIX)}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit} must be at least 1, or null for all images")
        folder = find_folder(Path(root).expanduser(), split)
        self.split, (images, labels) = split, split_files(folder, split)
        self.files = [images, labels]
        self.pixels = read_idx(images, (SIDE, SIDE))[:limit]  # (n, 28, 28) uint8, 255 = light
        self.labels = read_idx(labels, ())[:limit].tolist()
        if len(self.labels) != len(self.pixels):
            raise ValueError(
                f"{images} and {labels} hold {len(self.pixels)} images and {len(self.labels)} "
                "labels: take both files from one source"
            )
        if wrong := [n for n in self.labels if n >= len(self.class_names)]:
            raise ValueError(f"{labels} holds the label {wrong[0]}: classes are 0 to 9")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = self.labels[index]
        return {
            "image": Image.fromarray(self.pixels[index]).convert("RGB"),
            "label": label,
            "caption": self.class_names[label],
            "key": f"{self.split}-{index}",
        }

    def state(self) -> Iterator[str]:
        for path in self.files:
            yield f"{path.name} {state_of(path)}"


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split's images and labels in a folder, plain or compressed, that are there."""
    names = (f"{PREFIX[split]}-images-idx3-ubyte", f"{PREFIX[split]}-labels-idx1-ubyte")
    found = []
    for name in names:
        both = (folder / name, folder / f"{name}.gz")
        found += [path for path in both if os.path.isfile(path)][:1]  # False where it may not look
    return found


def stored_folder(root: str | Path, split: str = "train") -> Path | None:
    """The folder on this machine with the files of a split, None where none has them."""
    root = Path(root).expanduser()
    for folder in (root, root / BELOW, DEBIAN):
        if len(split_files(folder, split)) == 2:
            return folder
    return None


def find_folder(root: Path, split: str) -> Path:
    """As stored_folder, but the files are downloaded where no folder has them."""
    if folder := stored_folder(root, split):
        return folder
    try:
        torchvision.datasets.FashionMNIST(root, download=True)
    except (RuntimeError, URLError, OSError) as error:
        raise ValueError(
            f"Fashion-MNIST is neither in root={str(root)!r} nor in {DEBIAN}, and could not be "
            f"downloaded ({' '.join(str(error).split())}): connect to the network, or install "
            "Debian's package dataset-fashion-mnist, or name the folder of the four files as root"
        ) from error
    return root / BELOW


def read_idx(path: Path, item_shape: tuple[int, ...]) -> np.ndarray:
    """The array (n, *item_shape) of bytes in an idx file: two zeros, the type (8 = bytes), the
    number of dimensions, the sizes as big-endian 32-bit numbers, then the values."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}): get it again") from None
    ndim = 1 + len(item_shape)
    start = 4 + 4 * ndim
    sizes = tuple(np.frombuffer(data[4:start].ljust(4 * ndim, b"\0"), ">u4").tolist())
    whole = data[:4] == bytes((0, 0, 8, ndim)) and sizes[1:] == item_shape
    if not whole or not sizes[0] or len(data) != start + math.prod(sizes):
        packed = path.with_name(f"{path.name}.gz")
        remedy = f"remove it, and {packed.name} is read" if packed.exists() else "get it again"
        raise ValueError(
            f"{path} is no whole idx file of bytes in the shape (n, "
            f"{', '.join(map(str, item_shape))}): {remedy}"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(sizes)
