"""What to evaluate and how: the settings that every part of an evaluation reads."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from flextok.evaluation.evaluators import Evaluator, FeatureDistances, Setting, load_evaluators
from flextok.evaluation.reference import check_suffix
from flextok.generators.base import Generator
from flextok.hub import fingerprint
from flextok.tokenizers.base import Tokenizer


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
    # of all cells alike; an option that is None or left out is the model's own default
    decoding: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)  # a generator's
    seed: int = 0
    batch_size: int = 32  # of one process
    num_workers: int = 0
    reference: str | None = None  # tokenizer: an .npz to compare with beside the images
    save_reference: str | None = None  # write the images' statistics to this .npz
    num_samples: int | None = None  # generator: by default as many as there are images
    labels: Literal["balanced", "data"] = "balanced"  # generator: all classes alike, or the data's

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")
        if self.num_samples is not None and self.num_samples < 2:
            raise ValueError(f"num_samples={self.num_samples} must be at least 2")
        if self.save_reference:
            check_suffix(self.save_reference)


@dataclass(frozen=True)
class Job:
    """One evaluation: of a tokenizer, or of a generator with its tokenizer."""

    tokenizer: Tokenizer
    generator: Generator | None
    evaluators: list[Evaluator]
    cells: list[Cell]
    decoding: list[Any]  # the tokenizer's options, of each cell
    sampling: Any  # the generator's options
    options: Options
    names: Mapping[str, str]  # "model" and "data", for the report
    left_out: list[str]  # a sentence for each network that is not at hand

    @property
    def device(self) -> torch.device:
        return self.tokenizer.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.tokenizer.parameters()).dtype

    @property
    def networks(self) -> list[FeatureDistances]:
        return [e for e in self.evaluators if isinstance(e, FeatureDistances)]

    def identities(self) -> dict[str, dict[str, str]]:
        """Weights and preprocessing of each network."""
        return {e.name: identity for e in self.evaluators if (identity := e.identity())}

    def identity(self, what: str, data: str) -> dict[str, Any]:
        """All that an image's measured row depends on."""
        models = [m for m in (self.tokenizer, self.generator) if m is not None]
        return {
            "what": what,
            "models": [fingerprint(m) for m in models],
            "configs": [asdict(m.config) for m in models],
            "dtype": str(self.dtype),
            "device": self.device.type,
            "data": data,
            "evaluators": [e.name for e in self.evaluators],
            "networks": self.identities(),
            "cells": [list(cell) for cell in self.cells],
            "decoding": [asdict(way) for way in self.decoding],
            "sampling": None if self.generator is None else asdict(self.sampling),
            "seed": self.options.seed,
        }


def make_job(
    tokenizer: Tokenizer,
    generator: Generator | None = None,
    cells: Sequence[Cell] | None = None,
    options: Options | None = None,
    names: Mapping[str, str] | None = None,
) -> Job:
    """Loads the evaluators. Raises ValueError for a way to decode or to sample that the models do
    not have, and then for networks whose weights are missing."""
    options = options or Options()
    total = (generator or tokenizer).num_tokens
    cells = list(cells or [Cell(total)])
    decoding = [decoding_of(tokenizer, cell, options, total) for cell in cells]
    sampling = generator.generate_options(options.sampling) if generator else None
    parameter = next(tokenizer.parameters())
    setting = Setting(
        parameter.device, parameter.dtype, tokenizer.vocab_size, options.inception_weights
    )
    evaluators, left_out = load_evaluators(options.networks, setting)
    job = Job(
        *(tokenizer, generator, evaluators, cells, decoding, sampling, options),
        *(names or {}, left_out),
    )
    if options.save_reference and len(job.networks) != 1:
        raise ValueError("a reference file holds one network's features: choose one of --networks")
    return job


def decoding_of(tokenizer: Tokenizer, cell: Cell, options: Options, total: int) -> Any:
    """The tokenizer's options for a cell."""
    if not 1 <= cell.num_tokens <= total:
        raise ValueError(f"num_tokens={cell.num_tokens} must be in [1, {total}]")
    if cell.num_tokens < tokenizer.num_tokens and not tokenizer.ordered:
        raise ValueError(
            f"num_tokens={cell.num_tokens} must be {tokenizer.num_tokens}: this tokenizer decodes "
            "all of its tokens only"
        )
    own = {"num_steps": cell.num_steps, "guidance_scale": cell.guidance_scale}
    return tokenizer.decode_options({**options.decoding, **own})


def hash_of(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
