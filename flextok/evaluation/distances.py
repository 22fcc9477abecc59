"""Distances between sets of pictures, from a network's features; statistics in float64.

`Rows` are feature vectors, (n, D) in all: a tensor, or a column of records that reads them from
disk as they are asked for. None of these functions holds more than a few thousand rows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

BLOCK = 1024  # rows in memory at once
NEIGHBOURS = 3  # of precision and recall
MANIFOLD = 10_000  # rows a side in precision and recall, whose cost is quadratic (ADM's number)


class Rows(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, which: Any) -> Tensor: ...  # a slice, or an array of positions


def blocks(rows: Rows) -> Iterator[Tensor]:
    """The rows in order, (up to BLOCK, D) float64 at a time."""
    for start in range(0, len(rows), BLOCK):
        yield rows[start : start + BLOCK].double()


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features."""

    mean: Tensor  # (D,) float64
    covariance: Tensor  # (D, D) float64
    count: int | None  # pictures; None where a file does not say

    @cached_property
    def root(self) -> Tensor:
        """The covariance's symmetric square root."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def statistics(rows: Rows) -> Statistics:
    """Two passes: the mean, then the unbiased covariance around it."""
    count = len(rows)
    if count < 2:
        raise ValueError(f"{count} picture(s): a distance between sets needs at least 2")
    mean = sum((block.sum(dim=0) for block in blocks(rows)), torch.zeros(())) / count
    if not mean.isfinite().all():
        raise ValueError("some features are not finite: the network or the pictures are damaged")
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for block in blocks(rows):
        centred = block - mean
        covariance += centred.T @ centred
    return Statistics(mean, covariance / (count - 1), count)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2) (Heusel et al., arXiv 1706.08500)."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"features of {len(a.mean)} and of {len(b.mean)} dimensions cannot be compared: both "
            "sides need the same network"
        )
    # the eigenvalues of S_a S_b are those of the symmetric S_b^1/2 S_a S_b^1/2
    product = b.root @ a.covariance @ b.root
    overlap = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    spread = a.covariance.trace() + b.covariance.trace() - 2 * overlap
    return float((a.mean - b.mean).square().sum() + spread)


def kernel_distance(
    generated: Rows, real: Rows, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """KID (arXiv 1801.01401): unbiased squared MMD under (x y / D + 1)^3. Returns the mean and the
    standard deviation over random subsets, torch-fidelity's draws; sets smaller than a subset are
    taken whole."""
    size = min(subset_size, len(generated), len(real))
    if size < 2:
        raise ValueError("a kernel distance needs at least 2 pictures a side")
    if size == len(generated) == len(real):
        subsets = 1  # they would all be the same
    draws = np.random.RandomState(seed)
    distances = []
    for _ in range(subsets):
        x = generated[draws.choice(len(generated), size, replace=False)].double()
        y = real[draws.choice(len(real), size, replace=False)].double()
        within = sum(k.sum() - k.trace() for k in (cubic_kernel(x, x), cubic_kernel(y, y)))
        distances.append(float(within / (size * (size - 1)) - 2 * cubic_kernel(x, y).mean()))
    return float(np.mean(distances)), float(np.std(distances))


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def precision_recall(
    generated: Rows, real: Rows, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Kynkaanniemi et al. (arXiv 1904.06991): the share of generated pictures within the real ones'
    manifold, and of real ones within the generated ones'; a picture covers the ball that reaches
    its third neighbour. Larger sets are thinned evenly to MANIFOLD."""
    if min(len(generated), len(real)) <= neighbours:
        raise ValueError(f"precision and recall need more than {neighbours} pictures a side")
    fake, true = Thinned(generated, MANIFOLD), Thinned(real, MANIFOLD)
    return covered(fake, true, neighbours), covered(true, fake, neighbours)


class Thinned:
    """At most `size` rows of others, evenly spread: a folder may be sorted by class."""

    def __init__(self, rows: Rows, size: int):
        number = min(size, len(rows))
        self.rows, self.positions = rows, np.arange(number) * len(rows) // number

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, which: Any) -> Tensor:
        return self.rows[self.positions[which]]


def covered(points: Rows, centres: Rows, neighbours: int) -> float:
    """The share of points that lie in the ball of any centre."""
    inside = [torch.zeros(len(block), dtype=torch.bool) for block in blocks(points)]
    for centre in blocks(centres):
        nearest = torch.full((len(centre), neighbours + 1), math.inf, dtype=torch.float64)
        for other in blocks(centres):
            both = torch.cat([nearest, torch.cdist(centre, other)], dim=1)
            nearest = both.topk(neighbours + 1, largest=False).values
        radius = nearest[:, -1]  # the nearest of all is the centre itself
        for found, block in zip(inside, blocks(points), strict=True):
            found |= (torch.cdist(block, centre) <= radius).any(dim=1)
    return float(torch.cat(inside).double().mean())


def shuffled_splits(count: int, splits: int = 10, seed: int = 2020) -> np.ndarray:
    """torch-fidelity's split of each of `count` pictures, (count,): ten, after a seeded shuffle."""
    order = np.random.RandomState(seed).permutation(count)
    splits = min(splits, count)
    split = np.empty(count, dtype=np.int64)
    for i in range(splits):
        split[order[i * count // splits : (i + 1) * count // splits]] = i
    return split


def chunks_in_order(count: int, size: int = 5000) -> np.ndarray:
    """ADM's split of each of `count` pictures, (count,): chunks of 5,000 as they come."""
    return np.arange(count) // size


def class_score(logits: Rows, split: np.ndarray) -> tuple[float, float]:
    """The inception score (arXiv 1606.03498), exp of the mean KL(p(y|x) || p(y)), where the logits
    are Inception's. Returns mean and standard deviation over splits; split: (n,), from 0."""
    groups = torch.from_numpy(split)
    number, start = int(groups.max()) + 1, 0
    negative_entropy = torch.zeros(number, dtype=torch.float64)
    mean: Tensor | None = None
    for block in blocks(logits):
        here = groups[start : start + len(block)]
        log_p = block.log_softmax(dim=1)
        p = log_p.exp()
        if mean is None:
            mean = torch.zeros(number, p.shape[1], dtype=torch.float64)
        mean.index_add_(0, here, p)
        negative_entropy.index_add_(0, here, (p * log_p).sum(dim=1))
        start += len(block)
    assert mean is not None, "the score of no pictures"
    sizes = torch.bincount(groups, minlength=number).double()
    mean = mean / sizes[:, None]
    scores = (negative_entropy / sizes - torch.xlogy(mean, mean).sum(dim=1)).exp()
    return float(scores.mean()), float(scores.std(correction=0))
