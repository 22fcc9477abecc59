"""Scores of decoded pictures against real ones, as sets, by one network and under proper names."""

from typing import NamedTuple

from flextok.evaluation.distances import (
    Rows,
    Statistics,
    chunks_in_order,
    class_score,
    frechet_distance,
    kernel_distance,
    precision_recall,
    shuffled_splits,
    statistics,
)
from flextok.evaluation.features import FeatureNetwork
from flextok.evaluation.records import Records
from flextok.evaluation.reference import Reference

KID_SUBSET = 1000
# what the distances are called when the features are Inception's own; others carry their network
INCEPTION_NAMES = {
    "kernel": "kid",
    "kernel_std": "kid_std",
    "class_score_10_shuffled": "inception_score_10_shuffled",  # torch-fidelity
    "class_score_10_shuffled_std": "inception_score_10_shuffled_std",
    "class_score_chunks_of_5000": "inception_score_chunks_of_5000",  # ADM
    "precision": "precision",
    "recall": "recall",
}


class Measured(NamedTuple):
    """What a pass leaves behind."""

    made: Records  # rows of decoded pictures
    real: Records | None  # rows of the pictures that they are compared with
    references: dict[str, Reference]  # by network
    asked: int  # pictures of the data set, unreadable ones too
    seconds: float


class Compared(NamedTuple):
    """The other side of a distance, by one network; worked out once for all cells."""

    rows: Rows | None  # features of the real pictures, or of a stored reference's
    statistics: Statistics
    stored: Statistics | None  # beside the pictures themselves


def compared_with(measured: Measured, network: FeatureNetwork) -> Compared:
    reference = measured.references.get(network.name)
    if measured.real is not None:
        rows = measured.real.column(f"real/{network.name}")
        stored = None if reference is None else reference.statistics
        return Compared(rows, statistics(rows), stored)
    assert reference is not None, "neither pictures nor a stored reference"
    pictures = None if reference.pictures is None else reference.features()
    return Compared(pictures, reference.statistics, None)


def set_scores(
    made: Records, number: int, network: FeatureNetwork, other: Compared
) -> dict[str, float]:
    """Distances between all decoded pictures and all real ones."""
    rows = made.column(f"{number}/{network.name}")
    logits = made.column(f"{number}/{network.name}/logits")
    ours = statistics(rows)
    found = {"frechet": frechet_distance(ours, other.statistics)}
    if other.stored is not None:
        found["frechet_to_reference"] = frechet_distance(ours, other.stored)
    if other.rows is not None:
        kernel = kernel_distance(rows, other.rows, subset_size=KID_SUBSET)
        found["kernel"], found["kernel_std"] = kernel
        found["precision"], found["recall"] = precision_recall(rows, other.rows)
    shuffled = class_score(logits, shuffled_splits(len(logits)))
    found["class_score_10_shuffled"], found["class_score_10_shuffled_std"] = shuffled
    found["class_score_chunks_of_5000"], _ = class_score(logits, chunks_in_order(len(logits)))
    return found


def proper_names(found: dict[str, float], network: FeatureNetwork, fid: str) -> dict[str, float]:
    """Inception's own scores have their usual names; any other network's carry its name."""
    if network.name != "inception":
        return {f"{score}_{network.name}": value for score, value in found.items()}
    names = {"frechet": fid, "frechet_to_reference": "fid_to_reference", **INCEPTION_NAMES}
    return {names[score]: value for score, value in found.items()}
