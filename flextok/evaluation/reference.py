"""A reference for FID and its kin, other than the evaluated images: a data set, the ADM evaluator's
.npz (guided-diffusion), or one of our own.

ADM's holds `mu` and `sigma` of Inception's features over the whole training set and, as `arr_0`,
ten thousand images for precision and recall. Ours states besides what it was made of.
"""

import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

import flextok
from flextok.data.parts import PartStore
from flextok.evaluation.distances import Statistics, statistics
from flextok.evaluation.features import FeatureNetwork, file_hash
from flextok.files import atomic_write

FACTS = ("count", "image_size", "network", "weights")  # that our files state
# what zipfile and numpy raise; ValueErrors say what they are of
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, OSError, NotImplementedError)
BATCH = 32  # ADM's file is 2 GB: its images are read a few at a time


class Reference:
    """Statistics from a file, checked against the network and the image size they are used for.

    Raises ValueError for a file that cannot be right: not an .npz, another network, another image
    size, values that are not finite. What cannot be known is in `warnings`."""

    def __init__(self, path: str | Path, network: FeatureNetwork, image_size: int):
        self.path, self.network = Path(path), network
        self.warnings: list[str] = []
        if not self.path.is_file() or not zipfile.is_zipfile(self.path):
            raise ValueError(f"reference {path} is not an .npz file: give ADM's or one of ours")
        self.hash = file_hash(self.path)
        with damage_named(self.path), np.load(self.path, allow_pickle=False) as file:
            names = set(file.files)
            facts = {k: file[k].item() for k in FACTS if k in file}
            moments = (file["mu"], file["sigma"]) if {"mu", "sigma"} <= names else None
        source = (facts.get("network", "inception"), facts.get("weights", network.weights))
        if "mu" in names and source != (network.name, network.weights):
            raise ValueError(
                f"reference {path} holds features of {source[0]} (weights {source[1]}), not of "
                f"{network.name} (weights {network.weights})"
            )
        self.images = self._images_shape() if "arr_0" in names else None
        size = facts.get("image_size", self.images[1] if self.images else None)
        if size is None:
            self.warnings.append(
                f"reference {path} does not state its image size and crop: unchecked"
            )
        elif int(size) != image_size:
            raise ValueError(
                f"reference {path} is of {size} px images, the model's have {image_size} px: "
                "scores against it would mean nothing"
            )
        if moments is not None:
            self.statistics = self._checked(*moments, facts.get("count"))
        elif self.features is not None:
            self.statistics = statistics(self.features)
        else:
            raise ValueError(f"reference {path} holds neither mu and sigma nor images (arr_0)")
        if (count := self.statistics.count) is None:
            self.warnings.append(f"reference {path} does not state how many images it is made of")
        elif few := few_images(f"reference {path}", count, len(self.statistics.mean)):
            self.warnings.append(few)

    def _checked(self, mean: np.ndarray, covariance: np.ndarray, count: int | None) -> Statistics:
        dim = mean.shape[0] if mean.ndim == 1 else -1
        if covariance.shape != (dim, dim):
            raise ValueError(
                f"reference {self.path}: mu {mean.shape} and sigma {covariance.shape} must be (D,) "
                "and (D, D)"
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError(f"reference {self.path} holds values that are not finite: damaged")
        if not np.allclose(covariance, covariance.T, rtol=1e-3, atol=1e-6):
            raise ValueError(f"reference {self.path}: sigma is not symmetric, so no covariance")
        mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
        return Statistics(mean, covariance, None if count is None else int(count))

    def _images_shape(self) -> tuple[int, ...]:
        opened = zipfile.ZipFile(self.path)
        with damage_named(self.path), opened as archive, archive.open("arr_0.npy") as stream:
            shape, dtype = read_header(stream)
        if len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3 or dtype != np.uint8:
            raise ValueError(
                f"reference {self.path}: arr_0 is {dtype} {shape}, expected uint8 (n, H, H, 3)"
            )
        return shape

    @cached_property
    def features(self) -> Tensor | None:
        """Features of the stored images, (n, D); None where there are none."""
        if self.images is None:
            return None
        number, *shape = self.images
        pixels, rows = int(np.prod(shape)), []
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as stream:
            read_header(stream)
            for start in range(0, number, BATCH):
                size = min(BATCH, number - start)
                with damage_named(self.path):
                    flat = np.frombuffer(stream.read(size * pixels), dtype=np.uint8)
                    if len(flat) < size * pixels:
                        raise EOFError("arr_0 ends too early")
                batch = torch.from_numpy(flat.reshape(size, *shape).copy()).movedim(-1, 1)
                rows.append(self.network(batch).pooled.cpu())
        return torch.cat(rows)


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Makes what reading a damaged .npz raises ValueErrors that name it."""
    try:
        yield
    except DAMAGE as error:
        raise ValueError(f"reference {path} is damaged: {error}") from None


class MeasuredReference:
    """A data set as a reference: the features that were measured of its images."""

    def __init__(self, name: str, rows: PartStore, network: str):
        """name: of the data set; rows: with a column for the network."""
        self.path, self.rows, self.network = name, rows, network

    @cached_property
    def features(self) -> Tensor:
        """(n, D)."""
        return self.rows.column(f"real/{self.network}")[:]

    @cached_property
    def statistics(self) -> Statistics:
        return statistics(self.features)

    @property
    def hash(self) -> str:
        """A hash of the images themselves."""
        return hash_of_images(self.rows)

    @property
    def warnings(self) -> list[str]:
        few = few_images(f"reference {self.path}", *self.features.shape)
        return [few] if few else []


def hash_of_images(rows: PartStore) -> str:
    """A hash of the images behind rows, from the hashes of each."""
    pixels = rows.column("real/hash")[:].numpy()
    return hashlib.sha256(pixels.tobytes()).hexdigest()[:16]


def read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    formats = np.lib.format
    major, _ = formats.read_magic(stream)
    read = formats.read_array_header_1_0 if major == 1 else formats.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if fortran:
        raise ValueError("arr_0 is stored in Fortran order: save it again with np.savez")
    return shape, dtype


def save_reference(
    path: str | Path, stats: Statistics, network: FeatureNetwork, image_size: int, data: str
) -> Path:
    """Write statistics as a file that Reference reads."""
    path = check_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"count": stats.count, "image_size": image_size, "data": data}
    facts |= {"network": network.name, "weights": network.weights}
    facts["flextok_version"] = flextok.__version__

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # a name without .npz would get it appended
            np.savez(file, mu=stats.mean, sigma=stats.covariance, **facts)

    atomic_write(path, write)
    return path


def check_suffix(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"reference {path} must end in .npz")
    return path


def few_images(what: str, count: int, dim: int) -> str | None:
    if count > dim:
        return None
    return (
        f"{what}: {count} images for {dim} features; below that number the covariance is "
        "singular and the Frechet distance is biased upwards"
    )
