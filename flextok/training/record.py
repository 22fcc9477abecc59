"""What a run was started with and came to, and what may change when it continues."""

import json
import logging
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import torch

import flextok
from flextok.autoencoder import Autoencoder
from flextok.card import count_parameters
from flextok.config import (
    ExperimentConfig,
    LoadingConfig,
    TrainerConfig,
    load_experiment,
    save_experiment,
)
from flextok.convert.autoencoder import OURS
from flextok.data.augmentation import Augmentation
from flextok.data.datamodule import DataModule
from flextok.files import Differences, atomic_write, differences, read_mapping, write_text
from flextok.generators import Generator
from flextok.generators.conditioning import TextConditioner
from flextok.hub import look_up
from flextok.objectives import OBJECTIVES, Objective
from flextok.places import CONFIG, find_weights
from flextok.schema import ConfigError, from_mapping, to_mapping
from flextok.tokenizers.base import Tokenizer
from flextok.training.module import TrainingModule
from flextok.training.options import FitOptions
from flextok.training.saving import Checkpoints, read_validated

NOTHING_TO_DO = "nothing to do: %s is trained to its end, step %d"
PACKAGES = ("flextok", "torch", "lightning", "numpy", "pillow", "timm", "diffusers", "webdataset")
log = logging.getLogger(__name__)

# The weights, their class names and the optimizer's state belong to these: they may not change.
_PARTS = tuple(
    f"objective.{key}" for key in ("train", "repa", "prefix_alignment", "dim", "num_stages")
)
FIXED = {
    "another model": ("task", "model", "tokenizer", "start", "objective.name", *_PARTS),
    "other data": (
        *("data.train", "data.validation", "data.token_variants", "data.latent_variants"),
        "data.class_balance",
        *(f"data.{field.name}" for field in fields(Augmentation)),
    ),
    "another optimizer": ("optim.name",),
}
# These change no weight, so that a finished run needs no other words about them.
IDLE = (
    *("output_dir", "resume", "evaluation", "data.num_workers", "data.token_cache"),
    "data.latent_cache",
    *(
        f"trainer.{key}"
        for key in (
            *("max_steps", "accelerator", "devices", "num_nodes", "log_every", "validate_every"),
            *("checkpoint_every", "keep_last", "max_nonfinite", "num_pictures", "compile"),
            *("cuda_graphs", "checkpoint_blocks", "loggers"),
        )
    ),
)
# Those of them of which a run that goes on is told.
TOLD = tuple(f"trainer.{key}" for key in ("max_steps", "devices", "num_nodes"))
MEASURED = ("latents_mean", "latents_std")  # settings of a model that Objective.finish fills in


def within(key: str, parts: tuple[str, ...]) -> bool:
    return any(key == part or key.startswith(f"{part}.") for part in parts)


def describe(changes: Differences) -> str:
    return "; ".join(f"{k}={there!r} there, {now!r} now" for k, (there, now) in changes.items())


def check_changes(path: Path, config: ExperimentConfig, step: int) -> Differences:
    """What differs from the config.yaml at `path`, of a run that has come to `step`, and applies
    from now on. Raises ConfigError naming what cannot."""
    if not path.exists():
        return {}
    try:
        before = load_experiment(path)
    except ConfigError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{path} cannot be read ({reason}): write the run's config there again, or pass "
            "resume=false to start over"
        ) from None
    moved = f" Data that only moved: correct {path}."
    return compare(path.parent, to_mapping(before), to_mapping(config), step, moved)


def check_start(folder: Path, options: FitOptions, objective: Objective, step: int) -> Differences:
    """As check_changes, for a run that no experiment describes: what differs from the newest of its
    starts/."""
    starts = sorted((folder / "starts").glob("*.json"))
    if not starts:
        return {}
    try:
        facts = read_mapping(starts[-1], options=dict, objective=dict, model=dict)
        there = settings(facts["options"], facts["objective"], facts["model"], objective)
    except ValueError as error:
        reason = " ".join(str(error).split())
        log.warning("%s: the settings are not compared with the run's: %s", starts[-1], reason)
        return {}
    return compare(folder, there, settings(**facts_of(options, objective), like=objective), step)


def facts_of(options: FitOptions, objective: Objective) -> dict[str, Any]:
    """What a start records of the settings of fit()."""
    names = [name for name, kind in OBJECTIVES.items() if kind is type(objective)]
    name, model = (names or [type(objective).__name__])[0], objective.model
    return {
        "options": {**to_mapping(options), "output_dir": str(options.output_dir)},
        "objective": {"name": name, **to_mapping(objective.config)},
        "model": {"name": model.model_type, **to_mapping(model.config)},
    }


def settings(
    options: Mapping[str, Any], objective: Mapping[str, Any], model: Mapping[str, Any], like: Any
) -> dict[str, Any]:
    """The facts of a start by the keys of an experiment. What a start of an older version lacks is
    filled in: settings by their defaults, names by those of `like`, an objective. Raises
    ConfigError."""
    filled = facts_of(from_mapping(FitOptions, options), like)
    found: dict[str, Any] = {key: filled["options"][key] for key in ("optim", "seed")}
    for key, config_class in {"trainer": TrainerConfig, "data": LoadingConfig}.items():
        found[key] = {field.name: filled["options"][field.name] for field in fields(config_class)}
    kinds = {"objective": (objective, like.config), "model": (model, like.model.config)}
    for key, (facts, config) in kinds.items():
        rest = {k: v for k, v in facts.items() if k != "name" and k not in MEASURED}
        name = facts.get("name", filled[key]["name"])
        if name == filled[key]["name"]:
            rest = to_mapping(from_mapping(type(config), rest))
        found[key] = {"name": name, **rest}
    return json.loads(json.dumps(found, default=str))


def compare(
    folder: Path, there: Mapping[str, Any], now: Mapping[str, Any], step: int, moved: str = ""
) -> Differences:
    """What differs between the settings of the run in `folder`, which has come to `step`, and those
    of now, and applies from now on. Raises ConfigError naming what cannot. moved: what helps where
    the data only have another place."""
    changes = differences(there, now)
    over = "choose another output_dir, or pass resume=false to start over there"
    for what, parts in FIXED.items():
        if fixed := {k: v for k, v in changes.items() if within(k, parts)}:
            more = moved if what == "other data" else ""
            raise ConfigError(f"{folder} holds a run of {what} ({describe(fixed)}): {over}.{more}")
    averages = [c["optim"]["ema_decay"] > 0 for c in (there, now)]
    shards = [c["trainer"]["strategy"] == "fsdp2" for c in (there, now)]
    for name, (before, after) in {"optim.ema_decay": averages, "trainer.strategy": shards}.items():
        if before != after:
            found = describe({name: changes[name]})
            raise ConfigError(f"{folder}: its checkpoints do not fit {found}: {over}")
    effective = {key: change for key, change in changes.items() if not within(key, IDLE)}
    if step >= now["trainer"]["max_steps"] and effective:
        raise ConfigError(
            f"{folder} is trained to its end, step {step}, and {describe(effective)} would "
            f"change nothing: raise trainer.max_steps to train on, {over}"
        )
    return {k: v for k, v in changes.items() if k in effective or k in TOLD}


class Record(L.Callback):
    """Writes <folder>/starts/<time>.json, and .diff if the source has uncommitted changes, when
    training starts; before it config.yaml, where an experiment describes the run."""

    def __init__(self, folder: Path, config: ExperimentConfig | None = None):
        self.folder, self.config = folder, config

    def on_train_start(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:  # type: ignore[override]
        if not trainer.is_global_zero:
            return
        if self.config is not None:
            config = self.config
            atomic_write(self.folder / "config.yaml", lambda path: save_experiment(config, path))
        now = datetime.now(timezone.utc)
        path = self.folder / "starts" / f"{now:%Y%m%dT%H%M%S%f}.json"
        path.parent.mkdir(exist_ok=True)
        source = source_state()
        diff = source.pop("diff", "")
        facts: dict[str, Any] = {
            "time": now.isoformat(timespec="seconds"),
            "step": trainer.global_step,
            "command": sys.argv,
            "folder": os.getcwd(),
            **facts_of(pl_module.options, pl_module.objective),
            "config": None if self.config is None else to_mapping(self.config),
            "source": source,
            "versions": {"python": platform.python_version(), **versions()},
            "host": platform.node(),
            "processes": trainer.world_size,
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
        }
        write_text(path, json.dumps(facts, indent=2, default=str) + "\n")
        if diff:
            write_text(path.with_suffix(".diff"), diff)


def is_finished(folder: Path, step: int, max_steps: int, validates: bool) -> bool:
    """Whether nothing is left to do in a folder whose newest checkpoint is of `step`: it is the
    last, what it was validated to be is recorded, and the model is exported as it is there."""
    recorded = not validates or read_validated(folder / "checkpoints") >= step
    try:
        document = read_mapping(folder / CONFIG)
        find_weights(folder)
    except ValueError:
        return False
    exported = look_up(document.get(OURS, document), "metadata.step") == step
    return step >= max_steps and recorded and exported


def start_message(module: TrainingModule, data: DataModule, trainer: L.Trainer) -> str:
    """What is trained, on what and where, in three lines."""
    model, options = module.objective.model, module.options
    whole = count_parameters(model)
    trained = sum(p.numel() for p in module.objective.parameters() if p.requires_grad)
    classes = list(model.metadata.get("class_names", []))
    some = ", ".join(map(str, classes[:5])) + (", ..." if len(classes) > 5 else "")
    kind = "class" if len(classes) == 1 else "classes"
    count = len(data.stream.dataset)
    checked = 0 if data.evaluation is None else len(data.evaluation)
    step = options.batch_size * options.accumulate * trainer.world_size
    unit = "sequences" if isinstance(model, Generator) else "images"
    return (
        f"{model.model_type}: {whole:,} parameters, {trained:,} are trained\n"
        f"data: {count:,} {unit} of {len(classes)} {kind} ({some}), {checked:,} for validation\n"
        f"device: {trainer.strategy.root_device}, {trainer.world_size} in all, "
        f"precision {trainer.precision}; {options.max_steps:,} steps of {step:,} {unit} each, "
        f"{options.max_steps * step / count:,.1f} epochs"
    )


def end_message(model: Any, folder: Path, step: int, checkpoints: Checkpoints) -> str:
    """How far the run came, its scores and what to do next."""
    if checkpoints.last_loss is None:
        score = "not validated: no validation set"
    else:
        best = checkpoints.best or {"loss": checkpoints.last_loss, "step": step}
        score = (
            f"val/loss {checkpoints.last_loss:.4g}, the best {best['loss']:.4g} at step "
            f"{best['step']} (its checkpoint is in {folder / 'checkpoints'})"
        )
    typed = shlex.quote(str(folder))
    following = f"flextok sample {typed}"
    if isinstance(model, Generator) and isinstance(model.conditioner, TextConditioner):
        following += " --prompt TEXT"
    if isinstance(model, Tokenizer):
        following = f"flextok reconstruct PICTURE --model {typed}, or a generator with tokenizer="
        following += typed
    if isinstance(model, Autoencoder):
        following = f"a tokenizer on its latents, model.vae={{name: kl, weights: {folder}}}"
    return f"step {step}: {score}\nmodel: {folder}; next: {following}"


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
