"""The JSON report of an evaluation: scores, and all that they depend on."""

import contextlib
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from flextok.data.parts import PartStore
from flextok.evaluation import processes
from flextok.evaluation.evaluators import FAITHFUL, PLAUSIBLE, Rows
from flextok.evaluation.job import Job
from flextok.evaluation.reference import hash_of_images
from flextok.files import check_writable, read_mapping, write_text
from flextok.generators.conditioning import ClassConditioner
from flextok.schema import NotFinite

REPORT = "report.json"


class Measured(NamedTuple):
    """What a pass leaves behind."""

    job: Job
    made: PartStore  # rows of reconstructed or generated images
    real: PartStore | None  # rows of the images that they are compared with
    reference: PartStore | None  # rows of the data set that they are compared with besides
    asked: int  # images of the data set, unreadable ones too
    seconds: float

    def rows(self, side: str) -> Rows:
        real = self.real
        return Rows(
            lambda name: self.made.column(f"{side}/{name}")[:],
            None if real is None else lambda name: real.column(f"real/{name}")[:],
            paired=self.job.generator is None,
        )


def labels_of(store: PartStore) -> Tensor:
    """The labels of all its images, (n,) long. Raises ValueError where none could be read."""
    if not len(store.column("position")):
        raise ValueError("no image of the data set could be read; see the warnings above")
    return store.column("label")[:]


def make_report(measured: Measured, names: Mapping[str, str]) -> dict[str, Any]:
    """names: "model" and "data"."""
    job, labels = measured.job, labels_of(measured.made)
    codes = None
    for evaluator in job.evaluators:
        if "indices" in evaluator.needs:
            codes = {**(codes or {}), **evaluator.scores(measured.rows("codes"))}
    settings = job.settings()
    return {
        "settings": {
            "model": names.get("model"),
            "data": names.get("data"),
            **settings,
            **{key: settings["decoding"][0].get(key) for key in ("solver", "guidance")},
            "reference": names.get("data"),
            **reference(measured),
            "statistics_dtype": "float64",
            "sample_count": len(labels),
            "labels": label_balance(labels.tolist(), classes_of(job)),
        },
        "results": [result(measured, number, codes) for number in range(len(job.cells))],
        "codes": codes,
        "warnings": warnings(measured),
        "run": {
            "processes": processes.count(),
            "batch_size": job.options.batch_size,
            "device": str(job.tokenizer.device),
            "seconds": measured.seconds,
            "peak_memory_mib": peak_memory(),
        },
    }


def result(measured: Measured, number: int, codes: dict[str, Any] | None) -> dict[str, Any]:
    """One cell: how it decodes, what that costs, how good it is."""
    job, cell, rows = measured.job, measured.job.cells[number], measured.rows(str(number))
    scores: dict[str, float] = {}
    groups: dict[str, dict[str, float]] = {PLAUSIBLE: {}, FAITHFUL: {}}
    for evaluator in job.evaluators:
        if "images" in evaluator.needs and (rows.paired or "originals" not in evaluator.needs):
            found = evaluator.scores(rows)
            scores |= found
            for name, score in found.items():
                if group := evaluator.group_of(name):
                    groups[group][name] = score
    for name, score in scores.items():
        if not math.isfinite(score):
            raise NotFinite(f"{name} is {score} at {cell.num_tokens} tokens: no score to report")
    decoding, rate, seconds = vars(job.decoding[number]), {}, rows.made("seconds")
    if codes is not None and "vocab_size" in codes:
        pixels = job.tokenizer.image_size**2
        bits = cell.num_tokens * math.log2(codes["vocab_size"])
        entropy = sum(codes["entropy_bits_per_position"][: cell.num_tokens])
        rate = {"bits": bits, "bits_per_pixel": bits / pixels}
        rate["entropy_bits_per_pixel"] = entropy / pixels
    return {
        "num_tokens": cell.num_tokens,
        "num_steps": decoding.get("num_steps"),
        "guidance_scale": decoding.get("guidance_scale"),
        "count": len(seconds),
        **rate,
        "seconds_per_picture": float(seconds.mean()),
        **groups,
        "scores": scores,  # those of both groups, and of neither
    }


def reference(measured: Measured) -> dict[str, Any]:
    """What the images were compared with."""
    found: dict[str, Any] = {}
    for stored in (e.reference for e in measured.job.networks if e.reference is not None):
        found["stored_reference"] = str(stored.path)
        found["reference_hash"] = found["stored_reference_hash"] = stored.hash
        found["stored_reference_count"] = stored.statistics.count
    if measured.real is not None:  # the very images, as they were compared
        found["reference_hash"] = hash_of_images(measured.real)
        found["reference_count"] = len(measured.real.column("position"))
    return found


def classes_of(job: Job) -> int:
    """How many classes a generator by class has; 0 of any other model."""
    conditioner = None if job.generator is None else job.generator.conditioner
    return conditioner.num_classes if isinstance(conditioner, ClassConditioner) else 0


def label_balance(labels: list[int], classes: int = 0) -> dict[str, Any]:
    """How many images each class has; FID moves by about 0.1 with it. classes: how many there are
    at least, those without images too."""
    counts = Counter(dict.fromkeys(range(classes), 0) | Counter(labels)).values()
    least, most = min(counts), max(counts)
    balanced = least > 0 and most - least <= 1
    return {"classes": len(counts), "fewest": least, "most": most, "balanced": balanced}


def warnings(measured: Measured) -> list[str]:
    """What a reader of the scores should be warned of."""
    found = list(measured.job.left_out)
    read = 0 if measured.real is None else len(labels_of(measured.real))
    if lost := measured.asked - read:
        found.append(f"{lost} of {measured.asked} images could not be read and do not count")
    uses_captions = measured.job.reads_prompts or any(
        "captions" in e.needs for e in measured.job.evaluators
    )
    if measured.real is not None and uses_captions:
        texts = measured.real.column("caption").texts()
        if without := texts.count(""):
            found.append(
                f"{without} of {len(texts)} images have no caption and stand for no prompt"
            )
    number, classes = len(labels_of(measured.made)), classes_of(measured.job)
    if measured.job.options.labels == "balanced" and number < classes:
        found.append(
            f"{number} images for {classes} classes, evenly spread: {classes - number} have none"
        )
    for evaluator in measured.job.evaluators:
        found += evaluator.warnings(measured.rows("0"))
    return list(dict.fromkeys(found))


def peak_memory() -> float | None:
    """The most MiB that this process has held so far; None on a system that does not state it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def write_report(report: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / REPORT, json.dumps(report, indent=2, allow_nan=False) + "\n")
    return folder / REPORT


def check_output(folder: Path) -> Path:
    """The place of the report in an output folder. Raises ValueError where a report.json lies that
    this package did not write, which would be lost, or none can be written."""
    check_writable(folder, "the output folder", folder=True)
    path = folder / REPORT
    check_writable(path, "the report")
    if not path.exists():
        return path
    with contextlib.suppress(ValueError):
        if "flextok_version" in read_mapping(path, settings=dict)["settings"]:
            return path
    raise ValueError(
        f"{path} was not written by flextok, or is damaged, and would be lost: remove it, or "
        "choose another folder"
    )
