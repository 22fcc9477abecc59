"""Tiny training runs, and how they are interrupted and compared."""

import csv
from pathlib import Path

import torch
import yaml

from flextok.pipeline import load
from flextok.training.module import TrainingModule
from helpers.models import TINY

SIX_STEPS = {  # a trainer's settings
    "max_steps": 6,
    "accelerator": "cpu",
    "devices": 1,
    "log_every": 1,
    "validate_every": 3,
    "checkpoint_every": 2,
    "num_pictures": 2,
    "precision": "32-true",  # the same numbers on every processor
}


def tokenizer_yaml(folder, pictures, **trainer) -> Path:
    experiment = {
        "task": "tokenizer",
        "output_dir": str(folder / "tokenizer"),
        "model": {"name": "flextok", **TINY, "decode": {"num_steps": 2, "guidance_scale": 1.0}},
        "data": {
            "train": {"name": "folder", "root": str(pictures)},
            "validation": {"name": "folder", "root": str(pictures)},
            "batch_size": 4,
            "flip": True,
        },
        "optim": {"lr": 1e-3, "warmup_steps": 2, "ema_decay": 0.9},
        "trainer": {**SIX_STEPS, **trainer},
    }
    path = folder / "tokenizer.yaml"
    path.write_text(yaml.safe_dump(experiment))
    return path


def generator_yaml(folder, pictures, name="generator", **model) -> Path:
    experiment = yaml.safe_load(tokenizer_yaml(folder, pictures).read_text())
    experiment |= {
        "task": "generator",
        "output_dir": str(folder / name),
        "tokenizer": str(folder / "tokenizer"),
        "model": {"name": "gpt", "depth": 2, "dim": 32, **model},
    }
    experiment["data"]["token_variants"] = 3
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(experiment))
    return path


def logged_losses(folder) -> dict[int, float]:
    """step -> training loss, from every CSV log of a run (a resumed run adds a file)."""
    losses = {}
    for path in sorted(Path(folder).glob("logs/csv/version_*/metrics.csv")):
        for row in csv.DictReader(path.open()):
            if row.get("train/loss"):
                losses[int(row["step"])] = float(row["train/loss"])
    return losses


def weights(folder):
    return load(folder).state_dict()


class Stop(Exception):
    pass


def interrupt_after(monkeypatch, step):
    """Make the run die (as by a crash, no goodbye) when it asks for the given step's loss."""
    original = TrainingModule.training_step

    def training_step(self, batch, batch_index):
        if self.global_step == step:
            raise Stop
        return original(self, batch, batch_index)

    monkeypatch.setattr(TrainingModule, "training_step", training_step)


def same(a: Path, b: Path) -> bool:
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
