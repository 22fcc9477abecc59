"""One training run from an ExperimentConfig: build, train, export."""

import inspect
import json
import logging
import os
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from flextok.config import ExperimentConfig, TrainerConfig, load_experiment, save_experiment
from flextok.cpu import accelerate
from flextok.data.datamodule import DataModule, prepare_image, prepare_tokens
from flextok.data.datasets import DATASETS, take
from flextok.data.labels import Joined, list_names
from flextok.data.loading import told_in_one_line
from flextok.data.pictures import UNLABELLED
from flextok.data.pixels import measure_pixels
from flextok.data.processes import local_device, this_process
from flextok.data.stream import EvaluationSet, collate
from flextok.data.text import build_text_cache
from flextok.data.tokens import (
    TokenDataset,
    build_token_cache,
    cache_identity,
)
from flextok.data.transforms import ImageTransform
from flextok.data.web import WebDatasetStream
from flextok.evaluation import Cell, Options, evaluate
from flextok.evaluation.job import make_job
from flextok.files import atomic_write, only_one, read_mapping, writing
from flextok.generators import GENERATORS
from flextok.generators.conditioning import CONDITIONERS, TextConditioner
from flextok.generators.text import Text, load_encoder
from flextok.hub import fingerprint
from flextok.pipeline import expected_codes, load_model, remember_tokenizer
from flextok.places import CONFIG, WEIGHTS
from flextok.schema import (
    ConfigError,
    build,
    check_number,
    from_mapping,
    named_spec,
    to_mapping,
    unknown_key,
)
from flextok.storage import CheckpointError
from flextok.tokenizers import TOKENIZERS, FlexTokConfig
from flextok.tokenizers.base import same_codes
from flextok.training.adversarial import AdversarialModule
from flextok.training.average import Averaging, averaged
from flextok.training.callbacks import (
    CodebookUsage,
    Evaluation,
    Export,
    Pictures,
    Progress,
    draw_generations,
    draw_reconstructions,
    export,
)
from flextok.training.checkpoints import (
    Checkpoints,
    Events,
    Rows,
    Validations,
    WholeFiles,
    check_fits,
    find_checkpoint,
    load_checkpoint,
    read_validated,
    set_aside,
)
from flextok.training.finite import SkipNonFinite
from flextok.training.modules import GeneratorModule, TokenizerModule, TrainingModule
from flextok.training.record import record_start, told_at_end, told_at_start
from flextok.training.resume import check_changes, told
from flextok.training.sharding import ShardedStrategy, compile_blocks, read_sharded

log = logging.getLogger(__name__)


def train(config: ExperimentConfig) -> Path:
    """Train (or continue) the run that `config` describes. Returns its output_dir, which is a model
    folder for from_pretrained and also holds checkpoints/, logs/, pictures/, starts/ (how it was
    started each time) and config.yaml. Raises Interrupted when a signal stopped it, saved."""
    # checks one that was made in Python
    config = from_mapping(ExperimentConfig, to_mapping(config))
    check_devices(config.trainer)
    folder = Path(config.output_dir)
    # LOCAL_RANK alone: Lightning started this process, torchrun or SLURM did not
    leads = this_process().rank == 0 and int(os.environ.get("LOCAL_RANK", 0)) == 0
    with only_one(folder) if leads else nullcontext(), writing(folder, only_full=True):
        return train_alone(config, folder, leads)


def train_alone(config: ExperimentConfig, folder: Path, leads: bool) -> Path:
    """leads: whether this process, the first of the run's, writes what belongs to the run."""
    L.seed_everything(config.seed, verbose=False)
    checkpoints = folder / "checkpoints"
    last, step, changes, done, recorded = None, 0, {}, False, False
    if config.resume:
        last = find_checkpoint(checkpoints)
    config = fill_auto(config, None if last is None else folder / "config.yaml")
    if last is not None:
        step = load_checkpoint(last)["global_step"]
        changes = check_changes(folder / "config.yaml", config, step)
        done = step >= config.trainer.max_steps
        recorded = config.data.validation is None or read_validated(checkpoints) >= step
        if done and recorded and is_exported(folder, step):
            log.info("nothing to do: %s is trained to its end, step %d", folder, step)
            return folder
    if config.task == "tokenizer":
        module, data, draw = tokenizer_run(config)
        evaluate = evaluation(config, module.model, None)
    else:
        tokenizer = load_tokenizer(config)
        module, data, draw = generator_run(config, folder, tokenizer)
        evaluate = evaluation(config, tokenizer, module.model)
    if last is not None:
        try:
            check_fits(last, load_checkpoint(last), module)
        except CheckpointError:
            last = find_checkpoint(checkpoints, module)
            step = 0 if last is None else load_checkpoint(last)["global_step"]
            done = step >= config.trainer.max_steps
        log.info("continuing from %s, step %d", last, step)
        if changes:
            log.info("with other settings from here on: %s", told(changes))
    if device_type(config.trainer.accelerator) == "cpu":
        accelerate(module)
    try:  # what these refuse is told before anything is written
        module.make_optimizer()
        trainer = make_trainer(config, folder, module.model, draw, evaluate)
    except (MisconfigurationException, ImportError) as error:  # no such device, or its library
        raise ConfigError(f"trainer.accelerator={config.trainer.accelerator}: {error}") from error
    if leads:
        if not config.resume:
            set_aside(checkpoints)
        atomic_write(folder / "config.yaml", lambda p: save_experiment(config, p))
        record_start(folder, config, step)
    if last is not None and done and recorded:
        if leads:
            state = read_sharded(last) if last.is_dir() else load_checkpoint(last)["state_dict"]
            module.model.load_state_dict(averaged(state))
            export(module.model, folder, step)
        return folder
    if config.trainer.compile:
        compile_blocks(module.model)
    if done:  # all but the last validation: Lightning would not even start, so Validations sets it
        trainer.fit_loop.epoch_loop.max_steps = step + 1
    if leads:
        log.info("%s", told_at_start(config, module.model, data, trainer))
    with told_in_one_line():
        trainer.fit(module, data, ckpt_path=None if last is None else str(last), weights_only=True)
    # fit leaves the averaged weights in place
    export(module.model, folder, trainer.global_step, trainer.is_global_zero)
    if leads:
        (callback,) = trainer.checkpoint_callbacks
        log.info("%s", told_at_end(config, folder, trainer.global_step, callback))
    return folder


def make_dataset(spec: dict[str, Any] | list[dict[str, Any]]) -> Any:
    """Build the dataset that a spec names; a list of specs is concatenated, each as often as its
    `repeat` says, once by default."""
    if isinstance(spec, dict):
        return build(DATASETS, spec, "dataset")
    parts = []
    for part in spec:
        keys = dict(part)
        repeat = keys.pop("repeat", 1)
        check_number("repeat", repeat, 1, 10_000, whole=True, hint=" times a dataset")
        parts += [build(DATASETS, keys, "dataset")] * repeat
    if any(isinstance(part, WebDatasetStream) for part in parts):
        raise ConfigError("a webdataset_stream stands alone: list all its shards as its urls")
    return Joined(parts)


def fill_auto(config: ExperimentConfig, stored: Path | None = None) -> ExperimentConfig:
    """The config with numbers for an identity VAE's `shift: auto` and `scale: auto`: those of the
    run's own config.yaml (`stored`), else of the model that it starts from, else of the training
    pictures."""
    vae = config.model.get("vae")
    if not isinstance(vae, dict) or vae.get("name") != "identity":
        return config
    keys = [key for key in ("shift", "scale") if vae.get(key) == "auto"]
    if not keys or config.task != "tokenizer":
        return config
    known: list[dict[str, Any]] = []
    if stored is not None and stored.is_file():
        known.append(load_experiment(stored).model.get("vae") or {})
    else:
        starts = [load_model(path).config for path in config.start.values()]
        known += [start.vae for start in starts if isinstance(start, FlexTokConfig)]
    for found in known:
        numbers = {"shift": 0.0, "scale": 1.0, **found}
        if found.get("name") == "identity" and "auto" not in numbers.values():
            filled = {key: numbers[key] for key in keys}
            break
    else:
        filled = {key: value for key, value in measured_vae(config).items() if key in keys}
    return replace(config, model={**config.model, "vae": {**vae, **filled}})


def measured_vae(config: ExperimentConfig) -> dict[str, float]:
    """shift and scale that give the training pictures mean 0 and deviation 1."""
    name = str(config.model.get("name"))
    if name not in TOKENIZERS:
        raise unknown_key("model", name, list(TOKENIZERS))
    keys = {key: value for key, value in config.model.items() if key != "name"}
    registry: dict[str, Any] = TOKENIZERS
    size = from_mapping(registry[name].config_class, keys, "model").image_size
    mean, deviation, count = measure_pixels(make_dataset(config.data.train), size)
    if deviation < 1e-3:
        raise ConfigError(
            f"the pixels of {count} training pictures deviate by {deviation:.2g} only: they are "
            "all of one colour; look at data.train, or give model.vae.scale"
        )
    found = {"shift": float(f"{mean:.3g}"), "scale": float(f"{1 / deviation:.3g}")}
    log.info(
        "pixels of %d training pictures: mean %.3g, deviation %.3g; model.vae: shift %g, scale %g",
        *(count, mean, deviation, found["shift"], found["scale"]),
    )
    return found


def build_model(registry: dict[str, Any], spec: dict[str, Any]) -> Any:
    """Build the model that `spec` names: {"name": "flextok", **its config's keys}."""
    return registry[named_spec(spec, "model", list(registry))["name"]](model_config(registry, spec))


def model_config(registry: dict[str, Any], spec: dict[str, Any]) -> Any:
    """The checked config of the model that `spec` names."""
    keys = named_spec(spec, "model", list(registry))
    return from_mapping(registry[keys.pop("name")].config_class, keys, "model")


def tokenizer_run(config: ExperimentConfig) -> tuple[TrainingModule, DataModule, Any]:
    model = build_model(TOKENIZERS, config.model)
    prepare_training(model, config.start)
    transform = make_transform(config, model.image_size)
    train_set = make_dataset(config.data.train)
    validation = make_dataset(config.data.validation) if config.data.validation else None
    model.metadata["class_names"] = list(train_set.class_names)
    prepare = prepare_image(transform)
    data = make_data(config, train_set, validation, prepare)
    module = tokenizer_module(config, model)
    draw = None
    if validation is not None:
        count = min(config.trainer.num_pictures, len(validation))
        readable = EvaluationSet(validation, prepare)
        shown = collate([readable[i * len(validation) // count] for i in range(count)])
        draw = draw_reconstructions(shown["image"]) if shown else None
    return module, data, draw


def prepare_training(model: Any, start: dict[str, str]) -> None:
    """Hand a tokenizer the trained models that config.start names, and note which they were."""
    known = list(inspect.signature(model.prepare_training).parameters)
    for name in start:
        if name not in known:
            raise unknown_key("model to start from", name, known, "start")
    trained = {name: load_model(path) for name, path in start.items()}
    if trained:
        model.metadata["start"] = {
            name: f"{path} (weights {fingerprint(trained[name])})" for name, path in start.items()
        }
    model.prepare_training(**trained)


def tokenizer_module(config: ExperimentConfig, model: Any) -> TrainingModule:
    arguments = (model, config.optim, config.trainer.max_steps)
    if config.adversarial is None:
        return TokenizerModule(*arguments, seed=config.seed)
    if not hasattr(model, "reconstruct"):
        raise ConfigError(f"adversarial: a {model.model_type} has no reconstruction in training")
    return AdversarialModule(*arguments, adversarial=config.adversarial, seed=config.seed)


def load_tokenizer(config: ExperimentConfig) -> Any:
    assert config.tokenizer is not None
    tokenizer = load_model(config.tokenizer)
    if tokenizer.model_type not in TOKENIZERS:
        raise ConfigError(f"tokenizer={config.tokenizer!r} holds a {tokenizer.model_type} model")
    if not tokenizer.vocab_size:
        raise ConfigError(
            f"tokenizer={config.tokenizer!r} is continuous (KL): it has no indices to generate"
        )
    if getattr(tokenizer.config, "stage", None) == "proxy":
        raise ConfigError(
            f"tokenizer={config.tokenizer!r} is a first stage, without pixels: train the second one"
        )
    return tokenizer


def generator_run(
    config: ExperimentConfig, folder: Path, tokenizer: Any
) -> tuple[TrainingModule, DataModule, Any]:
    assert config.tokenizer is not None
    if config.start or config.adversarial:
        raise ConfigError("start and adversarial are for task tokenizer")
    derived: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "num_tokens": tokenizer.num_tokens,
        "conditioner": {"name": "class"},
    }
    spec = {**derived, **config.model}
    spec["conditioner"] = named_spec(spec["conditioner"], "conditioner", list(CONDITIONERS))
    check_length(model_config(GENERATORS, spec).num_tokens, tokenizer)
    captions = spec["conditioner"]["name"] == "text"
    cache = Path(config.data.token_cache or folder / "tokens")
    train_set = cached_tokens(config, tokenizer, cache / "train", config.data.train)
    validation = None
    if config.data.validation:
        place, data_spec = cache / "validation", config.data.validation
        validation = cached_tokens(config, tokenizer, place, data_spec, augment=False)
    class_names = train_set.class_names
    if spec["conditioner"]["name"] == "class":
        spec["conditioner"] = {"num_classes": len(class_names), **spec["conditioner"]}
        check_classes(class_names, spec["conditioner"]["num_classes"])
        if validation is not None:
            validation.count_classes_in(class_names)
    torch.manual_seed(config.seed)  # whether or not tokenizing took draws just now
    model = build_model(GENERATORS, spec)
    if captions:
        pinned = model.conditioner.pinned(model.config.conditioner)
        model.config = replace(model.config, conditioner=pinned)
    model.metadata["class_names"] = class_names
    remember_tokenizer(model, folder, tokenizer, config.tokenizer)
    number = config.trainer.num_pictures
    cond: torch.Tensor | Text = torch.arange(number) % max(1, len(class_names))
    names = None
    if captions:
        for part, tokens in {"train": train_set, "validation": validation}.items():
            if tokens is not None:
                add_text(model.conditioner, cache / part / "text", tokens, config)
        load_encoder.cache_clear()  # from here on the cached rows do
        shown = validation or train_set
        assert shown.text is not None, "add_text sets it"
        names = list(dict.fromkeys(shown.captions))[:number]
        cond = Text.pad([shown.text[name] for name in names])
    data = make_data(config, train_set, validation, prepare_tokens)
    module = GeneratorModule(model, config.optim, config.trainer.max_steps, config.seed)
    return module, data, draw_generations(tokenizer, cond, names) if number else None


def check_classes(class_names: list[str], num_classes: int) -> None:
    """Refuse a class generator whose data has other classes than it, or pictures without one."""
    if num_classes != len(class_names):
        raise ConfigError(
            f"model.conditioner.num_classes={num_classes}, but the data has the "
            f"{list_names(class_names)}: leave num_classes out, or name the data's class_names"
        )
    if UNLABELLED in class_names and len(class_names) > 1:
        raise ConfigError(
            f"some pictures of data.train have no class ({UNLABELLED}) and others one of the "
            f"{list_names(class_names)}: give all a class, or choose another model.conditioner"
        )


def check_length(num_tokens: int, tokenizer: Any) -> None:
    """Refuse a generator whose sequences its tokenizer cannot decode."""
    whole = tokenizer.num_tokens
    if not 1 <= num_tokens <= whole or (num_tokens < whole and not tokenizer.ordered):
        wanted = f"at most {whole} and at least 1" if tokenizer.ordered else f"{whole}"
        raise ConfigError(
            f"model.num_tokens={num_tokens} must be {wanted}, as the tokenizer has it"
        )


def add_text(
    conditioner: TextConditioner, folder: Path, tokens: TokenDataset, config: ExperimentConfig
) -> None:
    """Give a token data set the rows of its captions, cached in `folder`."""
    without = tokens.captions.count("")
    if without == len(tokens):
        raise ConfigError(
            "no picture has a caption: a text conditioner needs them (.txt files beside pictures, "
            "a caption column or key), or choose conditioner {name: class}"
        )
    if without:
        log.warning("%d of %d pictures have no caption: null text", without, len(tokens))
    sided = sum(bool(re.search(r"\b(left|right)\b", caption)) for caption in tokens.captions)
    if config.data.flip and sided:
        log.warning("data.flip=true mirrors pictures, and %d captions say left or right", sided)
    encoder = conditioner.encoder
    tokens.text = build_text_cache(folder, encoder, tokens.captions, cache_device(config))
    conditioner.null_row = tokens.text[""]


def evaluation(config: ExperimentConfig, tokenizer: Any, generator: Any | None) -> Any:
    """What the Evaluation callback runs: (model, folder) -> report. None where none is asked."""
    asked = config.evaluation
    if asked is None:
        return None
    assert config.data.validation is not None
    pictures = take(make_dataset(config.data.validation), asked.limit)
    options = Options(networks=tuple(asked.networks), batch_size=asked.batch_size, seed=config.seed)
    trained = generator or tokenizer
    cells = [Cell(k) for k in asked.num_tokens or [trained.num_tokens]]
    make_job(trained, cells, options, tokenizer)  # raises for mistakes and missing weights
    names = {"model": config.output_dir, "data": json.dumps(config.data.validation)}

    def measured(model: Any, folder: Path) -> dict[str, Any]:
        tokenizer.to(next(model.parameters()).device)
        return evaluate(model, pictures, cells, options, folder, names, tokenizer)

    return measured


def cached_tokens(
    config: ExperimentConfig, tokenizer: Any, folder: Path, spec: Any, augment: bool = True
) -> TokenDataset:
    if isinstance(spec, dict) and spec.get("name") == "tokens":
        return ready_tokens(spec, tokenizer)
    transform = make_transform(config, tokenizer.image_size)
    tokenizer.to(cache_device(config))
    store = build_token_cache(
        folder,
        tokenizer,
        make_dataset(spec),
        transform,
        identity=cache_identity(tokenizer, spec, transform),
        variants=config.data.token_variants if augment else 1,
        num_workers=config.data.num_workers,
        seed=config.seed,
    )
    tokenizer.to("cpu")
    store.wait()
    tokens = TokenDataset(folder)
    tokens.check_codes(tokenizer)
    return tokens


def cache_device(config: ExperimentConfig) -> str:
    """Where tokenizer and text encoder fill the caches: this process's GPU, if it trains on one."""
    return "cpu" if config.trainer.accelerator == "cpu" else local_device()


def ready_tokens(spec: dict[str, Any], tokenizer: Any) -> TokenDataset:
    """What flextok tokenize wrote, if with this tokenizer. spec: {name: tokens, path: folder}."""
    tokens: TokenDataset = build({"tokens": TokenDataset}, spec, "dataset")
    if not same_codes(tokens.manifest, tokenizer):
        raise ConfigError(
            f"the tokens in {spec['path']} were made by another tokenizer "
            f"({expected_codes(tokens.manifest)}, not codes {tokenizer.codes_id}): name that one, "
            "or run flextok tokenize with this one"
        )
    tokens.check_codes(tokenizer)
    return tokens


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


def codebook_callbacks(config: ExperimentConfig, model: Any) -> list[L.Callback]:
    quantizer, revive_every = getattr(model, "quantizer", None), config.trainer.revive_every
    if revive_every and not hasattr(quantizer, "revive"):
        raise ConfigError(f"trainer.revive_every={revive_every} needs a learned codebook (vq)")
    if quantizer is None or not quantizer.codebook_size:
        return []
    every = revive_every or config.trainer.log_every
    return [CodebookUsage(every, bool(revive_every), config.seed)]


def make_trainer(
    config: ExperimentConfig, folder: Path, model: Any, draw: Any, evaluate: Any
) -> L.Trainer:
    options = config.trainer
    validates = config.data.validation is not None
    callbacks: list[L.Callback] = [
        LearningRateMonitor("step"),
        Progress(refresh_rate=10),
        SkipNonFinite(folder, options.max_nonfinite),
        *codebook_callbacks(config, model),
    ]
    if draw is not None:
        callbacks.append(Pictures(folder / "pictures", draw))
    if config.evaluation is not None:
        every = config.evaluation.every * options.validate_every
        callbacks.append(Evaluation(folder / "evaluation", evaluate, every))
    callbacks.append(Export(folder))
    if config.optim.ema_decay > 0:
        callbacks.append(Averaging())
    checkpoints = Checkpoints(
        folder / "checkpoints", options.checkpoint_every, options.keep_last, options.validate_every
    )
    callbacks = [Validations(checkpoints, options.max_steps), *callbacks, checkpoints]
    if options.strategy == "fsdp2" and config.optim.name == "muon":
        raise ConfigError("optim.name=muon needs whole matrices: take trainer.strategy=ddp")
    plugins: list[Any] = [] if options.strategy == "fsdp2" else [WholeFiles()]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        # Checkpoints saves on signals, between two steps
        plugins.append(SLURMEnvironment(auto_requeue=False))
    trainer = L.Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy=ShardedStrategy() if options.strategy == "fsdp2" else options.strategy,
        plugins=plugins,
        precision=choose_precision(options),
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
            Rows(folder / "logs", name="csv"),  # a resumed run adds a version_<n>
            Events(folder / "logs", name="tensorboard", version=""),
        ],
        use_distributed_sampler=False,  # the stream and the validation set shard themselves
        enable_model_summary=False,
    )
    if isinstance(trainer.strategy, DDPStrategy):
        # buffers are constants, or moved alike on all processes: never sent around in a forward
        trainer.strategy._ddp_kwargs["broadcast_buffers"] = False
    return trainer


def check_devices(options: TrainerConfig) -> None:
    """Refuse a device that is not there, more processes than a CPU has cores, and what the device
    cannot do."""
    device, cores = device_type(options.accelerator), os.cpu_count() or 1
    if options.accelerator in ("gpu", "cuda", "mps") and device_type("gpu") not in ("cuda", "mps"):
        raise ConfigError(f"trainer.accelerator={options.accelerator}: there is none, take auto")
    asked = int(options.devices) if str(options.devices).isdigit() else 1
    if device == "cpu" and asked > cores and this_process().world_size == 1:
        raise ConfigError(
            f"trainer.devices={asked} must be at most {cores} on this CPU, the number of its "
            "cores: each device is a process"
        )
    if device == "cpu" and "," in str(options.devices):
        raise ConfigError(
            f"trainer.devices={options.devices} numbers GPUs: for a CPU say how many processes"
        )
    if options.precision == "16-mixed" and (device == "cpu" or options.strategy == "fsdp2"):
        where = "on a CPU" if device == "cpu" else "with trainer.strategy=fsdp2"
        raise ConfigError(f"trainer.precision=16-mixed does not work {where}: take bf16-mixed")


def device_type(accelerator: str) -> str:
    """What Lightning takes for trainer.accelerator: cuda, mps or cpu."""
    if accelerator not in ("auto", "gpu"):
        return accelerator
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def choose_precision(options: TrainerConfig) -> Any:
    """The precision that `auto` stands for on the device that trains. On a CPU bf16 takes longer
    for the small models that train there, even where the processor has instructions for it."""
    if options.precision != "auto":
        return options.precision
    on_cuda = device_type(options.accelerator) == "cuda"
    fast = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if fast else "32-true"


def is_exported(folder: Path, step: int) -> bool:
    """Whether the folder holds the model as it was at `step`."""
    try:
        found = read_mapping(folder / CONFIG, metadata=dict)["metadata"].get("step")
    except ValueError:
        return False
    return found == step and (folder / WEIGHTS).is_file()
