"""A run of a study: a model trained, then measured by prefix length; and the tables of many runs.
What is done is kept."""

import json
import logging
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flextok.card import count_parameters
from flextok.config import ExperimentConfig, load_experiment
from flextok.evaluation import Cell, Options, evaluate
from flextok.evaluation.adaptive import Target, relate
from flextok.evaluation.probe import linear_probe
from flextok.files import differences, read_mapping, write_text
from flextok.pipeline import load
from flextok.registry import make_dataset
from flextok.schema import ConfigError, from_mapping, to_mapping
from flextok.tokenizers import Tokenizer
from flextok.training.prepare import cache_device, fill_auto, load_tokenizer
from flextok.training.run import train

log = logging.getLogger(__name__)

Runs = list[dict[str, Any]]  # of one row of a table, a seed each: what train_and_measure returned

# how the name of a score begins (a network's name may follow) -> its title in tables and its digits
SCORES = {
    "frechet_": ("Plausible: Fréchet distance, lower is better", 1),
    "rfid": ("Plausible: rFID, lower is better", 1),
    "gfid": ("Plausible: gFID, lower is better", 1),
    "kernel_": ("Plausible: kernel distance, lower is better", 3),
    "kid": ("Plausible: KID, lower is better", 3),
    "precision_": ("Plausible: precision, higher is better", 2),
    "recall_": ("Plausible: recall, how much of the variety is there, higher is better", 2),
    "sharpness": ("Plausible: sharpness, 1 is right", 2),
    "feature_distance_squared_": ("Faithful: feature distance, lower is better", 2),
    "class_kept": ("Faithful: share of images that keep their class, higher is better", 3),
    "psnr": ("Faithful: PSNR (dB), higher is better", 2),
    "ssim": ("Faithful: SSIM, higher is better", 3),
    "lpips": ("Faithful: LPIPS, lower is better", 3),
}


@dataclass(frozen=True)
class Measure:
    """What is measured of a trained model beside its default way to decode or to sample."""

    data: dict[str, Any] | None = None  # the images; by default those that train_and_measure states
    # name -> another way: {decoding: options of decode(), sampling: options of generate()}
    variants: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    probe: dict[str, Any] | None = None  # tokenizer: the images that a linear probe is fitted to
    target: str | None = None  # tokenizer: what an adaptive length has to meet, such as psnr=18


def train_and_measure(
    config: ExperimentConfig, lengths: list[int], networks: list[str], more: Measure | None = None
) -> dict[str, Any]:
    """Train the model that `config` describes, or go on where it was interrupted, and evaluate it
    at each of `lengths` tokens, as it decodes by default: a tokenizer on its validation pictures, a
    generator by as many pictures as it was trained on, and against those; or each on more.data.

    Returns what <output_dir>/result.json then holds: config, lengths, networks, parameters,
    cpu_seconds_per_step (of training, all threads; None where another session finished it), the
    evaluation's report, and what `more` asks for: "variants" (name -> report), "probe" and
    "adaptive". Where that file is there already it is only read. Raises ConfigError where
    output_dir holds a run with other settings, and without data.validation."""
    config = fill_auto(config, Path(config.output_dir) / "config.yaml")
    if config.data.validation is None:
        raise ConfigError("a study measures on data.validation: name the pictures there")
    folder, more = Path(config.output_dir), more or Measure()
    if (folder / "config.yaml").exists() and load_experiment(folder / "config.yaml") != config:
        there = to_mapping(load_experiment(folder / "config.yaml"))
        other = ", ".join(differences(there, to_mapping(config)))
        raise ConfigError(
            f"{folder} holds a run with other settings ({other}): choose another output folder, "
            "or remove this one"
        )
    asked = {"config": to_mapping(config), "lengths": lengths, "networks": networks}
    asked |= {"measure": found} if (found := to_mapping(more)) != to_mapping(Measure()) else {}
    if found := read_result(folder / "result.json", config=dict, report=dict):
        # of an older run, whose config lacks newer keys
        whole = to_mapping(from_mapping(ExperimentConfig, found["config"]))
        if {key: found.get(key) for key in asked} | {"config": whole} == asked:
            return found
    cost = train_timed(config, folder)
    default = config.data.validation if config.task == "tokenizer" else config.data.train
    data = more.data or default
    images, by_length = make_dataset(data), [Cell(k) for k in lengths]
    names = {"model": str(folder), "data": json.dumps(data)}
    model = load(folder).to(cache_device(config))
    tokenizer = None
    if config.task == "generator":
        tokenizer = load_tokenizer(config).to(cache_device(config))
    options = Options(networks=tuple(networks), seed=config.seed)
    reports = {}
    for number, (name, way) in enumerate({"": {}, **more.variants}.items()):
        place = folder / (f"evaluation-{number}" if name else "evaluation")
        how = (by_length, replace(options, **way), place, names)
        reports[name] = evaluate(model, images, *how, tokenizer=tokenizer)
    result = {
        **asked,
        "parameters": count_parameters(model),
        "cpu_seconds_per_step": cost,
        "report": reports.pop(""),
    }
    if reports:
        result["variants"] = reports
    if more.probe and isinstance(model, Tokenizer):
        result["probe"] = linear_probe(model, make_dataset(more.probe), images, options, lengths)
    if more.target and isinstance(model, Tokenizer) and model.ordered:
        result["adaptive"] = needed_tokens(model, images, more.target, options)
    write_json(result, folder / "result.json")
    return result


def needed_tokens(
    tokenizer: Tokenizer, images: Any, target: str, options: Options
) -> dict[str, Any]:
    """How many images need so many tokens for the target, and the mean by class."""
    found = relate(tokenizer, images, Target.parse(target), options)
    pictures = found.pop("pictures")
    keeps: dict[str, list[int]] = {}
    for picture in pictures:
        keeps.setdefault(images.class_names[picture["label"]], []).append(picture["keep"])
    counts = Counter(picture["keep"] for picture in pictures)
    return {
        **found,
        "images_by_tokens": {str(k): counts[k] for k in sorted(counts)},
        "mean_tokens_by_class": {name: sum(k) / len(k) for name, k in sorted(keeps.items())},
    }


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


def spread(values: list[float], digits: int) -> str:
    """Mean, and half the range where there are several."""
    text = f"{sum(values) / len(values):.{digits}f}"
    return text + (f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else "")


def score_tables(results: dict[str, list[dict[str, Any]]], scores: list[str] | None = None) -> str:
    """Markdown: a table for each score, by number of tokens: first of how plausible images are,
    then of how faithful.

    results: the name of each row -> what train_and_measure returned for its seeds. scores: by
    default all of SCORES that the results hold."""
    rows = [row for some in results.values() for run in some for row in run["report"]["results"]]
    lengths = sorted({row["num_tokens"] for row in rows})
    held = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    text = []
    for score, (title, digits) in titled(name for name in held if name in (scores or held)).items():
        text += [f"**{title}**", ""]
        text.append(f"| recipe | seeds | {' | '.join(map(str, lengths))} |")
        text.append("|---" * (len(lengths) + 2) + "|")
        text += [score_row(name, some, score, lengths, digits) for name, some in results.items()]
        text.append("")
    return "\n".join(text)


def titled(scores: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Those of the scores that tables show, in that order -> title and digits."""
    names, found = list(scores), {}
    for start, (title, digits) in SCORES.items():
        for name in names:
            network = name.removeprefix(start)
            if not (name.startswith(start) if start.endswith("_") else name == start):
                continue
            if not network.startswith(("std_", "to_reference")):
                found[name] = (f"{title}{f' ({network})' if network else ''}", digits)
    return found


def score_row(name: str, runs: Runs, score: str, lengths: list[int], digits: int) -> str:
    """A line of a table: a cell for each length, empty where the runs have no such score."""
    values = values_of(runs, score)
    cells = [spread(values[k], digits) if k in values else "" for k in lengths]
    return f"| {name} | {len(runs)} | {' | '.join(cells)} |"


def values_of(runs: Runs, score: str) -> dict[int, list[float]]:
    """Number of tokens -> the values of a score, one of each run that has it."""
    found: dict[int, list[float]] = {}
    for run in runs:
        for row in run["report"]["results"]:
            if score in row["scores"]:
                found.setdefault(row["num_tokens"], []).append(row["scores"][score])
    return found


def read_result(path: Path, **kinds: type) -> dict[str, Any]:
    """What an earlier session wrote; {} where there is nothing, or it is damaged and told. kinds:
    of keys that it must have."""
    if not path.exists():
        return {}
    try:
        return read_mapping(path, **kinds)
    except ValueError as error:
        log.warning("%s: made again", error)
        return {}


def write_json(value: Any, path: Path) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")
