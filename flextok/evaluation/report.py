"""Scores from the rows of a pass, and the JSON report that says what they mean."""

import hashlib
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import flextok
from flextok.evaluation import processes
from flextok.evaluation.codes import code_report
from flextok.evaluation.job import Job
from flextok.evaluation.metrics import METRICS
from flextok.evaluation.records import Records
from flextok.evaluation.reference import few_pictures
from flextok.evaluation.scores import (
    KID_SUBSET,
    Compared,
    Measured,
    compared_with,
    proper_names,
    set_scores,
)
from flextok.files import write_text
from flextok.hub import fingerprint
from flextok.schema import NotFinite

REPORT = "report.json"
MAX_PSNR = 100.0  # dB, of a picture that comes back without any error; 8 bits cannot come near it


def make_report(job: Job, measured: Measured) -> dict[str, Any]:
    made, real = measured.made, measured.real
    count = len(made.column("index"))
    if count == 0 or (real is not None and len(real.column("index")) == 0):
        raise ValueError("no picture of the data set could be read; see the warnings above")
    codes = None
    if job.tokenizer.vocab_size:
        length = made.column("indices")[:1].shape[1]
        codes = code_report(made.column("indices"), length, job.tokenizer.vocab_size)
    compared = [compared_with(measured, network) for network in job.networks.features]
    cells = range(len(job.cells))
    return {
        "settings": settings(job, measured),
        "results": [result(job, measured, number, codes, compared) for number in cells],
        "codes": codes,
        "warnings": warnings(job, measured),
        "run": {
            "processes": processes.count(),
            "batch_size": job.options.batch_size,
            "device": str(job.device),
            "seconds": measured.seconds,
            "peak_memory_mib": peak_memory(),
        },
    }


def result(
    job: Job,
    measured: Measured,
    number: int,
    codes: dict[str, Any] | None,
    compared: list[Compared],
) -> dict[str, Any]:
    """One cell: how it decodes, what that costs, how good it is."""
    cell, made = job.cells[number], measured.made
    scores: dict[str, float] = {}
    if job.generator is None:
        for name in (*METRICS, *(["lpips"] if job.networks.lpips is not None else [])):
            values = made.column(f"{number}/{name}")[:].double()
            scores[name] = float(values.clamp_max(MAX_PSNR if name == "psnr" else math.inf).mean())
    for network, other in zip(job.networks.features, compared, strict=True):
        found = set_scores(measured.made, number, network, other)
        scores |= proper_names(found, network, "rfid" if job.generator is None else "gfid")
    for name, score in scores.items():
        if not math.isfinite(score):
            raise NotFinite(f"{name} is {score} at {cell.num_tokens} tokens: no score to report")
    defaults = getattr(job.tokenizer.config, "decode", None)  # of FlexTok
    steps, scale = cell.num_steps, cell.guidance_scale
    if defaults is not None:
        steps = defaults.num_steps if steps is None else steps
        scale = defaults.guidance_scale if scale is None else scale
    rate = {}
    if codes is not None:
        pixels = job.tokenizer.image_size**2
        bits = cell.num_tokens * math.log2(codes["vocab_size"])
        entropy = sum(codes["entropy_bits_per_position"][: cell.num_tokens])
        rate = {"bits": bits, "bits_per_pixel": bits / pixels}
        rate["entropy_bits_per_pixel"] = entropy / pixels
    return {
        "num_tokens": cell.num_tokens,
        "num_steps": steps,
        "guidance_scale": scale,
        "count": len(made.column("index")),
        **rate,
        "seconds_per_picture": float(made.column(f"{number}/seconds")[:].mean()),
        "scores": scores,
    }


def settings(job: Job, measured: Measured) -> dict[str, Any]:
    """All that the scores depend on."""
    tokenizer, options = job.tokenizer, job.options
    defaults = getattr(tokenizer.config, "decode", None)
    reference: dict[str, Any] = {"reference": job.names.get("data")}
    stored = next(iter(measured.references.values()), None)
    if stored is not None:
        reference["stored_reference"] = str(stored.path)
        reference["reference_hash"] = reference["stored_reference_hash"] = stored.hash
        reference["stored_reference_count"] = stored.statistics.count
    if measured.real is not None:  # the very pictures, as they were compared
        pictures = measured.real.column("picture")[:].numpy().tobytes()
        reference["reference_hash"] = hashlib.sha256(pictures).hexdigest()[:16]
        reference["reference_count"] = len(pictures) // 8
    return {
        "task": "reconstruction" if job.generator is None else "generation",
        "model": job.names.get("model"),
        **model_settings(tokenizer if job.generator is None else job.generator, tokenizer),
        "data": job.names.get("data"),
        **reference,
        "statistics_dtype": "float64",
        "seed": options.seed,
        "solver": options.solver or getattr(defaults, "solver", None),
        "guidance": getattr(defaults, "guidance", None),
        "generate": None if job.generator is None else vars(job.generator.config.generate),
        "sample_count": len(measured.made.column("index")),
        "labels": label_balance(measured.made),
        "networks": job.networks.identity(),
    }


def model_settings(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Which model saw the pictures how, and the versions of the code."""
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


def label_balance(made: Records) -> dict[str, Any]:
    """How many pictures each class has; FID moves by about 0.1 with it."""
    counts = Counter(made.column("label")[:].tolist())
    least, most = min(counts.values()), max(counts.values())
    balanced = most - least <= 1
    return {"classes": len(counts), "fewest": least, "most": most, "balanced": balanced}


def warnings(job: Job, measured: Measured) -> list[str]:
    """What a reader of the scores has to know."""
    found = list(job.networks.left_out)
    count = len(measured.made.column("index"))
    if measured.real is not None and (lost := measured.asked - len(measured.real.column("index"))):
        found.append(f"{lost} of {measured.asked} pictures could not be read and do not count")
    for network in job.networks.features:
        dim = measured.made.column(f"0/{network.name}")[:1].shape[1]
        sides = {"evaluated": count}
        if measured.real is not None:
            sides["reference"] = len(measured.real.column("index"))
        found += [few_pictures(f"{k} set", n, dim) for k, n in sides.items() if n <= dim]
        if min(sides.values()) < KID_SUBSET:
            found.append(f"kernel distance over all pictures: fewer than a subset of {KID_SUBSET}")
        if network.name.startswith("inception_"):
            found.append(f"{network.name}: not the weights that FID is defined on")
    for reference in measured.references.values():
        found += reference.warnings
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
