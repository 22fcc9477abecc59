"""What to evaluate and how: the settings that every part of an evaluation reads."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import torch

import flextok
from flextok.evaluation.evaluators import Evaluator, FeatureDistances, Setting, load_evaluators
from flextok.evaluation.reference import check_suffix
from flextok.files import check_writable
from flextok.generators.base import Generator
from flextok.generators.conditioning import TextConditioner
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

    networks: Sequence[str] | None = None  # None: Inception and LPIPS, or what is at hand
    inception_weights: str | None = None  # a file; by default torch's hub cache
    # of all cells alike; an option that is None or left out is the model's own default
    decoding: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)  # a generator's
    seed: int = 0
    batch_size: int = 32  # of one process
    num_workers: int = 0
    reference: Any = None  # tokenizer: a data set or an .npz to compare with beside the images
    save_reference: str | None = None  # write the images' statistics to this .npz
    num_samples: int | None = None  # generator: by default as many as there are images
    labels: Literal["balanced", "data"] = "balanced"  # generator: all classes alike, or the data's

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("num_samples", 2)):
            value = vars(self)[name]
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if self.save_reference:
            check_writable(check_suffix(self.save_reference), "save_reference")


@dataclass(frozen=True)
class Job:
    """One evaluation: of a tokenizer, or of a generator with its tokenizer."""

    tokenizer: Tokenizer
    generator: Generator | None
    cells: list[Cell]
    decoding: list[Any]  # the tokenizer's options, of each cell
    sampling: Any  # the generator's options
    options: Options
    evaluators: list[Evaluator]
    left_out: list[str]  # a sentence for each network that is not at hand

    @property
    def networks(self) -> list[FeatureDistances]:
        return [e for e in self.evaluators if isinstance(e, FeatureDistances)]

    @property
    def reads_prompts(self) -> bool:
        return self.generator is not None and isinstance(
            self.generator.conditioner, TextConditioner
        )

    def settings(self) -> dict[str, Any]:
        """All that a measured row depends on, but for the data and the models' configs."""
        return {
            "task": "reconstruction" if self.generator is None else "generation",
            **model_settings(self.generator or self.tokenizer, self.tokenizer),
            "device_type": self.tokenizer.device.type,
            "seed": self.options.seed,
            "cells": [list(cell) for cell in self.cells],
            "decoding": [asdict(way) for way in self.decoding],
            "generate": None if self.generator is None else asdict(self.sampling),
            "evaluators": [e.name for e in self.evaluators],
            "networks": {e.name: facts for e in self.evaluators if (facts := e.identity())},
        }

    def identity(self, what: str, data: str) -> dict[str, Any]:
        """All that a measured row depends on."""
        models = [m for m in (self.tokenizer, self.generator) if m is not None]
        configs = [asdict(model.config) for model in models]
        return {"pass": what, "data": data, **self.settings(), "configs": configs}


def make_job(
    model: Tokenizer | Generator,
    cells: Sequence[Cell] | None = None,
    options: Options | None = None,
    tokenizer: Tokenizer | None = None,
) -> Job:
    """Loads the evaluators. Raises ValueError for a way to decode or to sample that the models do
    not have, and then for networks whose weights are missing."""
    options = options or Options()
    generator = model if isinstance(model, Generator) else None
    tokenizer = model if isinstance(model, Tokenizer) else tokenizer
    assert tokenizer is not None, "a generator needs its tokenizer"
    cells = list(cells or [Cell(model.num_tokens)])
    decoding = [decoding_of(tokenizer, cell, options, model.num_tokens) for cell in cells]
    sampling = generator.generate_options(options.sampling) if generator else None
    check_weights(options)
    dtype = next(tokenizer.parameters()).dtype
    setting = Setting(tokenizer.device, dtype, tokenizer.vocab_size, options.inception_weights)
    evaluators = load_evaluators(options.networks, setting)
    for evaluator in evaluators[0]:
        if "indices" in evaluator.needs and len(evaluator.needs) > 1:
            raise ValueError(
                f"evaluator {evaluator.name} needs {', '.join(evaluator.needs)}: indices come "
                "without the images, so one evaluator is for these and another for those"
            )
    job = Job(tokenizer, generator, cells, decoding, sampling, options, *evaluators)
    if options.save_reference and len(job.networks) != 1:
        raise ValueError("a reference file holds one network's features: choose one of --networks")
    return job


def check_weights(options: Options) -> None:
    """Raise ValueError for weights of Inception that no network asked for would read."""
    networks = options.networks
    if options.inception_weights and networks is not None and "inception" not in networks:
        asked = ", ".join(networks) or "none"
        raise ValueError(
            f"--inception-weights are for the network inception, and --networks are {asked}: add "
            "inception there, or leave the weights out"
        )


def decoding_of(tokenizer: Tokenizer, cell: Cell, options: Options, total: int) -> Any:
    """The tokenizer's options for a cell, of `total` indices."""
    if not 1 <= cell.num_tokens <= total:
        raise ValueError(f"num_tokens={cell.num_tokens} must be in [1, {total}]")
    if cell.num_tokens < tokenizer.num_tokens and not tokenizer.ordered:
        raise ValueError(
            f"num_tokens={cell.num_tokens} must be {tokenizer.num_tokens}: this tokenizer decodes "
            "all of its tokens only"
        )
    own = {"num_steps": cell.num_steps, "guidance_scale": cell.guidance_scale}
    stated = {key: value for key, value in own.items() if value is not None}
    return tokenizer.decode_options({**options.decoding, **stated})


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


def hash_of(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
