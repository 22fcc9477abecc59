"""Mean and deviation of a data set's pixels, from a sample of it."""

import math
from typing import Any

import numpy as np

from flextok.data.pictures import CorruptPicture
from flextok.data.transforms import ImageTransform
from flextok.data.web import WebDatasetStream
from flextok.draws import sample_evenly


def measure_pixels(dataset: Any, size: int, limit: int = 1000) -> tuple[float, float, int]:
    """Mean and deviation of at most `limit` pictures as they are evaluated, (3, size, size) in
    [-1, 1], and how many were read: evenly spread over the data set, or from the beginnings of
    evenly spread shards of a stream. Raises ValueError where none can be read."""
    transform, total, squares, count = ImageTransform(size), 0.0, 0.0, 0
    for index in sample_of(dataset, limit):
        try:
            pixels = transform(dataset[index]["image"]).double()
        except CorruptPicture:
            continue  # training names it
        total += float(pixels.mean())
        squares += float(pixels.square().mean())
        count += 1
    if not count:
        raise ValueError("none of the training pictures that were tried can be read")
    mean = total / count
    return mean, math.sqrt(max(0.0, squares / count - mean**2)), count


def sample_of(dataset: Any, limit: int) -> list[int]:
    """Ascending indices."""
    if not isinstance(dataset, WebDatasetStream):
        return sample_evenly(min(limit, len(dataset)), len(dataset))
    counts, shards = dataset.counts, len(dataset.counts)
    firsts, number = (np.asarray(dataset.ends) - np.asarray(counts)).tolist(), min(8, shards)
    while True:
        chosen, each = sample_evenly(number, shards), math.ceil(limit / number)
        found = [firsts[s] + i for s in chosen for i in range(min(each, counts[s]))]
        if len(found) >= limit or number == shards:
            return [found[i] for i in sample_evenly(min(limit, len(found)), len(found))]
        number = min(2 * number, shards)
