"""One training run from an ExperimentConfig: build, train, export."""

import json
import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import ConcatDataset

from flextok.config import ExperimentConfig, load_experiment, save_experiment
from flextok.data.datamodule import DataModule, prepare_image, prepare_tokens
from flextok.data.datasets import DATASETS, take
from flextok.data.stream import EvaluationSet, collate
from flextok.data.tokens import TokenDataset, build_token_cache
from flextok.data.transforms import ImageTransform
from flextok.evaluation.evaluate import evaluate_generator, evaluate_tokenizer
from flextok.evaluation.features import load_networks
from flextok.evaluation.job import Cell, Options
from flextok.generators import GENERATORS
from flextok.hub import CheckpointError, atomic_write, fingerprint
from flextok.pipeline import load_model, remember_tokenizer
from flextok.schema import ConfigError, build, from_mapping, unknown_key
from flextok.tokenizers import TOKENIZERS
from flextok.training.callbacks import (
    Evaluation,
    Export,
    Pictures,
    draw_generations,
    draw_reconstructions,
    ema,
    export,
)
from flextok.training.modules import GeneratorModule, TokenizerModule, TrainingModule
from flextok.vae import KLVAE

log = logging.getLogger(__name__)


def train(config: ExperimentConfig) -> Path:
    """Train (or continue) the run that `config` describes. Returns its output_dir, which is a model
    folder for from_pretrained and also holds checkpoints/, logs/, pictures/ and config.yaml."""
    L.seed_everything(config.seed, verbose=False)
    folder = Path(config.output_dir)
    last = folder / "checkpoints" / "last.ckpt"
    resume = config.resume and last.exists()
    state = None
    if resume:
        check_same_model(folder / "config.yaml", config)
        state = load_checkpoint(last)
        log.info("continuing from %s, step %d", last, state["global_step"])
    if config.task == "tokenizer":
        module, data, draw = tokenizer_run(config)
        evaluate = evaluation(config, None)
    else:
        tokenizer = load_tokenizer(config)
        module, data, draw = generator_run(config, folder, tokenizer)
        evaluate = evaluation(config, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "config.yaml", lambda p: save_experiment(config, p))
    if state is not None and state["global_step"] >= config.trainer.max_steps:
        module.load_state_dict(state["state_dict"])  # the averaged weights, if there is an average
        export(module.model, folder, state["global_step"])
        return folder
    del state
    trainer = make_trainer(config, folder, draw, evaluate)
    trainer.fit(module, data, ckpt_path=str(last) if resume else None, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if trainer.is_global_zero:  # fit leaves the averaged weights in place
        export(module.model, folder, trainer.global_step)
    return folder


def make_dataset(spec: dict[str, Any] | list[dict[str, Any]]) -> Any:
    """Build the dataset that a spec names; a list of specs is concatenated."""
    if isinstance(spec, dict):
        return build(DATASETS, spec, "dataset")
    parts = [build(DATASETS, part, "dataset") for part in spec]
    joined: Any = ConcatDataset(parts)
    joined.class_names = parts[0].class_names
    return joined


def build_model(registry: dict[str, Any], spec: dict[str, Any]) -> Any:
    """Build the model that `spec` names: {"name": "flextok", **its config's keys}."""
    keys = dict(spec)
    name = str(keys.pop("name", None))
    if name not in registry:
        raise unknown_key("model", name, list(registry))
    cls = registry[name]
    return cls(from_mapping(cls.config_class, keys, "model"))


def tokenizer_run(config: ExperimentConfig) -> tuple[TrainingModule, DataModule, Any]:
    model = build_model(TOKENIZERS, config.model)
    if isinstance(model.vae, KLVAE):
        model.vae.load_weights()
    model.prepare_training()
    transform = make_transform(config, model.image_size)
    train_set = make_dataset(config.data.train)
    validation = make_dataset(config.data.validation) if config.data.validation else None
    model.metadata["class_names"] = list(train_set.class_names)
    prepare = prepare_image(transform)
    data = make_data(config, train_set, validation, prepare)
    module = TokenizerModule(model, config.optim, config.trainer.max_steps, config.seed)
    draw = None
    if validation is not None:
        count = min(config.trainer.num_pictures, len(validation))
        readable = EvaluationSet(validation, prepare)
        shown = collate([readable[i * len(validation) // count] for i in range(count)])
        draw = draw_reconstructions(shown["image"]) if shown else None
    return module, data, draw


def load_tokenizer(config: ExperimentConfig) -> Any:
    assert config.tokenizer is not None
    tokenizer = load_model(config.tokenizer)
    if tokenizer.model_type not in TOKENIZERS:
        raise ConfigError(f"tokenizer={config.tokenizer!r} holds a {tokenizer.model_type} model")
    return tokenizer


def generator_run(
    config: ExperimentConfig, folder: Path, tokenizer: Any
) -> tuple[TrainingModule, DataModule, Any]:
    assert config.tokenizer is not None
    cache = Path(config.data.token_cache or folder / "tokens")
    train_set = cached_tokens(config, tokenizer, cache / "train", config.data.train)
    validation = None
    if config.data.validation:
        validation = cached_tokens(
            config, tokenizer, cache / "validation", config.data.validation, augment=False
        )
    class_names = train_set.class_names
    derived: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "num_tokens": tokenizer.num_tokens,
        "conditioner": {"name": "class"},
    }
    spec = {**derived, **config.model}
    if spec["conditioner"].get("name") == "class":
        spec["conditioner"] = {"num_classes": len(class_names), **spec["conditioner"]}
    model = build_model(GENERATORS, spec)
    model.metadata["class_names"] = class_names
    remember_tokenizer(model, folder, tokenizer, config.tokenizer)
    data = make_data(config, train_set, validation, prepare_tokens)
    module = GeneratorModule(model, config.optim, config.trainer.max_steps, config.seed)
    cond = torch.arange(config.trainer.num_pictures) % max(1, len(class_names))
    return module, data, draw_generations(tokenizer, cond)


def evaluation(config: ExperimentConfig, tokenizer: Any) -> Any:
    """What the Evaluation callback runs: (model, folder) -> report. None where none is asked."""
    asked = config.evaluation
    if asked is None:
        return None
    assert config.data.validation is not None
    pictures = take(make_dataset(config.data.validation), asked.limit)
    options = Options(networks=tuple(asked.networks), batch_size=asked.batch_size, seed=config.seed)
    load_networks(options.networks)  # missing weights are told before training
    names = {"model": config.output_dir, "data": json.dumps(config.data.validation)}

    def evaluate(model: Any, folder: Path) -> dict[str, Any]:
        cells = [Cell(k) for k in asked.num_tokens or [model.num_tokens]]
        if tokenizer is None:
            return evaluate_tokenizer(model, pictures, cells, options, folder, names)
        tokenizer.to(next(model.parameters()).device)
        return evaluate_generator(model, tokenizer, pictures, cells, options, folder, names)

    return evaluate


def cached_tokens(
    config: ExperimentConfig, tokenizer: Any, folder: Path, spec: Any, augment: bool = True
) -> TokenDataset:
    transform = make_transform(config, tokenizer.image_size)
    augmentation = {"flip": transform.flip, "crop": transform.crop, "shift": transform.shift}
    build_token_cache(
        folder,
        tokenizer,
        make_dataset(spec),
        transform,
        identity={
            "tokenizer_fingerprint": fingerprint(tokenizer),
            "data": json.loads(json.dumps(spec)),
            "augmentation": augmentation,
        },
        variants=config.data.token_variants if augment else 1,
        num_workers=config.data.num_workers,
        seed=config.seed,
    )
    return TokenDataset(folder)


def make_transform(config: ExperimentConfig, size: int) -> ImageTransform:
    return ImageTransform(size, config.data.flip, config.data.crop, config.data.shift)


def make_data(
    config: ExperimentConfig, train_set: Any, validation: Any, prepare: Any
) -> DataModule:
    return DataModule(
        train_set,
        validation,
        prepare,
        batch_size=config.data.batch_size,
        num_workers=config.data.num_workers,
        seed=config.seed,
    )


def make_trainer(config: ExperimentConfig, folder: Path, draw: Any, evaluate: Any) -> L.Trainer:
    options = config.trainer
    precision: Any = options.precision
    if precision == "auto":
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        precision = "bf16-mixed" if has_bf16 else "32-true"
    validates = config.data.validation is not None
    checkpoint = ModelCheckpoint(
        folder / "checkpoints",
        filename="step-{step}",
        auto_insert_metric_name=False,
        every_n_train_steps=options.checkpoint_every,
        save_top_k=1,
        save_last="link",
        save_on_exception=True,
    )
    callbacks: list[L.Callback] = [
        checkpoint,
        LearningRateMonitor("step"),
        TQDMProgressBar(refresh_rate=10),
    ]
    if draw is not None:
        callbacks.append(Pictures(folder / "pictures", draw))
    if config.evaluation is not None:
        callbacks.append(Evaluation(folder / "evaluation", evaluate, config.evaluation.every))
    callbacks.append(Export(folder))
    if config.optim.ema_decay > 0:
        callbacks.append(ema(config.optim.ema_decay))
    return L.Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy=options.strategy,
        precision=precision,
        max_steps=options.max_steps,
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=config.optim.grad_clip or None,
        log_every_n_steps=options.log_every,
        val_check_interval=options.validate_every * options.accumulate if validates else None,
        check_val_every_n_epoch=None if validates else 1,
        limit_val_batches=None if validates else 0,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=[
            CSVLogger(folder / "logs", name="csv"),  # a resumed run adds a version_<n>
            TensorBoardLogger(folder / "logs", name="tensorboard", version=""),
        ],
        use_distributed_sampler=False,  # the stream and the validation set shard themselves
        enable_model_summary=False,
    )


def check_same_model(path: Path, config: ExperimentConfig) -> None:
    """A run continues only with the model that it began with."""
    if not path.exists():
        return
    found = load_experiment(path)
    if found.model != config.model or found.task != config.task:
        raise ConfigError(
            f"{path.parent} holds a run of another model: choose another output_dir, or pass "
            "resume=false to start over there"
        )


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A training checkpoint, memory-mapped. Raises CheckpointError when it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # zip, pickle and OS errors alike mean an unusable file
        raise CheckpointError(
            f"checkpoint {path} is truncated or damaged ({error}): remove it to start over, or "
            "point last.ckpt at an older step-*.ckpt"
        ) from None
