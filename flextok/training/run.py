"""One training run from an experiment: prepare its data and model, then fit()."""

import functools
import logging
from contextlib import nullcontext, suppress
from dataclasses import fields
from pathlib import Path

from flextok.config import ExperimentConfig, LoadingConfig, check_places
from flextok.data.processes import is_first
from flextok.files import only_one
from flextok.places import CONFIG
from flextok.schema import ConfigError, from_mapping, to_mapping
from flextok.storage import CheckpointError, read_json
from flextok.tokenizers.base import same_codes
from flextok.training.checkpoints import list_checkpoints, load_checkpoint
from flextok.training.fit import check_fit, fit
from flextok.training.options import FitOptions
from flextok.training.prepare import fill_auto, load_tokenizer, prepare
from flextok.training.record import NOTHING_TO_DO, check_changes, describe, is_finished
from flextok.training.trainer import check_devices

log = logging.getLogger(__name__)


def train(config: ExperimentConfig, only_caches: bool = False) -> Path:
    """Train (or continue) the run that `config` describes, as fit() does. Returns its output_dir,
    which also holds config.yaml, a generator's token and caption caches, and a tokenizer's latent
    cache. only_caches: only fill those, this process its share."""
    values = to_mapping(config)  # a config that was made in Python is checked as a file is
    check_places(values)
    config = from_mapping(ExperimentConfig, values)
    if not only_caches:
        check_devices(config.trainer)
    folder, steps = Path(config.output_dir), config.trainer.max_steps
    stored, newest = folder / "config.yaml", newest_step(folder) if config.resume else 0
    config = fill_auto(config, stored if newest else None)
    if newest:
        changes = check_changes(stored, config, newest)
        check_codes(folder, config)
        if is_finished(folder, newest, steps, config.data.validation is not None):
            log.info(NOTHING_TO_DO, folder, newest)
            return folder
        if changes:
            log.info("with other settings from here on: %s", describe(changes))
    options, cached = fit_options(config), bool(config.data.latent_variants)
    check = functools.partial(check_fit, options=options, cached=cached)
    if only_caches:
        prepare(config, check)
        return folder
    with only_one(folder) if is_first() else nullcontext():  # before the caches are filled
        objective, train_set, validation_set, callbacks = prepare(config, check)
        fit(
            objective,
            train_set,
            validation_set,
            options=options,
            callbacks=callbacks,
            experiment=config,
        )
    return folder


def check_codes(folder: Path, config: ExperimentConfig) -> None:
    """Raises ConfigError for a generator that goes on over a tokenizer whose codes have changed, by
    further training, say: its embeddings are those of the old ones."""
    if config.task != "generator" or not (folder / CONFIG).is_file():
        return
    record = read_json(folder / CONFIG).get("metadata", {})
    if record.get("codes_id") is not None and not same_codes(record, load_tokenizer(config)):
        raise ConfigError(
            f"{folder} holds a generator of other codes than those that the tokenizer in "
            f"{config.tokenizer} has now: pass resume=false to train it anew, or name another "
            "output_dir"
        )


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint of a run, 0 if there is none. Raises OldRun where its run
    cannot be continued."""
    found = list_checkpoints(folder / "checkpoints")
    if not found:
        return 0
    step = max(found)
    with suppress(CheckpointError):  # of a damaged one: fit() takes the one before
        load_checkpoint(found[step])
    return step


def fit_options(config: ExperimentConfig) -> FitOptions:
    """What fit() is to be asked for by an experiment."""
    loading = {field.name: vars(config.data)[field.name] for field in fields(LoadingConfig)}
    return FitOptions(
        **vars(config.trainer),
        **loading,
        output_dir=config.output_dir,
        optim=config.optim,
        seed=config.seed,
        resume=config.resume,
    )
