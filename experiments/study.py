"""A run of a study: a model trained, then measured by prefix length. What is done is kept."""

import json
import logging
import time
from pathlib import Path
from typing import Any

from flextok.card import count_parameters
from flextok.config import ExperimentConfig, load_experiment
from flextok.evaluation import Cell, Options, evaluate
from flextok.files import read_mapping, write_text
from flextok.pipeline import load_model
from flextok.registry import make_dataset
from flextok.schema import ConfigError, to_mapping
from flextok.training.prepare import cache_device, fill_auto, load_tokenizer
from flextok.training.run import train

log = logging.getLogger(__name__)


def train_and_measure(
    config: ExperimentConfig, lengths: list[int], networks: list[str]
) -> dict[str, Any]:
    """Train the model that `config` describes, or go on where it was interrupted, and evaluate it
    at each of `lengths` tokens, as it decodes by default: a tokenizer on its validation pictures, a
    generator by as many pictures as it was trained on, and against those.

    Returns what <output_dir>/result.json then holds: config, lengths, networks, parameters,
    cpu_seconds_per_step (of training, all threads; None where another session finished it) and the
    evaluation's report. Where that file is there already it is only read. Raises ConfigError where
    output_dir holds a run with other settings, and without data.validation."""
    config = fill_auto(config, Path(config.output_dir) / "config.yaml")
    if config.data.validation is None:
        raise ConfigError("a study measures on data.validation: name the pictures there")
    folder = Path(config.output_dir)
    if (folder / "config.yaml").exists() and load_experiment(folder / "config.yaml") != config:
        raise ConfigError(f"{folder} holds a run with other settings: choose another output_dir")
    asked = {"config": to_mapping(config), "lengths": lengths, "networks": networks}
    if (folder / "result.json").exists():
        found = read_result(folder / "result.json")
        if {key: found.get(key) for key in asked} == asked:
            return found
    cost = train_timed(config, folder)
    by_length = [Cell(k) for k in lengths]
    options = Options(networks=tuple(networks), seed=config.seed)
    data = config.data.validation if config.task == "tokenizer" else config.data.train
    names = {"model": str(folder), "data": json.dumps(data)}
    how = (make_dataset(data), by_length, options, folder / "evaluation", names)
    model = load_model(folder).to(cache_device(config))
    tokenizer = None
    if config.task == "generator":
        tokenizer = load_tokenizer(config).to(cache_device(config))
    report = evaluate(model, *how, tokenizer=tokenizer)
    result = {
        **asked,
        "parameters": count_parameters(model),
        "cpu_seconds_per_step": cost,
        "report": report,
    }
    write_json(result, folder / "result.json")
    return result


def train_timed(config: ExperimentConfig, folder: Path) -> float | None:
    """Train to the end. Returns the CPU seconds a step, of the session that ended it."""
    path, started = folder / "cost.json", time.process_time()
    before = set((folder / "starts").glob("*.json"))
    train(config)
    begun = set((folder / "starts").glob("*.json")) - before  # none where nothing was to do
    last = config.trainer.max_steps
    begun_at = read_mapping(max(begun), step=int)["step"] if begun else last
    if steps := last - begun_at:
        seconds = (time.process_time() - started) / steps
        write_json({"cpu_seconds_per_step": seconds}, path)
    return read_result(path).get("cpu_seconds_per_step")


def read_result(path: Path) -> dict[str, Any]:
    """What an earlier session wrote; {} where there is nothing, or it is damaged and told."""
    if not path.exists():
        return {}
    try:
        return read_mapping(path)
    except ValueError as error:
        log.warning("%s: made again", error)
        return {}


def write_json(value: Any, path: Path) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")
