"""Distances between two sets of images, from a network's features of them: torch-fidelity's own
functions, in float64. Features are (n, D) tensors, logits (n, classes)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flextok.draws import sample_evenly

NEIGHBOURS = 3  # of precision and recall
MANIFOLD = 10_000  # rows a side in precision and recall, whose cost is quadratic (ADM's number)
KID_SUBSET = 1000
ADM_CHUNK = 5000


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features."""

    mean: np.ndarray  # (D,) float64
    covariance: np.ndarray  # (D, D) float64, unbiased
    count: int | None  # images; None where a file does not state it


def statistics(features: Tensor) -> Statistics:
    from torch_fidelity.metric_fid import fid_features_to_statistics

    if len(features) < 2:
        raise ValueError(f"{len(features)} image(s): a distance between sets needs at least 2")
    if not features.isfinite().all():
        raise ValueError("some features are not finite: the network or the images are damaged")
    found = fid_features_to_statistics(features.double())
    return Statistics(found["mu"], found["sigma"], len(features))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2) (Heusel et al., arXiv 1706.08500)."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"features of {len(a.mean)} and of {len(b.mean)} dimensions cannot be compared: both "
            "sides need the same network"
        )
    sides = ({"mu": side.mean, "sigma": side.covariance} for side in (a, b))
    return fid_statistics_to_metric(*sides, verbose=False)[KEY_METRIC_FID]


def kernel_distance(
    generated: Tensor, real: Tensor, subsets: int = 100, subset_size: int = KID_SUBSET
) -> tuple[float, float]:
    """KID (arXiv 1801.01401): unbiased squared MMD under (x y / D + 1)^3. Returns the mean and the
    standard deviation over random subsets; sets smaller than a subset are taken whole."""
    from torch_fidelity.metric_kid import (
        KEY_METRIC_KID_MEAN,
        KEY_METRIC_KID_STD,
        kid_features_to_metric,
    )

    size = min(subset_size, len(generated), len(real))
    if size == len(generated) == len(real):
        subsets = 1  # they would all be the same
    found = kid_features_to_metric(
        generated.double(), real.double(), kid_subsets=subsets, kid_subset_size=size, verbose=False
    )
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]


def precision_recall(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Kynkaanniemi et al. (arXiv 1904.06991): the share of generated images within the real ones'
    manifold, and of real ones within the generated ones'; an image covers the ball that reaches
    its third neighbour. Larger sets are thinned to MANIFOLD."""
    from torch_fidelity.metric_prc import (
        KEY_METRIC_PRECISION,
        KEY_METRIC_RECALL,
        prc_features_to_metric,
    )

    if min(len(generated), len(real)) <= NEIGHBOURS:
        raise ValueError(f"precision and recall need more than {NEIGHBOURS} images a side")
    found = prc_features_to_metric(
        thinned(generated, MANIFOLD).double(),
        thinned(real, MANIFOLD).double(),
        prc_neighborhood=NEIGHBOURS,
        prc_batch_size=1000,
        save_cpu_ram=True,
        verbose=False,
    )
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]


def thinned(rows: Tensor, size: int) -> Tensor:
    """At most `size` of the rows, see sample_evenly."""
    return rows if len(rows) <= size else rows[sample_evenly(size, len(rows))]


def mixed(rows: Tensor) -> Tensor:
    """The rows in a random order, always the same one."""
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def inception_score(logits: Tensor, shuffle: bool) -> tuple[float, float]:
    """The inception score (arXiv 1606.03498), exp of the mean KL(p(y|x) || p(y)), where the logits
    are Inception's. Returns its mean and standard deviation: over ten parts after a seeded shuffle
    (torch-fidelity's convention), or over chunks of 5,000 as they come (ADM's), of which
    an incomplete one is left out where there is another."""
    from torch_fidelity.metric_isc import (
        KEY_METRIC_ISC_MEAN,
        KEY_METRIC_ISC_STD,
        isc_features_to_metric,
    )

    if shuffle:
        found = isc_features_to_metric(logits, splits=min(10, len(logits)))
        return found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD]
    whole = len(logits) // ADM_CHUNK * ADM_CHUNK or len(logits)  # few images score low
    chunks = [isc_features_to_metric(x, 1, shuffle=False) for x in logits[:whole].split(ADM_CHUNK)]
    scores = [chunk[KEY_METRIC_ISC_MEAN] for chunk in chunks]
    return float(np.mean(scores)), float(np.std(scores))
