"""What a run will need, before it runs: memory, arithmetic, data and money, from its config.

The objective is built without memory (PyTorch's meta device), and costs.py has formulas for its
arithmetic and activations. Speed and price are assumptions, printed with the result.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from flextok.autoencoder import Autoencoder
from flextok.card import count_parameters
from flextok.config import ExperimentConfig
from flextok.data.latents import check_cacheable, row_bytes
from flextok.generators import GENERATORS
from flextok.generators.conditioning import CONDITIONERS
from flextok.losses.perceptual import PerceptualLoss
from flextok.nn.blocks import recompute_blocks, transformer_blocks
from flextok.nn.frozen import Frozen, NeedsWeights
from flextok.objectives import Objective, default_objective, make_objective
from flextok.pipeline import load
from flextok.registry import TASKS, build_model, like_start
from flextok.schema import ConfigError, check_number, named_spec
from flextok.tokenizers import FlexTok, MaskGITVQGAN, TiTok
from flextok.training.costs import Formulas, an_image


class GPU(NamedTuple):
    """A card by its maker's figures: SXM versions' data sheets, and the white papers of GA102, Ada
    and RTX Blackwell. Matrix products of bf16, dense, added up in fp32."""

    peak: float  # operations a second
    memory: float  # bytes
    price: float | None  # dollars an hour that we assume; None for a card of one's own


GPUS = {
    "a100": GPU(312e12, 80e9, 2.5),
    "h100": GPU(989e12, 80e9, 2.5),
    "h200": GPU(989e12, 141e9, 2.5),
    "rtx3090": GPU(71e12, 24e9, None),
    "rtx4090": GPU(165.2e12, 24e9, None),
    "rtx5090": GPU(209.5e12, 32e9, None),
}
PUBLISHED_BATCH = 2048  # of FlexTok at 256 pixels: arXiv 2502.13967, appendix


@dataclass
class Step:
    """A training step of one sample, and the model that takes it."""

    flops: float  # multiplications and additions: forward, backward and what is recomputed
    saved: float  # bytes kept for the backward pass
    trained: int  # parameters
    frozen: int  # of the model itself
    beside: int  # of frozen networks that it looks at
    block: int  # parameters of the largest transformer block
    rest: int  # parameters outside of blocks
    front: float = 0.0  # operations of the frozen first part that a latent cache spares
    row: int = 0  # bytes of a sample in that cache


@dataclass
class Assumptions:
    gpu: str = "h100"
    utilisation: float = 0.35  # of the peak arithmetic
    price: float | None = None  # dollars an hour and GPU; None = as GPUS has it
    picture_kb: float = 110.0  # a file of the data; ImageNet's mean

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise ConfigError(f"unknown gpu {self.gpu!r}; known: {', '.join(GPUS)}")
        if not 0 < self.utilisation <= 1:
            raise ConfigError(f"utilisation={self.utilisation} must be in (0, 1]")
        if self.price is None:
            self.price = GPUS[self.gpu].price
        check_number("price", self.price or 0, 0, 1e6, hint=" dollars an hour")
        check_number("picture_kb", self.picture_kb, 0, 1e9)


@dataclass
class Plan:
    gpus: int
    strategy: str
    trained: int  # parameters
    frozen: int
    batch_size: int  # of a step: all GPUs', accumulated
    accumulate: int  # micro-batches of a step on each GPU
    config_batch_size: int  # of a step on the devices and nodes that the config names
    published_batch_size: int | None  # of FlexTok's paper, for a model of its kind
    flops_per_step: float
    front_per_step: float  # operations of the frozen first part, with a latent cache too
    cached: bool  # from a latent cache, which spares them
    row_bytes: int  # of a cached sample
    memory: dict[str, float]  # bytes on each GPU, by what they hold
    fits: bool
    traffic: float  # bytes that each GPU sends a step
    seconds_per_step: float
    samples_per_second: float
    data_per_second: float  # bytes, for all GPUs
    hours: float
    dollars: float | None
    assumptions: Assumptions


def plan(config: ExperimentConfig, gpus: int, assumptions: Assumptions | None = None) -> Plan:
    """The needs of a run on `gpus` GPUs. Where the config names more devices, fewer GPUs take the
    same batch by accumulating more; where it names fewer, the batch grows by the GPUs."""
    if gpus < 1:
        raise ConfigError(f"gpus={gpus} must be at least 1")
    assumed = assumptions or Assumptions()
    card = GPUS[assumed.gpu]
    step, devices = measure(config), named_devices(config, gpus)
    accumulate = config.trainer.accumulate * max(1, math.ceil(devices / gpus))
    width = 2 if is_half(config) else 4  # bytes of a gathered weight of a block
    sharded = config.trainer.strategy == "fsdp2"
    share = gpus if sharded else 1
    # fp32: weight, gradient, AdamW's two moments (Muon has one), average
    memory = {
        "weights": 4 * step.trained / share,
        "gradients": 4 * step.trained / share,
        "optimizer": 8 * step.trained / share,
        "average": (4 if config.optim.ema_decay > 0 else 0) * step.trained / share,
        "frozen weights": 4 * (step.frozen / share + step.beside),
        "activations": step.saved * config.data.batch_size,
    }
    ring = (gpus - 1) / gpus  # so much of its data does a process send in gathering or reducing
    if sharded:  # the block at work, the next one, what lies outside of blocks; their gradients too
        memory["gathered"] = 2 * (4 * step.rest + width * 2 * step.block)
        gathered = width * (step.trained + step.frozen - step.rest) + 4 * step.rest
        traffic = ring * accumulate * (2 * gathered + 4 * step.trained)
    else:
        memory["buckets"] = (4 if gpus > 1 else 0) * step.trained  # DDP's, of gradients
        traffic = ring * 2 * 4 * step.trained
    published = config.model.get("name") == "flextok" and config.model.get("image_size", 256) == 256
    batch = config.data.batch_size * gpus * accumulate
    seconds = step.flops * batch / (gpus * card.peak * assumed.utilisation)
    hours = seconds * config.trainer.max_steps / 3600
    sample = assumed.picture_kb * 1e3
    cached = config.data.latent_variants > 0
    if cached:
        sample = step.row
    if config.task == "generator":
        sample = 2 * build(config).model.num_tokens + 8
    return Plan(
        gpus=gpus,
        strategy=config.trainer.strategy,
        trained=step.trained,
        frozen=step.frozen + step.beside,
        batch_size=batch,
        accumulate=accumulate,
        config_batch_size=config.data.batch_size * devices * config.trainer.accumulate,
        published_batch_size=PUBLISHED_BATCH if published else None,
        flops_per_step=step.flops * batch,
        front_per_step=step.front * batch,
        cached=cached,
        row_bytes=step.row,
        memory=memory,
        fits=sum(memory.values()) < 0.92 * card.memory,  # the rest: CUDA, NCCL, fragmentation
        traffic=traffic,
        seconds_per_step=seconds,
        samples_per_second=batch / seconds,
        data_per_second=batch / seconds * sample,
        hours=hours,
        dollars=None if assumed.price is None else hours * gpus * assumed.price,
        assumptions=assumed,
    )


def named_devices(config: ExperimentConfig, gpus: int) -> int:
    """How many GPUs the config's devices and num_nodes are; those asked for where it has auto."""
    trainer = config.trainer
    return trainer.count_devices(auto=0) * trainer.num_nodes or gpus


def is_half(config: ExperimentConfig) -> bool:
    return config.trainer.precision in ("auto", "bf16-mixed")  # auto is bf16 on these GPUs


def measure(config: ExperimentConfig) -> Step:
    """A training step of one sample."""
    objective = build(config)
    if config.data.latent_variants:
        check_cacheable(objective)
    beside = frozen_networks(objective)
    if is_half(config):  # nearly what autocast computes and keeps
        for network in (objective, *beside):
            network.to(torch.bfloat16)
    sizes = [(p.numel(), p.requires_grad) for p in objective.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    parts = [count_parameters(block) for block in transformer_blocks(objective.model)]
    frozen = total - trained
    outside = total - sum(parts)
    cached = config.data.latent_variants > 0
    formulas = Formulas(is_half(config), config.trainer.checkpoint_blocks, cached)
    cost = formulas.step(objective)
    around = sum(count_parameters(network) for network in beside)
    front, row = 0.0, 0
    if objective.frozen_columns():
        costs = formulas.front(objective, an_image(objective.model))
        front, row = sum(cost.flops for cost in costs), row_bytes(objective)
    largest = max(parts, default=0)
    return Step(cost.flops, cost.saved, trained, frozen, around, largest, outside, front, row)


META = torch.device("meta")


def build(config: ExperimentConfig, device: torch.device = META) -> Objective:
    """What trains the model of `config`, on a device, without any trained weights. A
    generator's sizes come from its tokenizer where that is at hand, else from the config and the
    published tokenizer (64,000 codes, 256 tokens)."""
    start = {}
    for name, path in config.start.items():
        with suppress(ValueError):  # it is not trained yet: the config states the sizes
            start[name] = load(path, "meta")
    spec = like_start(config.model, start)
    if config.task == "tokenizer" and isinstance(spec.get("vae"), dict):
        auto = {"shift": 0.0, "scale": 1.0}  # measured when it trains
        spec["vae"] = {k: auto.get(k) if v == "auto" else v for k, v in spec["vae"].items()}
    with device:
        if config.task != "generator":
            model = build_model(TASKS[config.task], spec)
        else:
            derived: dict[str, Any] = {}
            try:
                tokenizer = load(str(config.tokenizer), "meta")
                derived = {"vocab_size": tokenizer.vocab_size, "num_tokens": tokenizer.num_tokens}
            except ValueError:
                pass
            conditioner = named_spec(
                spec.get("conditioner", "class"), "conditioner", list(CONDITIONERS)
            )
            if conditioner["name"] == "class":
                conditioner = {"num_classes": 1000, **conditioner}
            model = build_model(GENERATORS, {**derived, **spec, "conditioner": conditioner})
        spec = dict(config.objective)
        if config.task == "generator":
            spec["cond_drop"] = 0.0  # costs nothing, and its null text needs an encoder
        elif config.task == "tokenizer" and spec.get("name") != "cross_length":
            spec["nested_dropout"] = "none"  # at its dearest; cross_length compares prefixes
        objective = make_objective(model, spec, starts(model, spec))
        objective.prepare(pretrained=False)
        for module in model.modules():
            if isinstance(module, NeedsWeights):
                module.has_weights = True
        if config.trainer.checkpoint_blocks:
            recompute_blocks(model)
    objective.step = 10**9  # at its dearest: a discriminator learns
    return objective.train()


def starts(model: Any, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Models without weights in place of those that training would start from."""
    name = spec.get("name", default_objective(model))
    if spec.get("lora"):
        trained = type(model)(model.config)
        trained.home = Path()
        return {"weights": trained}
    if name == "drawing":
        return {"weights": FlexTok(replace(model.config, drawer=None))}
    if name in ("distillation", "drawing_distillation"):
        return {"teacher": FlexTok(model.config)}
    if isinstance(model, Autoencoder):
        ones = [1.0] * model.config.channels
        return {"weights": Autoencoder(replace(model.config, latents_mean=ones, latents_std=ones))}
    if isinstance(model, TiTok) and model.config.stage != "single":
        proxy = MaskGITVQGAN(replace(model.config.proxy, image_size=model.image_size))
        first = TiTok(replace(model.config, stage="proxy"))
        return {"proxy": proxy} | ({"first": first} if model.config.stage == "finetune" else {})
    return {}


def frozen_networks(objective: Objective) -> list[nn.Module]:
    """The networks that training looks at and that are no part of the model."""
    held = [value for module in objective.modules() for value in vars(module).values()]
    lists = [list(value.networks.values()) for value in held if isinstance(value, PerceptualLoss)]
    found = [value for value in held if isinstance(value, Frozen)]
    return [frozen.network for frozen in (*found, *chain(*lists))]


def as_text(found: Plan) -> str:
    """The plan as lines to print."""
    assumed = found.assumptions
    total = sum(found.memory.values())
    capacity = GPUS[assumed.gpu].memory
    frozen = f" and {found.frozen / 1e6:,.0f}M frozen" if found.frozen else ""
    micro = found.batch_size // (found.gpus * found.accumulate)
    batch = f"batch {found.batch_size:,}: {micro:,} a GPU" + (
        f", trainer.accumulate={found.accumulate}" if found.accumulate > 1 else ""
    )
    money = ""
    if found.dollars is not None:
        money = f", ${found.dollars:,.0f} at ${assumed.price:.2f} a GPU hour"
    others = {
        "config's own": found.config_batch_size,
        "published models'": found.published_batch_size,
    }
    front = []
    if found.front_per_step:
        spent, each = (
            f"{found.front_per_step / 1e12:,.1f} TFLOP",
            f"{found.row_bytes / 1e3:,.0f} KB",
        )
        share = found.front_per_step / found.flops_per_step
        not_cached = f"{spent} of these ({share:.0%}); data.latent_variants would cache {each} each"
        cached = f"{spent} a step are spared by a latent cache of {each} an encoding"
        front = [f"  frozen encoder  {cached if found.cached else not_cached}"]
    lines = [
        f"model           {found.trained / 1e6:,.0f}M trained{frozen} parameters",
        f"run             {found.gpus} x {assumed.gpu}, {found.strategy}, {batch}",
        *(
            f"  assumed       a batch of {found.batch_size:,}; the {whose} is {other:,}, whose "
            f"steps take {other / found.batch_size:,.3g} times as long"
            for whose, other in others.items()
            if other not in (None, found.batch_size)
        ),
        f"arithmetic      {found.flops_per_step / 1e12:,.1f} TFLOP a step, "
        f"{found.seconds_per_step:.3f} s at {assumed.utilisation:.0%} of the peak",
        *front,
        f"memory          {total / 1e9:,.1f} of {capacity / 1e9:,.0f} GB on each GPU"
        + ("" if found.fits else ": DOES NOT FIT"),
        *(f"  {name:<14} {size / 1e9:,.1f} GB" for name, size in found.memory.items() if size),
        f"traffic         {found.traffic / 1e9:,.1f} GB sent by each GPU a step, "
        f"{found.traffic / 1e9 / found.seconds_per_step:,.1f} GB/s",
        f"data            {found.samples_per_second:,.0f} samples/s, "
        f"{found.data_per_second / 1e6:,.1f} MB/s for all GPUs",
        f"whole run       {found.hours:,.1f} hours for all steps of this batch, "
        f"{found.hours * found.gpus:,.0f} GPU hours{money}",
    ]
    if not found.fits:
        lines.append(
            "to make it fit  trainer.strategy=fsdp2, trainer.checkpoint_blocks=true, or a smaller "
            "data.batch_size with trainer.accumulate"
        )
    return "\n".join(lines)
