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
from flextok.config import ExperimentConfig
from flextok.data.processes import this_process
from flextok.files import atomic_write
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
    atomic_write(path, lambda p: p.write_text(text, encoding="utf-8"))
    if diff:
        atomic_write(path.with_suffix(".diff"), lambda p: p.write_text(diff, encoding="utf-8"))


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
