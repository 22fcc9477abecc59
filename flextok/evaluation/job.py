"""What to evaluate and how: the settings that every part of an evaluation reads."""

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from flextok.evaluation.features import Networks
from flextok.hub import fingerprint


class Cell(NamedTuple):
    """One way to decode; None is the tokenizer's own default."""

    num_tokens: int
    num_steps: int | None = None
    guidance_scale: float | None = None


@dataclass(frozen=True)
class Options:
    """How to evaluate; all of it is written beside the scores."""

    networks: tuple[str, ...] | None = None  # None: Inception and LPIPS, or what is at hand
    inception_weights: str | None = None  # a file; by default torch's hub cache
    solver: str | None = None
    guidance_interval: tuple[float, float] | None = None
    time_shift: float | None = None
    seed: int = 0
    batch_size: int = 32  # of one process
    num_workers: int = 0
    reference: str | None = None  # tokenizer: an .npz to compare with beside the pictures
    save_reference: str | None = None  # write the pictures' statistics to this .npz
    num_samples: int | None = None  # generator: by default as many as there are pictures
    labels: Literal["balanced", "data"] = "balanced"  # generator: all classes alike, or the data's

    def solving(self) -> dict[str, Any]:
        """How all cells alike are decoded; None is the tokenizer's own default."""
        return {
            "solver": self.solver,
            "guidance_interval": self.guidance_interval,
            "time_shift": self.time_shift,
        }


@dataclass(frozen=True)
class Job:
    """One evaluation: of a tokenizer, or of a generator with its tokenizer."""

    tokenizer: Any
    generator: Any | None
    networks: Networks
    cells: list[Cell]
    options: Options
    names: dict[str, str] = field(default_factory=dict)  # "model" and "data", for the report

    @property
    def device(self) -> torch.device:
        return next(self.tokenizer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.tokenizer.parameters()).dtype

    def identity(self, what: str, data: str) -> dict[str, Any]:
        """All that a picture's measured row depends on."""
        models = [m for m in (self.tokenizer, self.generator) if m is not None]
        return {
            "what": what,
            "models": [fingerprint(m) for m in models],
            "configs": [asdict(m.config) for m in models],
            "dtype": str(self.dtype),
            "device": self.device.type,
            "data": data,
            "networks": self.networks.identity(),
            "cells": self.cells,
            **self.options.solving(),
            "seed": self.options.seed,
        }


def hash_of(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
