"""Training from Python: fit() trains any objective on any torch data set."""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from torch.utils.data import Dataset

from flextok.autoencoder import Autoencoder
from flextok.config import ExperimentConfig
from flextok.cpu import accelerate
from flextok.data.buckets import sort_into
from flextok.data.datamodule import DataModule
from flextok.data.latents import LatentDataset
from flextok.data.loading import failures_in_one_line
from flextok.data.processes import is_first
from flextok.data.sets import adapt
from flextok.data.stream import Item, as_it_is, collate
from flextok.data.tokens import TokenDataset
from flextok.data.transforms import ImageTransform
from flextok.files import only_one, writing
from flextok.generators import Generator
from flextok.generators.conditioning import ClassConditioner
from flextok.hub import Pretrained
from flextok.nn.adapters import remove_adapters
from flextok.nn.blocks import recompute_blocks
from flextok.objectives.base import Objective
from flextok.pipeline import load
from flextok.schema import ConfigError, from_mapping, to_mapping
from flextok.tokenizers.base import Tokenizer
from flextok.training.callbacks import CodebookUsage, Progress, SkipNonFinite
from flextok.training.checkpoints import find_checkpoint, list_checkpoints, set_aside
from flextok.training.graphs import replayed
from flextok.training.module import TrainingModule
from flextok.training.optim import make_optimizer
from flextok.training.options import FitOptions
from flextok.training.record import (
    NOTHING_TO_DO,
    Record,
    check_start,
    describe,
    end_message,
    is_finished,
    start_message,
)
from flextok.training.saving import Checkpoints
from flextok.training.sharding import compile_blocks, is_sharded
from flextok.training.trainer import all_devices, check_devices, device_type, make_trainer
from flextok.training.validation import (
    Export,
    Images,
    draw_autoencoded,
    draw_reconstructions,
    export,
)

log = logging.getLogger(__name__)


def fit(
    objective: Objective,
    train_set: Dataset[Any],
    validation_set: Dataset[Any] | None = None,
    *,
    options: FitOptions,
    callbacks: Sequence[L.Callback] = (),
    experiment: ExperimentConfig | None = None,
) -> Pretrained:
    """Train objective.model, or continue where options.output_dir has a run of it. Returns it.

    Of a tokenizer, the data sets' items are {"image": ...}, (image, label) or images, which are
    what ImageTransform takes: PIL images, files, tensors (3, H, W), uint8 or float in [-1, 1]; a
    LatentDataset may be trained on, but not validated on, since validation also draws images. Of a
    generator they are
    {"indices": (k,), "label": ...} or {"indices": ..., "text": ...}, such as a TokenDataset's.

    options.output_dir becomes a model folder for from_pretrained. It also holds checkpoints/,
    logs/, pictures/ and starts/ (how the run was started each time). A kill at any moment loses
    nothing: the same call continues to the same weights. Raises Interrupted where a signal stopped
    the run, after it is saved, and ConfigError where output_dir has a run of a model, an objective
    or an optimizer that is not this one's, or a finished run of other settings.

    callbacks: Lightning's or your own, beside those that every run has. experiment: what
    output_dir's config.yaml is to hold."""
    options = from_mapping(
        FitOptions, {**to_mapping(options), "output_dir": str(options.output_dir)}
    )
    check_devices(options)
    if isinstance(validation_set, LatentDataset):
        raise ConfigError("validation_set is a LatentDataset: validation reads images, give those")
    folder = Path(options.output_dir)
    leads = is_first()
    with only_one(folder) if leads else nullcontext(), writing(folder, only_full=True):
        checkpoints, validates = folder / "checkpoints", validation_set is not None
        newest = max(list_checkpoints(checkpoints), default=0) if options.resume else 0
        if newest and experiment is None:  # else train() has compared it
            changes = check_start(folder, options, objective, newest)
            if changes and leads:
                log.info("with other settings from here on: %s", describe(changes))
        if newest and is_finished(folder, newest, options.max_steps, validates):
            log.warning(NOTHING_TO_DO, folder, newest)
            return take_over(objective.model, folder)
        objective.model.check_place(folder)
        if leads:
            check_warmup(options)
            for text in objective.warnings:
                log.warning(text)
        L.seed_everything(options.seed, verbose=False)
        objective.prepare()
        if isinstance(train_set, LatentDataset):
            train_set.check_made_for(objective)
        check_fit(objective, options, isinstance(train_set, LatentDataset))  # before it writes
        objective.train()
        if options.checkpoint_blocks:
            recompute_blocks(objective.model)
        if device_type(options.accelerator) == "cpu":
            accelerate(objective)
        module = TrainingModule(objective, options)
        model = objective.model
        data = make_data(model, train_set, validation_set, options)
        last = find_checkpoint(checkpoints, module) if options.resume else None
        saving = Checkpoints(checkpoints, options)
        trainer = make_trainer(
            options,
            validates,
            [
                Record(folder, experiment),
                *([LearningRateMonitor("step")] if options.loggers else []),
                Progress(refresh_rate=10),
                SkipNonFinite(folder, options.max_nonfinite),
                *image_callbacks(model, data, options),
                *callbacks,
                Export(folder),
                saving,
            ],
        )
        if last is not None:
            step = int(last.stem.removeprefix("step-"))
            log.info("continuing from %s, step %d", last, step)
            # Lightning does not start a run that is at its end, where only the last validation or
            # the export is missing: Checkpoints takes this one step back
            trainer.fit_loop.epoch_loop.max_steps = max(options.max_steps, step + 1)
        elif leads and not options.resume:
            set_aside(checkpoints)
        if options.compile:
            compile_blocks(model)
        if leads:
            log.info("%s", start_message(module, data, trainer))
        with failures_in_one_line(), replayed(objective) if options.cuda_graphs else nullcontext():
            path = None if last is None else str(last)
            trainer.fit(module, data, ckpt_path=path, weights_only=True)
        # the averaged weights are in place, and the objective is finished
        export(model, folder, trainer.global_step, trainer.is_global_zero)
        trainer.strategy.barrier()  # what follows on any process may start from this model
        if leads:
            log.info("%s", end_message(model, folder, trainer.global_step, saving))
        if model.adapters is not None and not is_sharded(model):
            merge(model)
    return load(folder) if is_sharded(model) else model.eval()


def take_over(model: Pretrained, folder: Path) -> Pretrained:
    """The model with the weights that a finished run has left."""
    if model.adapters is not None:
        merge(model)
    try:
        found = load(folder)
        model.load_state_dict(found.state_dict())
        model.config = found.config
    except RuntimeError as error:
        raise ConfigError(
            f"{folder} holds a finished run of another model: choose another output_dir, or "
            f"resume=False to start over there ({error})"
        ) from None
    return model.eval()


def merge(model: Pretrained) -> None:
    """Make a model that was trained by LoRA one without adapters, which it saves whole."""
    remove_adapters(model)
    model.adapters = None


def check_fit(objective: Objective, options: FitOptions, cached: bool = False) -> None:
    """Raises ConfigError for what a run cannot do with an objective that is prepared. cached: the
    training set is a LatentDataset."""
    check_sharding(objective, options, cached)
    make_optimizer(objective, options.optim)
    model = objective.model
    if options.revive_every and not (isinstance(model, Tokenizer) and model.vocab_size):
        raise ConfigError(f"trainer.revive_every={options.revive_every} needs a codebook (vq)")


def check_sharding(objective: Objective, options: FitOptions, cached: bool = False) -> None:
    """Refuse what a model that is shared out over processes cannot do. cached: the training set is
    a LatentDataset."""
    if options.strategy != "fsdp2":
        return
    if options.optim.name == "muon":
        raise ConfigError("optim.name=muon needs whole matrices: take trainer.strategy=ddp")
    asked = {
        "a discriminator": len(objective.parts()) > 1,
        "an autoencoder, whose latents are measured,": isinstance(objective.model, Autoencoder),
        "trainer.revive_every": options.revive_every,
    }
    for name in (name for name, value in asked.items() if value):
        raise ConfigError(
            f"trainer.strategy=fsdp2 shards the model, and {name} needs it whole: take ddp"
        )
    here = options.count_devices(all_devices(device_type(options.accelerator)))
    processes = here * options.num_nodes
    lengths = getattr(objective, "nested_dropout", None)
    if cached and "keep" in objective.frozen_columns():  # the lengths are the cache's
        lengths = None
    draws = getattr(objective.config, "draws_per_image", 1)
    if lengths is not None and processes > 1 and not lengths.is_even(options.batch_size * draws):
        times = f" times objective.draws_per_image={draws}" if draws > 1 else ""
        raise ConfigError(
            f"data.batch_size={options.batch_size}{times} must be a multiple of "
            f"objective.batch_lengths={objective.config.batch_lengths} with "
            f"trainer.strategy=fsdp2 on {processes} processes: nested_dropout={lengths.name} "
            "would give some more lengths than others, and each length runs the sharded model "
            "once more, which all must do alike; change one of these, or take ddp"
        )


def check_warmup(options: FitOptions) -> None:
    """Warn of a learning rate that still rises when the run ends."""
    warmup, steps = options.optim.warmup_steps, options.max_steps
    if warmup >= steps:
        log.warning(
            "optim.warmup_steps=%d is not below trainer.max_steps=%d: the learning rate rises to "
            "the last step, to %.3g%% of optim.lr, and never falls; set optim.warmup_steps to %d, "
            "say, or raise trainer.max_steps",
            *(warmup, steps, 100 * steps / warmup, steps // 20),
        )


def make_data(
    model: Pretrained, train_set: Any, validation_set: Any | None, options: FitOptions
) -> DataModule:
    """The run's batches. Images are brought to the model's size, in training each to the one of its
    shapes that is nearest; a generator's items are taken as they are."""
    buckets = None
    prepare: Callable[[Item, torch.Generator | None], Item] = as_it_is
    if not isinstance(model, Generator):
        train_set = adapt(train_set)
        validation_set = None if validation_set is None else adapt(validation_set)
        size = model.config.image_size
        prepare = ImageTransform(size, options).prepare
        model.metadata["class_names"] = list(train_set.class_names)
        if isinstance(model, Tokenizer) and len(model.shapes) > 1:
            buckets = sort_into(train_set, model.shapes, options.num_workers)
    elif isinstance(train_set, TokenDataset) and isinstance(model.conditioner, ClassConditioner):
        model.metadata.setdefault("class_names", list(train_set.class_names))
        if isinstance(validation_set, TokenDataset):  # its labels may count in other names
            validation_set.count_classes_in(train_set.class_names)
    return DataModule(
        train_set,
        validation_set,
        prepare,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        seed=options.seed,
        buckets=buckets,
    )


def image_callbacks(model: Any, data: DataModule, options: FitOptions) -> list[L.Callback]:
    """A run's callbacks that log the use of its codebook and draw validation images."""
    found: list[L.Callback] = []
    if isinstance(model, Tokenizer) and model.vocab_size:
        every = options.revive_every or options.log_every
        found.append(
            CodebookUsage(model.quantizer, every, bool(options.revive_every), options.seed)
        )
    samples = data.evaluation
    if samples is not None and options.num_pictures and not isinstance(model, Generator):
        count = min(options.num_pictures, len(samples))
        shown = collate([samples[i * len(samples) // count] for i in range(count)])
        if shown:
            folder = Path(options.output_dir) / "pictures"
            draw = draw_autoencoded if isinstance(model, Autoencoder) else draw_reconstructions
            found.append(Images(folder, draw(shown["image"])))
    return found
