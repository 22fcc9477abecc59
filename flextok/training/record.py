"""What a run was started with: command, config, versions, machine and the state of the source."""

import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import flextok
from flextok.card import count_parameters
from flextok.config import ExperimentConfig
from flextok.data.processes import this_process
from flextok.files import write_text
from flextok.schema import to_mapping

PACKAGES = ("flextok", "torch", "lightning", "numpy", "pillow", "timm", "diffusers", "webdataset")


def record_start(folder: Path, config: ExperimentConfig, step: int) -> None:
    """Write <folder>/starts/<time>.json, and .diff if the source has uncommitted changes. step: the
    one that the run continues from."""
    now = datetime.now(timezone.utc)
    path = folder / "starts" / f"{now:%Y%m%dT%H%M%S%f}.json"
    path.parent.mkdir(exist_ok=True)
    source = source_state()
    diff = source.pop("diff", "")
    facts: dict[str, Any] = {
        "time": now.isoformat(timespec="seconds"),
        "step": step,
        "command": sys.argv,
        "folder": os.getcwd(),
        "seed": config.seed,
        "config": to_mapping(config),
        "source": source,
        "versions": {"python": platform.python_version(), **versions()},
        "host": platform.node(),
        "processes": this_process().world_size,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }
    text = json.dumps(facts, indent=2, default=str) + "\n"
    write_text(path, text)
    if diff:
        write_text(path.with_suffix(".diff"), diff)


def told_at_start(config: ExperimentConfig, model: Any, data: Any, trainer: Any) -> str:
    """What is trained, on what and where, in three lines. data: the run's DataModule."""
    whole = count_parameters(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    classes = list(model.metadata.get("class_names", []))
    some = ", ".join(map(str, classes[:5])) + (", ..." if len(classes) > 5 else "")
    count, checked = (
        len(data.stream.dataset),
        0 if data.evaluation is None else len(data.evaluation),
    )
    options, step = config.trainer, config.data.batch_size * config.trainer.accumulate
    step *= trainer.world_size
    unit = "pictures" if config.task == "tokenizer" else "sequences"
    kind = "class" if len(classes) == 1 else "classes"
    return (
        f"{config.task} {model.model_type}: {whole:,} parameters, {trained:,} of them trained\n"
        f"data: {count:,} {unit} of {len(classes)} {kind} ({some}), {checked:,} for validation\n"
        f"device: {trainer.strategy.root_device}, {trainer.world_size} in all, "
        f"precision {trainer.precision}; {options.max_steps:,} steps of {step:,} {unit} each, "
        f"{options.max_steps * step / count:,.1f} epochs"
    )


def told_at_end(config: ExperimentConfig, folder: Path, step: int, checkpoints: Any) -> str:
    """How far the run came, its scores and what to do next. checkpoints: the run's callback."""
    if checkpoints.last_loss is None:
        score = "not validated: no data.validation"
    else:
        best = checkpoints.best or {"loss": checkpoints.last_loss, "step": step}
        score = (
            f"val/loss {checkpoints.last_loss:.4g}, the best {best['loss']:.4g} at step "
            f"{best['step']} (its checkpoint is in {folder / 'checkpoints'})"
        )
    following = f"flextok sample {folder}"
    if config.task == "tokenizer":
        following = f"flextok reconstruct PICTURE --model {folder}, or a generator with tokenizer="
        following += str(folder)
    return f"step {step}: {score}\nmodel: {folder}; next: {following}"


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = flextok.__version__ if name == "flextok" else None
    return {**found, "cuda": torch.version.cuda}


def source_state() -> dict[str, Any]:
    """Commit, changed files and diff of the git checkout that flextok runs from; {} if none."""
    place = Path(flextok.__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(place), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return done.stdout.rstrip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # else the checkout is somebody else's
        changed = git("status", "--porcelain").splitlines()
        return {"commit": git("rev-parse", "HEAD"), "changed": changed, "diff": git("diff", "HEAD")}
    except (OSError, subprocess.SubprocessError):
        return {}
