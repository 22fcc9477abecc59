"""What training minimises: a module that holds the model and computes its losses on a batch."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flextok.draws import BatchDraws
from flextok.hub import Pretrained
from flextok.nn.adapters import Adapters, LoraOptions, add_adapters
from flextok.schema import ConfigError

log = logging.getLogger(__name__)
M = TypeVar("M", bound=Pretrained)


class Part(NamedTuple):
    """A part of an objective, whose gradients are clipped apart from those of the other parts."""

    module: nn.Module
    lr: float | None = None  # None = the optimizer's


class Objective(nn.Module):
    """Holds the model that is trained and exported, and what only training needs. DDP, FSDP2,
    accelerate and torch.compile wrap it and call its forward."""

    config_class: ClassVar[type]
    warnings: tuple[str, ...] = ()  # that a training gives before its first step
    models: ClassVar[tuple[str, ...]]  # the types of models that it trains
    starts: ClassVar[tuple[str, ...]] = ()  # the trained models that it may begin with, by name
    model: Any
    config: Any
    step: int = 0  # optimizer steps done, set by whoever trains

    def __init__(self, model: Pretrained, config: Any = None, **start: Pretrained):
        """config: of `config_class`, with its defaults if None; start: trained models to begin
        with, see `begin`. Raises ConfigError for what does not fit."""
        super().__init__()
        if model.model_type not in self.models:
            raise ConfigError(
                f"{type(self).__name__} trains {' and '.join(self.models)} models, not a "
                f"{model.model_type}"
            )
        for name in start:
            if name not in self.starts:
                known = ", ".join(self.starts) or "none"
                raise ConfigError(
                    f"unknown model to start from {name!r}: {type(self).__name__} takes {known}."
                )
        self.model, self.config = model, self.config_class() if config is None else config
        for parameter in model.held:  # by an earlier objective of the same model
            parameter.requires_grad_(True)
        model.held = ()
        self.begin(**start)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError("nothing of the model is trained: its parameters require no gradient")

    def begin(self) -> None:
        """Set up what training needs; parameters are the trained models that `starts` lists."""

    def prepare(self, pretrained: bool = True) -> None:
        """Load what training needs, before the optimizer is made; a second call changes nothing.
        pretrained: with the weights of networks that others trained."""

    def frozen_columns(self) -> tuple[str, ...]:
        """The names of what `forward` takes in place of images, as `frozen` returns it; none where
        no first part of the model is frozen."""
        return ()

    def frozen_identity(self) -> dict[str, Any]:
        """All that `frozen` depends on beside the batch, as plain data: settings, and hashes of
        weights."""
        return {}

    def frozen(self, batch: Mapping[str, Any], draws: BatchDraws) -> dict[str, Tensor]:
        """What the model's frozen first part makes of "image" (B, 3, H, W) in [-1, 1], by name,
        without gradients: "latents" (B, C, h, w) and others that an objective may need. forward
        takes a batch with these as well, so that they can be cached (data/latents.py). draws: of
        the batch's rows. Raises ConfigError where nothing is frozen."""
        raise ConfigError(f"{type(self).__name__} has no frozen first part here: nothing to cache")

    def forward(
        self, batch: Mapping[str, Any], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """batch: "image" (B, 3, H, W) in [-1, 1] for a tokenizer; "indices" (B, k) and "label" or
        "text" for a generator; "row": the rows' numbers in the whole batch of the step, over
        processes and micro-batches, 0 .. B-1 by default. Returns scalars; "loss" is the total.

        What is drawn for a row depends on the generator's state and the row's number alone."""
        raise NotImplementedError

    def parts(self) -> list[Part]:
        """The parts whose gradients are clipped, and whose learning rates are set, apart."""
        return [Part(self)]

    def before_step(self, mean: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        """Called before each step of the optimizer. mean: averages a tensor over processes."""

    def finish(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Called before each export, with the averaged weights in place. batches: some of the
        training set, without augmentation, the same each time."""


def draws_of(batch: Mapping[str, Any], key: str, generator: torch.Generator | None) -> BatchDraws:
    return BatchDraws(len(batch[key]), generator, batch.get("row"))


def need(name: str, model: Pretrained | None, kind: type[M]) -> M:
    """The trained model that an objective begins with. Raises ConfigError unless it is one of this
    kind."""
    if isinstance(model, kind):
        return model
    found = "nothing" if model is None else f"a {model.model_type} model"
    raise ConfigError(
        f"training starts from a trained {kind.model_type} model: name its folder or hub id as "
        f"start.{name} (got {found})"
    )


def take_over(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a trained module's state dict. Raises ConfigError where its sizes are others."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(f"model must have the sizes of what it starts from: {error}") from None


def begin_with(model: Pretrained, trained: Pretrained, without: tuple[str, ...] = ()) -> None:
    """Take over a trained model's weights, but those whose names begin with one of `without`. What
    `model.resizable` names may have another size: positions are interpolated; of registers, tokens
    and classes those that both have are taken over, and the model's others stay as they are. A line
    in the log states this. Raises ConfigError for other sizes."""
    ours = model.state_dict()
    state = {k: v for k, v in trained.state_dict().items() if not k.startswith(without)}
    labels = [m.metadata.get("class_names") or [] for m in (trained, model)]
    for name, how in model.resizable:
        if name not in state or name not in ours:
            continue
        old, new = state[name], ours[name]
        before, now = len(old), len(new)
        if how == "classes":
            conditioners: list[Any] = [m.get_submodule("conditioner") for m in (trained, model)]
            before, now = (conditioner.num_classes for conditioner in conditioners)
        pairs = [(i, i) for i in range(min(before, now))]
        if how == "classes" and all(labels):
            here = {label: i for i, label in enumerate(labels[1])}
            pairs = [(i, here[label]) for i, label in enumerate(labels[0]) if label in here]
        if len(old) > before and len(new) > now:  # the one for no class
            pairs.append((before, now))
        if old.shape == new.shape and pairs == [(i, i) for i in range(len(new))]:
            continue
        if how in ("grid", "flat"):
            state[name], kept = interpolated(old, new, how), "interpolated"
        elif old.shape[1:] != new.shape[1:]:
            continue  # of another width, which take_over refuses
        else:
            state[name] = new.clone()
            for i, j in pairs:
                state[name][j] = old[i]
            kept = f"{len(pairs)} taken over, {len(new) - len(pairs)} new"
        log.info("start: %s goes from %s to %s: %s", name, [*old.shape], [*new.shape], kept)
    codes = [m.metadata.get("codes_id") for m in (trained, model)]
    if None not in codes and codes[0] != codes[1]:
        log.warning(
            "start: the generator was trained on codes %s, this tokenizer has %s: indices meant "
            "other images there, so that its embeddings and head help less",
            *codes,
        )
    take_over(model, state)


def times_left_out(sample: Callable[[Tensor], Tensor], spec: Mapping[str, Any]) -> tuple[str, ...]:
    """A warning for a decoder that is trained from nothing: of the times that sample, built of
    spec, makes of uniform draws, some have to be near 1, which decoding begins with."""
    times = sample(torch.linspace(0, 1, 10_001, device="cpu"))
    if (times > 0.97).double().mean() >= 1e-3:
        return ()
    return (
        f"objective.time_sampler={dict(spec)}: fewer than one time in 1,000 is above 0.97, and "
        "decoding begins at 1, where a decoder trained from nothing then returns anything. Add "
        "uniform times (thick_tailed), or go on from a model that has learnt these (start.weights)",
    )


def choose_trained(
    model: Pretrained,
    trained: Pretrained | None,
    options: LoraOptions | None,
    whole: list[str] | None,
) -> None:
    """Train the parts in `whole`, as train_only, or with options the adapters of a model that goes
    on from `trained`, and these parts beside them. Raises ConfigError where there is nothing to go
    on from, and for other weights that are not its."""
    if options is None:
        train_only(model, whole)
        return
    if trained is None:
        raise ConfigError("objective.lora changes a trained model: name one as start.weights")
    if trained.home is None:
        raise ConfigError(
            "objective.lora: what is saved names the model that it changes: save that one first, "
            "and load it"
        )
    train_only(model, whole)
    ends = tuple(f"{part}." for part in whole or ())
    theirs = trained.state_dict()
    for name, value in model.state_dict().items():
        same = name in theirs and theirs[name].shape == value.shape
        same = same and (value.is_meta or torch.equal(value, theirs[name].to(value)))
        if not same and not name.startswith(ends):
            raise ConfigError(
                f"objective.lora keeps {name} as start.weights has it, and this model's is of "
                f"another size or order: name its part, {name.split('.')[0]}, in objective.train"
            )
    learn = [p for name, p in model.named_parameters() if ends and name.startswith(ends)]
    config = add_adapters(model, options, whole)
    for parameter in learn:
        parameter.requires_grad_(True)
    model.adapters = Adapters(config, trained.home, ends)


def interpolated(old: Tensor, new: Tensor, how: str) -> Tensor:
    """Learned or fixed positions `old` at the places of `new`, by bicubic interpolation. how: grid
    (1, D, h, w), or flat (1 + h w, D) of a square, whose first row stays."""
    if how == "grid":
        return F.interpolate(old, tuple(new.shape[-2:]), mode="bicubic")
    sides = [math.isqrt(len(x) - 1) for x in (old, new)]
    grid = old[1:].T.reshape(1, -1, sides[0], sides[0])
    grid = F.interpolate(grid, (sides[1], sides[1]), mode="bicubic")
    return torch.cat([old[:1], grid.flatten(2)[0].T])


def train_only(model: Pretrained, parts: list[str] | None) -> None:
    """Freeze all parameters outside of these parts, named by their place; None = train all."""
    if parts is None:
        return
    known = dict(model.named_modules())
    unknown = [part for part in parts if part not in known]
    if unknown or not parts:
        names = [name for name, _ in model.named_children()]
        raise ConfigError(f"objective.train={unknown} names no part of the model: {names}")
    learn = {p for part in parts for p in known[part].parameters()}
    hold(model, (p for p in model.parameters() if p not in learn))


def hold(model: Pretrained, parameters: Iterable[nn.Parameter]) -> None:
    """Freeze those of a model that are trained, until another objective takes it."""
    frozen = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    model.held = (*model.held, *frozen)
