"""Images of several shapes: each goes to the shape nearest to its proportions, and every training
batch has one shape (aspect ratio bucketing, as diffusion models are trained; Stream.batch)."""

import logging
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from flextok.data.datasets import ImageFolder
from flextok.data.loading import make_loader
from flextok.data.sets import Joined, Relabelled, Taken, origins
from flextok.data.stream import Buckets, Sharded
from flextok.images import as_picture, header_size
from flextok.schema import ConfigError

log = logging.getLogger(__name__)
LIMITS = (0.75, 1.25)  # of a shape's patches, in those of the square: memory and work per batch


class Proportions(Dataset[float]):
    """log(height / width) of each image; 0, a square's, where it cannot be read: training names
    it. Of a picture file just the header is read."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> float:
        dataset, index = origin(self.dataset, index)
        try:
            if isinstance(dataset, ImageFolder):
                width, height = header_size(dataset.root / dataset.paths[index])
            else:
                width, height = as_picture(dataset[index]["image"]).size
        except Exception:  # a decoder may raise anything on a damaged file
            return 0.0
        return math.log(height / width)


def origin(dataset: Any, index: int) -> tuple[Any, int]:
    """The data set that an item of joined, relabelled or taken ones comes from, and its index
    there."""
    while isinstance(dataset, Joined | Relabelled | Taken):
        if isinstance(dataset, Joined):
            part = bisect_right(dataset.cumulative_sizes, index)
            index -= dataset.cumulative_sizes[part - 1] if part else 0
            dataset = dataset.datasets[part]
        else:
            index = dataset.indices[index] if isinstance(dataset, Taken) else index
            dataset = dataset.dataset
    return dataset, index


def sort_into(dataset: Any, shapes: Sequence[tuple[int, int]], num_workers: int = 0) -> Buckets:
    """The shape nearest to each image's proportions. shapes: (H, W), the square first. Raises
    ConfigError for shapes whose numbers of patches differ by more than LIMITS, and for streams."""
    if any(isinstance(part, Sharded) for part in origins(dataset)):
        raise ConfigError(
            "model.shapes sorts the images by their proportions before training, for which shards "
            "would be read as a whole: take a folder or a Hugging Face data set, or leave it out"
        )
    square = shapes[0][0] * shapes[0][1]
    for height, width in shapes:
        if not LIMITS[0] <= height * width / square <= LIMITS[1]:
            raise ConfigError(
                f"model.shapes: {height} x {width} has {height * width / square:.2f} times the "
                f"pixels of {shapes[0][0]} x {shapes[0][1]}; in training {LIMITS[0]} to "
                f"{LIMITS[1]} times, so that batches take about equal work and memory"
            )
    loader = make_loader(Proportions(dataset), num_workers, batch_size=256)
    logs = torch.cat(list(tqdm(loader, desc="image sizes", disable=None)))
    own = torch.tensor([math.log(height / width) for height, width in shapes], dtype=logs.dtype)
    numbers = (logs[:, None] - own).abs().argmin(dim=1).numpy()
    counts = Counter(numbers.tolist())
    found = ", ".join(f"{counts[i]} of {h} x {w}" for i, (h, w) in enumerate(shapes))
    log.info("training images by shape (height x width): %s", found)
    return Buckets(list(shapes), numbers)
