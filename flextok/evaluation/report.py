"""The JSON report of an evaluation: scores, and all that they depend on."""

import hashlib
import json
import math
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

import flextok
from flextok.data.parts import PartStore
from flextok.evaluation import processes
from flextok.evaluation.evaluators import Rows
from flextok.evaluation.job import Job
from flextok.files import write_text
from flextok.generators.base import Generator
from flextok.hub import fingerprint
from flextok.schema import NotFinite
from flextok.tokenizers.base import Tokenizer

REPORT = "report.json"


class Measured(NamedTuple):
    """What a pass leaves behind."""

    job: Job
    made: PartStore  # rows of reconstructed or generated images
    real: PartStore | None  # rows of the images that they are compared with
    asked: int  # images of the data set, unreadable ones too
    seconds: float

    def rows(self, side: str) -> Rows:
        real = self.real
        return Rows(
            lambda name: self.made.column(f"{side}/{name}")[:],
            None if real is None else lambda name: real.column(f"real/{name}")[:],
            paired=self.job.generator is None,
        )


def make_report(measured: Measured) -> dict[str, Any]:
    job = measured.job
    if not all(len(store.column("label")) for store in (measured.made, measured.real) if store):
        raise ValueError("no image of the data set could be read; see the warnings above")
    codes = None
    for evaluator in job.evaluators:
        if "indices" in evaluator.needs:
            codes = evaluator.scores(measured.rows("codes"))
    return {
        "settings": settings(measured),
        "results": [result(measured, number, codes) for number in range(len(job.cells))],
        "codes": codes,
        "warnings": warnings(measured),
        "run": {
            "processes": processes.count(),
            "batch_size": job.options.batch_size,
            "device": str(job.device),
            "seconds": measured.seconds,
            "peak_memory_mib": peak_memory(),
        },
    }


def result(measured: Measured, number: int, codes: dict[str, Any] | None) -> dict[str, Any]:
    """One cell: how it decodes, what that costs, how good it is."""
    job, cell, rows = measured.job, measured.job.cells[number], measured.rows(str(number))
    scores: dict[str, float] = {}
    for evaluator in job.evaluators:
        if "images" in evaluator.needs and (rows.paired or "originals" not in evaluator.needs):
            scores |= evaluator.scores(rows)
    for name, score in scores.items():
        if not math.isfinite(score):
            raise NotFinite(f"{name} is {score} at {cell.num_tokens} tokens: no score to report")
    decoding = asdict(job.decoding[number])
    rate = {}
    if codes is not None:
        pixels = job.tokenizer.image_size**2
        bits = cell.num_tokens * math.log2(codes["vocab_size"])
        entropy = sum(codes["entropy_bits_per_position"][: cell.num_tokens])
        rate = {"bits": bits, "bits_per_pixel": bits / pixels}
        rate["entropy_bits_per_pixel"] = entropy / pixels
    return {
        "num_tokens": cell.num_tokens,
        "num_steps": decoding.get("num_steps"),
        "guidance_scale": decoding.get("guidance_scale"),
        "count": len(measured.made.column("label")),
        **rate,
        "seconds_per_picture": float(rows.made("seconds").mean()),
        "scores": scores,
    }


def settings(measured: Measured) -> dict[str, Any]:
    """All that the scores depend on."""
    job = measured.job
    tokenizer, model = job.tokenizer, job.generator or job.tokenizer
    reference: dict[str, Any] = {"reference": job.names.get("data")}
    for stored in (e.reference for e in job.networks if e.reference is not None):
        reference["stored_reference"] = str(stored.path)
        reference["reference_hash"] = reference["stored_reference_hash"] = stored.hash
        reference["stored_reference_count"] = stored.statistics.count
    if measured.real is not None:  # the very images, as they were compared
        hashes = measured.real.column("real/hash")[:].numpy().tobytes()
        reference["reference_hash"] = hashlib.sha256(hashes).hexdigest()[:16]
        reference["reference_count"] = len(hashes) // 8
    decoding = asdict(job.decoding[0])
    labels = measured.made.column("label")[:]
    return {
        "task": "reconstruction" if job.generator is None else "generation",
        "model": job.names.get("model"),
        **model_settings(model, tokenizer),
        "data": job.names.get("data"),
        **reference,
        "statistics_dtype": "float64",
        "seed": job.options.seed,
        "decoding": {k: v for k, v in decoding.items() if k not in ("num_steps", "guidance_scale")},
        "solver": decoding.get("solver"),
        "guidance": decoding.get("guidance"),
        "generate": None if job.generator is None else asdict(job.sampling),
        "sample_count": len(labels),
        "labels": label_balance(labels.tolist()),
        "networks": job.identities(),
    }


def model_settings(model: Tokenizer | Generator, tokenizer: Tokenizer) -> dict[str, Any]:
    """Which model saw the images how, and the versions of the code."""
    return {
        "model_type": model.model_type,
        "model_hash": fingerprint(model),
        "tokenizer_hash": fingerprint(tokenizer),
        "image_size": tokenizer.image_size,
        "crop": "center, after the shorter side was resized",
        "interpolation": "bicubic, antialiased (PIL)",
        "pixels": "clamped, rounded to 8 bits, both sides alike",
        "dtype": str(next(tokenizer.parameters()).dtype).removeprefix("torch."),
        "flextok_version": flextok.__version__,
        "torch_version": torch.__version__,
    }


def label_balance(labels: list[int]) -> dict[str, Any]:
    """How many images each class has; FID moves by about 0.1 with it."""
    counts = Counter(labels).values()
    least, most = min(counts), max(counts)
    return {"classes": len(counts), "fewest": least, "most": most, "balanced": most - least <= 1}


def warnings(measured: Measured) -> list[str]:
    """What a reader of the scores has to know."""
    found = list(measured.job.left_out)
    read = 0 if measured.real is None else len(measured.real.column("label"))
    if lost := measured.asked - read:
        found.append(f"{lost} of {measured.asked} images could not be read and do not count")
    for evaluator in measured.job.evaluators:
        found += evaluator.warnings(measured.rows("0"))
    return list(dict.fromkeys(found))


def peak_memory() -> float | None:
    """The most that this process has held so far, in MiB; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def write_report(report: dict[str, Any], place: Path) -> Path:
    """place: a folder, for its report.json, or a .json file."""
    try:
        text = json.dumps(report, indent=2, allow_nan=False)
    except ValueError:
        raise ValueError(f"a score is not finite: {report.get('results')}") from None
    path = place if place.suffix == ".json" else place / REPORT
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text + "\n")
    return path


def check_output(folder: Path) -> Path:
    """The place of the report in an output folder. Raises ValueError where a report.json lies that
    this package did not write: it would be lost."""
    path = folder / REPORT
    if not path.exists():
        return path
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if "flextok_version" in report["settings"]:
            return path
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        pass
    raise ValueError(f"{path} was not written by flextok and would be lost: choose another folder")


def read_report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / REPORT).read_text(encoding="utf-8"))
