"""The paper's claims on Fashion-MNIST: trains and measures every recipe of fashion_mnist/recipes/,
and writes the tables and figures of docs/paper.md.

    python experiments/paper.py --budget full --jobs 16     (make paper JOBS=16)

fashion_mnist/study.yaml states the budgets, the measurements and the tables. Each run has a folder
<output>/<budget>/<recipe>/seed-<n>: what is finished is skipped, what was interrupted goes on. The
page is <output>/<budget>/paper.md, with the tables and figures of all that is finished.

    python experiments/paper.py --page --publish

trains nothing: the page of what is finished there, and for the rest of what fashion_mnist/results/
has, where --publish puts each result that it is given. So machines may share the work.
"""

import argparse
import json
import logging
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from itertools import product
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from classifier import ClassDistances, ClassifierNetwork, train_classifier
from einops import EinopsError, rearrange
from omegaconf import OmegaConf
from PIL import Image
from repeats import Deviations, comparison, deviation_table, deviations, repeated, summary
from study import Measure, read_result, score_tables, spread, train_and_measure, write_json
from torch import Tensor

from flextok import viz
from flextok.config import ExperimentConfig, TrainerConfig, load_experiment
from flextok.data.fashion_mnist import FashionMNIST
from flextok.data.transforms import ImageTransform
from flextok.evaluation import EVALUATORS
from flextok.evaluation.features import file_hash
from flextok.files import atomic_write, check_writable, read_mapping, write_text
from flextok.images import to_image
from flextok.pipeline import generate_images, load, reconstruct_prefixes
from flextok.schema import ConfigError, from_mapping
from flextok.training.trainer import choose_precision

HERE = Path(__file__).parent / "fashion_mnist"
RECIPES = {path.stem: path for path in sorted((HERE / "recipes").glob("*.yaml"))}
PAGE = Path(__file__).parents[1] / "docs/paper.md"
DEFAULT_ROOT = "data"  # FashionMNIST's root where none is named
PUBLISHED = HERE / "results"  # <budget>/<recipe>/seed-<n>.json, and the budget's classifier
SHOWN = "flextok"  # the recipe of sections 3 and 4 and of the figures
CURVES = {  # scores that are drawn -> their names
    "frechet_classifier": "Fréchet distance, classifier (lower is better)",
    "sharpness": "sharpness (1 is right)",
    "class_kept": "class kept (higher is better)",
    "psnr": "PSNR in dB (higher is better)",
}
DRAWN = {  # figure of curves -> the table whose rows it shows, and its title
    "curves.png": ("reconstruction", "Tokenizers"),
    "ways.png": ("joining", "Ways to train"),
}
EXAMPLES = "examples.png"  # beside a run's result, see draw_examples
STRIPS = ("near_noise", "flow", SHOWN)  # recipes that have a figure of their own
# what is drawn of test images, row by row: recipe -> numbers of tokens
COMPARED = {SHOWN: [1, 8, 16, 32], "published": [1, 32], "titok_8": [8], "titok_16": [16]}
COMPARED |= {"titok_32": [32], "titok_tail_drop": [8, 32], "grid_16": [16], "grid_49": [49]}
# what is drawn of generated images: recipe -> the guidance of the generator, numbers of tokens
GENERATED = {
    "gpt_class": (1.5, [1, 2, 8, 32]),
    "gpt_grid": (3.0, [16]),
    "maskgit_titok": (4.0, [32]),
}
OFF_SCALE = "published_16"  # its curves would leave no room for the others
MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass
class Budget:
    steps: float  # of those that the recipes state
    images: int  # of the test set that are measured, and generated ones
    probe_images: int  # of the training set that linear probes are fitted to
    seeds: list[int]
    classifier_steps: int
    networks: list[str]
    variants: bool = True  # whether the other ways to decode and to sample are measured
    once: list[str] = field(default_factory=list)  # recipes that are run with the first seed only
    # table -> the budget whose runs fill it, where that is another one
    tables: dict[str, str] = field(default_factory=dict)
    set: dict[str, list[str]] = field(default_factory=dict)  # all, model or recipe -> overrides


@dataclass
class Table:
    scores: list[str]
    rows: dict[str, str]  # "recipe" or "recipe: variant" -> its label


@dataclass
class StudyFile:
    budgets: dict[str, Any]
    lengths: list[int]
    target: str
    variants: dict[str, Any]
    tables: dict[str, Any]


class Study(NamedTuple):
    file: StudyFile
    budget: Budget
    folder: Path  # of this budget's runs
    root: str  # of the data
    known: dict[Path, dict[str, Any]]  # results that were read and checked
    published: bool = False  # whether published results stand in for runs that are not here
    accelerator: str = "cpu"  # that trains and measures
    precision: str = "32-true"  # of the trainings
    chosen: list[int] | None = None  # seeds, in place of the budget's

    @classmethod
    def load(
        cls,
        budget: str,
        output: Path,
        root: str,
        published: bool = False,
        accelerator: str = "cpu",
    ) -> "Study":
        """Of a budget that study.yaml states; on a CPU trained in bf16 where it multiplies that
        fast."""
        values: Any = OmegaConf.to_container(OmegaConf.load(HERE / "study.yaml"))
        file = from_mapping(StudyFile, values)
        if budget not in file.budgets:
            raise ConfigError(f"budget {budget!r} must be one of {', '.join(file.budgets)}")
        sized = from_mapping(Budget, file.budgets[budget])
        if root != DEFAULT_ROOT:
            root = str(Path(root).expanduser().resolve())
        # on a GPU it is the capture of its steps that makes models of this size fast, in fp32
        on_gpu = accelerator == "gpu"
        precision = "32-true" if on_gpu else choose_precision(TrainerConfig(1, accelerator))
        folder = output.resolve() / budget
        return cls(file, sized, folder, root, {}, published, accelerator, precision)

    def of(self, table: str) -> "Study":
        """This study, or the one with the budget that fills a table."""
        if (name := self.budget.tables.get(table)) is None:
            return self
        budget = from_mapping(Budget, self.file.budgets[name])
        return self._replace(budget=budget, folder=self.folder.parent / name)

    def parts(self) -> dict[str, tuple["Study", list[str]]]:
        """Budget -> its study and the recipes of the tables that it fills, this budget first."""
        found: dict[str, tuple[Study, list[str]]] = {self.folder.name: (self, [])}
        for table in self.file.tables:
            part = self.of(table)
            _, recipes = found.setdefault(part.folder.name, (part, []))
            recipes += [name for name in recipes_of(self.file, table) if name not in recipes]
        return found

    def place(self, recipe: str, seed: int) -> Path:
        return self.folder / recipe / f"seed-{seed}"

    def config(self, recipe: str, seed: int) -> ExperimentConfig:
        """The recipe at this budget, with the folders of the models that it takes."""
        path, scale = RECIPES[recipe], self.budget.steps
        plain = load_experiment(path)
        steps = max(1, round(scale * plain.trainer.max_steps))
        asked = [
            f"seed={seed}",
            f"output_dir={self.place(recipe, seed)}",
            f"trainer.accelerator={self.accelerator}",
            f"trainer.precision={self.precision}",
            f"trainer.cuda_graphs={self.accelerator == 'gpu'}",
            f"trainer.max_steps={steps}",
            f"optim.warmup_steps={round(scale * plain.optim.warmup_steps)}",
            f"data.validation.limit={self.budget.images}",
        ]
        if self.root != DEFAULT_ROOT:
            asked += [f"data.{part}.root={self.root}" for part in ("train", "validation")]
        for name, other in taken(plain).items():
            asked.append(f"{name}={self.place(other, seed)}")
        for key in ("all", plain.model["name"], recipe):
            asked += self.budget.set.get(key, [])
        return load_experiment(path, asked)

    def lengths(self, recipe: str) -> list[int]:
        """Those that a model is measured at: of a tokenizer without order, all of its tokens; a
        generator writes those of its tokenizer."""
        config = self.config(recipe, 0)
        if config.task == "generator":
            return self.lengths(taken(load_experiment(RECIPES[recipe]))["tokenizer"])
        model = config.model
        longest = model.get("num_registers", model.get("num_tokens"))
        ordered = model.get("ordered", model["name"] == "flextok")
        return [k for k in self.file.lengths if k <= longest] if ordered else [longest]

    def measure(self, config: ExperimentConfig, recipe: str) -> Measure:
        images: Any = config.data.validation
        probe = {**images, "split": "train", "limit": self.budget.probe_images}
        variants = self.file.variants.get(recipe, {}) if self.budget.variants else {}
        return Measure(images, variants, probe, self.file.target)

    def networks(self, recipe: str) -> list[str]:
        """Those whose scores a table shows for this recipe; the first one for a recipe of none."""
        scores = {
            score
            for name, table in self.file.tables.items()
            if recipe in recipes_of(self.file, name)
            for score in table["scores"]
        }
        first, *others = self.budget.networks
        return [first, *(n for n in others if any(score.endswith(f"_{n}") for score in scores))]

    def seeds(self, recipe: str) -> list[int]:
        return self.all_seeds()[: 1 if recipe in self.budget.once else None]

    def all_seeds(self) -> list[int]:
        return self.chosen or self.budget.seeds

    def classifier_file(self, suffix: str) -> Path:
        """Of the classifier that measured: .safetensors of its weights, .json of what is known."""
        path = (self.folder / "classifier").with_suffix(suffix)
        stored = PUBLISHED / self.folder.name / path.name
        return stored if self.published and not path.exists() else path

    def classifier(self) -> dict[str, Any]:
        """What is known of the classifier that measured; {} where there is none yet."""
        return read_result(self.classifier_file(".json"))

    def result(self, recipe: str, seed: int) -> dict[str, Any]:
        """Of one run, as it would be wherever it was made; {} where there is none. Raises
        ConfigError where it is not of the recipe as it is now, or was measured with another
        classifier, or goes on from another model than the one that is there."""
        path, published = self.place(recipe, seed) / "result.json", False
        found = self.known.get(path) or read_result(path, config=dict, report=dict)
        if not found and self.published:
            path, published = published_file(self.folder.name, recipe, seed), True
            found = self.known.get(path) or read_published(path)
        if not found or path in self.known:
            return found
        plain = self.elsewhere()
        if not published:
            text = json.dumps(found).replace(str(self.folder), str(plain.folder))
            for quote in ('"', '\\"'):  # a report holds JSON within JSON
                text = text.replace(quote + self.root + quote, f"{quote}{plain.root}{quote}")
            found = json.loads(text)
            sets = {**found.get("measure", {}), **found["config"]["data"]}
            for part in ("train", "validation", "data", "probe"):
                (sets.get(part) or {}).pop("root", None)  # the default one is not named
        how = {key: found["config"]["trainer"][key] for key in ("accelerator", "precision")}
        now = plain._replace(**how).config(recipe, seed)
        remedy = f"remove {path if published else path.parent}, and run it again"
        if from_mapping(ExperimentConfig, found["config"]) != now:
            raise ConfigError(f"{path} is not of recipes/{recipe}.yaml as it is now: {remedy}")
        used = found["report"]["settings"]["networks"]["classifier"]["weights"]
        weights = self.classifier_file(".safetensors")
        if weights.exists() and file_hash(weights) != used:
            raise ConfigError(
                f"{path} was measured with another classifier than {weights}, so it cannot be "
                f"compared with what that one measures: put back its own, or {remedy}"
            )
        for other, model in found.get("taken", {}).items():
            if (start := self.result(other, seed)) and model_hash(start) != model:
                raise ConfigError(
                    f"{path} goes on from another {other} than the one that is there: {remedy}"
                )
        self.known[path] = found
        return found

    def elsewhere(self) -> "Study":
        """The same in the folders that published results name, wherever they were made."""
        return self._replace(folder=Path("outputs/paper") / self.folder.name, root="data")

    def published_alone(self) -> "Study":
        """The published results, of all seeds: no run has a folder there."""
        folder = Path(os.devnull) / self.folder.name
        return self._replace(folder=folder, known={}, published=True, chosen=None)

    def results(self, row: str) -> list[dict[str, Any]]:
        """Of the seeds of a table's row that are finished."""
        recipe, _, variant = row.partition(": ")
        found = [one for seed in self.all_seeds() if (one := self.result(recipe, seed))]
        if variant:
            found = [
                {**one, "report": one["variants"][variant]}
                for one in found
                if variant in one.get("variants", {})
            ]
        return found


def recipes_of(file: StudyFile, table: str) -> list[str]:
    """Those of a table's rows, some of which are variants of one."""
    return list(dict.fromkeys(row.partition(": ")[0] for row in file.tables[table]["rows"]))


def published_file(budget: str, recipe: str, seed: int) -> Path:
    return PUBLISHED / budget / recipe / f"seed-{seed}.json"


def read_published(path: Path) -> dict[str, Any]:
    """A published result; {} where there is none. Raises ConfigError where it is damaged, since
    nothing makes it again."""
    try:
        return read_mapping(path, config=dict, report=dict) if path.exists() else {}
    except ValueError as error:
        raise ConfigError(f"{error}: put it back, by `git checkout`") from None


def model_hash(result: dict[str, Any]) -> str:
    return str(result["report"]["settings"]["model_hash"])


def publish(study: Study, page: Path) -> None:
    """Put each result that is here among what the repository holds, or in place of it all where
    nothing published stands in for what is not here; of the full budget also the page and its
    figures."""
    results = {  # all are read before the first is written
        published_file(budget, recipe, seed): result
        for budget, (part, _) in study.parts().items()
        for recipe in RECIPES
        for seed in part.all_seeds()
        if (part.place(recipe, seed) / "result.json").exists()
        and (result := part.result(recipe, seed))
    }
    for path, result in results.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(result, path)
    for recipe in RECIPES:
        for seed in study.all_seeds():
            if (examples := study.place(recipe, seed) / EXAMPLES).exists():
                path = published_file(study.folder.name, recipe, seed)
                path.parent.mkdir(parents=True, exist_ok=True)
                copy(examples, path.with_suffix(".png"))
    for budget, (part, _) in study.parts().items():
        for path in part.folder.glob("classifier.*"):
            copy(path, PUBLISHED / budget / path.name)
        for path in [] if study.published else (PUBLISHED / budget).glob("*/seed-*"):
            if path.with_suffix(".json") not in results:
                print(f"removed, since it is not of this study: {path}")
                path.unlink()
    if study.folder.name == "full":
        for path in (page.parent / "pictures/paper").glob("*.png"):
            copy(path, PAGE.parent / "pictures/paper" / path.name)
        copy(page, PAGE)


def take_classifier(study: Study) -> None:
    """Before runs that are added to what is published: begin with the classifier that measured it,
    since no page takes rows of two. Raises ConfigError where another one is here."""
    for budget, (part, _) in study.parts().items():
        stored = PUBLISHED / budget / "classifier.safetensors"
        here = part.folder / stored.name
        if not stored.exists():
            continue
        if not here.exists() or file_hash(here) == file_hash(stored):
            for path in (stored, stored.with_suffix(".json")):
                copy(path, part.folder / path.name)
        else:
            raise ConfigError(
                f"{here} is another classifier than {stored}, and no page takes rows of two: "
                "choose another --output, or run all (without --only and --seeds)"
            )


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(target, lambda place: shutil.copy(source, place))


def taken(config: ExperimentConfig) -> dict[str, str]:
    """The keys of a recipe that name other recipes, whose models it takes."""
    named = {f"start.{name}": other for name, other in config.start.items()}
    named |= {"tokenizer": config.tokenizer} if config.tokenizer else {}
    return {key: other for key, other in named.items() if other in RECIPES}


def with_needed(recipes: list[str]) -> dict[str, set[str]]:
    """These recipes and all that they need -> those that each one takes models of."""
    found: dict[str, set[str]] = {}
    waiting = list(recipes)
    while waiting:
        recipe = waiting.pop()
        if recipe not in found:
            found[recipe] = set(taken(load_experiment(RECIPES[recipe])).values())
            waiting += found[recipe]
    return found


def run(study: Study, recipe: str, seed: int) -> None:
    """Train and measure one recipe with one seed, in a process of one thread."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    weights = study.folder / "classifier.safetensors"
    EVALUATORS["classifier"] = lambda setting: ClassDistances(
        ClassifierNetwork(weights, setting.device, setting.dtype)
    )
    if (begun := study.place(recipe, seed) / "config.yaml").exists():  # it ends as it began
        study = study._replace(precision=load_experiment(begun).trainer.precision)
    config = study.config(recipe, seed)
    more = study.measure(config, recipe)
    fresh = study._replace(known={})
    fresh.result(recipe, seed)  # raises where a model that it goes on from was made again
    others = taken(load_experiment(RECIPES[recipe])).values()
    models = {other: model_hash(fresh.result(other, seed)) for other in others}
    found = train_and_measure(config, study.lengths(recipe), study.networks(recipe), more)
    if models and "taken" not in found:
        write_json({**found, "taken": models}, study.place(recipe, seed) / "result.json")
    draw_examples(study, recipe, seed)


def end_with_parent() -> None:
    """Let this process end when the one that started it is gone: a training saves first."""
    parent = parent_process()

    def wait_for_parent() -> None:
        if parent is not None:
            parent.join()
        while True:  # a training only takes note of the first; what is idle ends
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(2)

    Thread(target=wait_for_parent, daemon=True).start()


def run_all(study: Study, recipes: list[str], jobs: int) -> Iterator[tuple[str, int]]:
    """Run recipes and what they need, as many at once as there are jobs, in the order in which they
    need each other and the first seed first; yields each one that is done."""
    needed = with_needed(recipes)
    graph = TopologicalSorter(
        {
            (seed, name): {(seed, n) for n in needed[name]}
            for name in needed
            for seed in study.seeds(name)
        }
    )
    graph.prepare()
    ready: list[tuple[int, str]] = []
    spawn = get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=end_with_parent) as pool:
        running: dict[Future[None], tuple[int, str]] = {}
        while graph.is_active():
            ready = sorted([*ready, *graph.get_ready()])
            while ready and len(running) < jobs:
                seed, recipe = ready.pop(0)
                running[pool.submit(run, study, recipe, seed)] = (seed, recipe)
            try:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()  # raises what the run raised
            except BaseException:
                for process in active_children():
                    process.terminate()  # a training saves first
                raise
            for future in done:
                seed, recipe = running.pop(future)
                graph.done((seed, recipe))
                yield recipe, seed


def run_parts(study: Study, only: list[str] | None, jobs: int) -> None:
    """Run what the study's tables show, each part with a classifier of its own."""
    torch.set_num_threads(1)  # the classifier is another one with more
    chosen = {
        budget: recipes if only is None else [name for name in only if name in with_needed(recipes)]
        for budget, (_, recipes) in study.parts().items()
    }
    for name in only or []:
        if not any(name in asked for asked in chosen.values()):
            raise ConfigError(f"no table of budget {study.folder.name} needs recipe {name!r}")
    for part, _ in study._replace(chosen=None).parts().values():
        for name, seed in product(RECIPES, part.all_seeds()):
            part.result(name, seed)  # the page reads all: what does not fit is told before the work
    for budget, (part, _) in study.parts().items():
        if asked := chosen[budget]:
            facts = train_classifier(part.root, part.budget.classifier_steps, part.folder)
            print(f"{budget}: classifier: {facts['accuracy']:.1%} of the test set", flush=True)
            for recipe, seed in run_all(part, asked, jobs):
                print(f"== {budget}, {recipe}, seed {seed}: done", flush=True)


# The page


def write_page(study: Study) -> Path:
    """Fill the tables of docs/paper.md, and draw its figures. Returns the new page."""
    made = {"budget": budget_facts(study), "probe": probe_table(study)}
    made |= {"adaptive": adaptive_table(study), "codes": codes_table(study)}
    made["spread"] = deviation_table(seed_deviations(all_runs(study), study))
    for name, value in study.file.tables.items():
        table = from_mapping(Table, value)
        results = {label: study.of(name).results(row) for row, label in table.rows.items()}
        done = {label: runs for label, runs in results.items() if runs}
        made[name] = (score_tables(done, table.scores) if done else "") + not_run(results)

    def filled(match: re.Match[str]) -> str:
        return f"{match[1]}\n{made[match[2]].strip()}\n\n{match[3]}"

    page, text = study.folder / "paper.md", PAGE.read_text("utf-8")
    if lost := made.keys() - {mark[2] for mark in MARK.finditer(text)}:
        raise ConfigError(
            f"{PAGE} has no place for the table {min(lost)}: put back the page, by `git checkout`"
        )
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, MARK.sub(filled, text))
    draw_figures(study, study.folder / "pictures/paper")
    return page


def shown(study: Study) -> dict[tuple[str, str], list[str]]:
    """The rows of all tables, each once: (budget, row) -> the scores that are shown of it."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, table in study.file.tables.items():
        for row in table["rows"]:
            held = found.setdefault((study.of(name).folder.name, row), [])
            held += [score for score in table["scores"] if score not in held]
    return found


def seed_deviations(rows: dict[tuple[str, str], list[dict[str, Any]]], study: Study) -> Deviations:
    """Of each score that a table shows, see repeats.deviations. rows: (budget, row) -> its runs."""
    scores = dict.fromkeys(score for scores in shown(study).values() for score in scores)
    return deviations(rows.values(), scores)


def all_runs(study: Study, strict: bool = True) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Of the rows of all tables: (budget, row) -> results. strict: whether one that is not of the
    recipe as it is now raises, in place of none of that row."""
    parts, found = study.parts(), {}
    for budget, row in shown(study):
        try:
            found[budget, row] = parts[budget][0].results(row)
        except ConfigError:
            if strict:
                raise
            found[budget, row] = []
    return found


def compare(study: Study) -> None:
    """Write beside the page how runs that are here differ from those that are published, of the
    same recipes and seeds."""
    published = all_runs(study.published_alone(), strict=False)
    deviation, now, numbers = seed_deviations(published, study), all_runs(study), []
    for (budget, row), scores in shown(study).items():
        old = {one["config"]["seed"]: one for one in published[budget, row]}
        pairs = [
            (before, one)
            for one in now[budget, row]
            if (before := old.get(one["config"]["seed"])) and before["report"] != one["report"]
        ]
        if pairs:
            sides = (list(side) for side in zip(*pairs, strict=True))
            numbers += repeated(f"{budget}, {row}", *sides, scores, deviation)
    if numbers:
        path = study.folder / "compared.md"
        write_text(path, comparison(numbers))
        print(f"{summary(numbers)} {path} has the others.")


def labelled_rows(study: Study, *tables: str) -> dict[str, list[dict[str, Any]]]:
    """Label -> results, of the rows of some tables that are no variants and are finished."""
    found = {
        label: study.of(name).results(row)
        for name in tables
        for row, label in study.file.tables[name]["rows"].items()
        if ": " not in row
    }
    return {label: runs for label, runs in found.items() if runs}


def not_run(results: dict[str, list[dict[str, Any]]]) -> str:
    """A sentence that names the rows without results."""
    missing = [label for label, runs in results.items() if not runs]
    return f"Not yet run: {'; '.join(missing)}." if missing else ""


def budget_facts(study: Study) -> str:
    """How long each run was, and what it cost."""
    facts = study.classifier()
    lines = [
        f"Each row of a table is measured on {study.budget.images} test images.",
        f"The classifier, after {facts['steps']} steps of 128 images, is right on "
        f"{facts['accuracy']:.1%} of the test set."
        if facts
        else "",
        "",
        "| run | parameters | steps | batch | trained on | CPU s a step, by seed | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    missing: dict[str, list[dict[str, Any]]] = {}
    for budget, (part, recipes) in study.parts().items():
        for recipe in recipes:
            name = f"`{recipe}`" if part is study else f"`{recipe}`, budget `{budget}`"
            if not (runs := part.results(recipe)):
                missing[name] = []
                continue
            trainers, data = [one["config"]["trainer"] for one in runs], runs[0]["config"]["data"]
            seconds = [one["cpu_seconds_per_step"] for one in runs]
            known = [
                f"{cost:.2f}" if trainer["accelerator"] == "cpu" and cost is not None else "-"
                for cost, trainer in zip(seconds, trainers, strict=True)
            ]
            cells = [
                f"{runs[0]['parameters'] / 1e6:.2f}M",
                str(trainers[0]["max_steps"]),
                str(data["batch_size"]),
                ", ".join(dict.fromkeys(map(trained_on, trainers))),
                ", ".join(known),
                str(len(runs)),
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", not_run(missing)])


def trained_on(trainer: dict[str, Any]) -> str:
    half = "" if trainer["precision"] == "32-true" else " in bf16"
    return trainer["accelerator"].upper() + half


def by_length_table(rows: dict[str, list[list[dict[str, Any]]]], key: str) -> str:
    """rows: label -> for each seed its rows, which have num_tokens and `key`."""
    if not rows:
        return "*Not yet run.*"
    lengths = sorted({one["num_tokens"] for seeds in rows.values() for s in seeds for one in s})
    lines = [f"| recipe | {' | '.join(map(str, lengths))} |", "|---" * (len(lengths) + 1) + "|"]
    for label, seeds in rows.items():
        cells = []
        for k in lengths:
            values = [one[key] for some in seeds for one in some if one["num_tokens"] == k]
            cells.append(spread(values, 3) if values else "")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def own_tokens(study: Study) -> dict[str, list[dict[str, Any]]]:
    """labelled_rows of tokenizers, of those with the same tokens the first: a second stage does not
    change those of the first one where it trains the decoder alone."""
    found: dict[str, list[dict[str, Any]]] = {}
    seen = set()
    for label, runs in labelled_rows(study, "joining", "reconstruction").items():
        config = runs[0]["config"]
        frozen = config["objective"].get("train") == ["decoder"]
        tokens = config["start"]["weights"] if frozen else config["output_dir"]
        if tokens not in seen:
            found[label] = runs
        seen.add(tokens)
    return found


def probe_table(study: Study) -> str:
    """The class accuracy of a linear probe by prefix."""
    found = own_tokens(study)
    return by_length_table(
        {label: [one["probe"]["results"] for one in runs] for label, runs in found.items()},
        "accuracy",
    )


def codes_table(study: Study) -> str:
    lines = ["| recipe | codes | in use | bits in the first token |", "|---|---|---|---|"]
    for label, runs in own_tokens(study).items():
        codes = [one["report"]["codes"] for one in runs]
        used = spread([c["usage"] * c["vocab_size"] for c in codes], 0)
        bits = spread([c["entropy_bits_per_position"][0] for c in codes], 2)
        lines.append(f"| {label} | {codes[0]['vocab_size']} | {used} | {bits} |")
    return "\n".join(lines) if len(lines) > 2 else "*Not yet run.*"


def adaptive_table(study: Study) -> str:
    """How many tokens images need for the target, by class, with our recipe."""
    runs = study.results(SHOWN)
    if not runs:
        return "*Not yet run.*"
    found = runs[0]["adaptive"]
    by_class = sorted(found["mean_tokens_by_class"].items(), key=lambda pair: pair[1])
    counts = dict(found["images_by_tokens"])
    longest, missed = list(counts)[-1], found["count"] - found["met"]
    counts |= {longest: counts[longest] - missed, "not met": missed}
    lines = [
        f"Of {found['count']} images, for the target {found['target'].replace('=', ' ')}; seed 0. "
        f"Means by class count images that do not meet it with {longest} tokens.",
        "",
        f"| tokens needed | {' | '.join(counts)} |",
        "|---" * (len(counts) + 1) + "|",
        f"| images | {' | '.join(map(str, counts.values()))} |",
        "",
        "| class | " + " | ".join(name for name, _ in by_class) + " |",
        "|---" * (len(by_class) + 1) + "|",
        "| mean tokens | " + " | ".join(f"{mean:.1f}" for _, mean in by_class) + " |",
    ]
    return "\n".join(lines)


def draw_figures(study: Study, folder: Path) -> None:
    """Curves over the number of tokens; strips of a test image of each class; what the tokenizers
    return, and what the generators make; and test images that share their first token, above what
    is decoded from it, where that model was trained here. Each of what is finished."""
    for file, (name, title) in DRAWN.items():
        rows = labelled_rows(study, name)
        rows.pop(study.file.tables[name]["rows"].get(OFF_SCALE), None)
        panels = {
            y_label: {label: mean_points(runs, score) for label, runs in rows.items()}
            for score, y_label in CURVES.items()
        }
        if rows:
            curves = viz.curves({title: panels}, "tokens", logarithmic=True)
            viz.save(curves, folder / file)
    for recipe in STRIPS:
        if made := find_examples(study, recipe):
            originals = made.pop(0)
            strips = viz.coarse_to_fine(originals, made, class_names(originals))
            viz.save(strips, folder / f"strips_{recipe}.png")
    written = {recipe: lengths for recipe, (_, lengths) in GENERATED.items()}
    if images := labelled_examples(study, "generation", written):
        viz.save(labelled_grid(images), folder / "generated.png")
    if images := labelled_examples(study, "reconstruction", COMPARED):
        originals = next(made[0] for name in COMPARED if (made := find_examples(study, name)))
        viz.save(labelled_grid([("original", originals), *images]), folder / "tokenizers.png")
    place = study.place(SHOWN, 0)
    if all((place / name).exists() for name in ("result.json", "model.safetensors")):
        images, labels = measured_images(study)
        viz.save(first_token_figure(load(place), images, labels), folder / "first_token.png")


def measured_images(study: Study) -> tuple[Tensor, Tensor]:
    """The test images (N, 3, 28, 28) that are measured, and their classes (N,)."""
    dataset = FashionMNIST(study.root, "test", limit=study.budget.images)
    transform = ImageTransform(28)
    images = [transform(dataset[i]["image"]) for i in range(len(dataset))]
    return torch.stack(images), torch.tensor(dataset.labels)


def draw_examples(study: Study, recipe: str, seed: int) -> None:
    """Keep what the figures show of a run beside its result, a row of images for each number of
    tokens: of a tokenizer the first test image of each class, below the original; of a generator
    that is drawn an image of each class."""
    place, rows = study.place(recipe, seed), dict[int, Tensor]()
    if (place / EXAMPLES).exists():
        return
    config = study.config(recipe, seed)
    if config.task == "tokenizer":
        images, labels = measured_images(study)
        rows[0] = images[[int((labels == label).nonzero()[0]) for label in labels.unique()]]
        rows |= reconstruct_prefixes(load(place), rows[0], study.lengths(recipe))
    elif recipe in GENERATED:
        tokenizer, classes = load(str(config.tokenizer)), list(FashionMNIST.class_names)
        guidance, lengths = GENERATED[recipe]
        sampling = {"guidance_scale": guidance}
        rows = generate_images(load(place), tokenizer, classes, lengths, sampling=sampling)
    if rows:
        tiles = torch.stack(list(rows.values()))
        viz.save(to_image(rearrange(tiles, "r c d h w -> d (r h) (c w)")), place / EXAMPLES)


def find_examples(study: Study, recipe: str) -> dict[int, Tensor]:
    """What draw_examples kept of the first seed that has some, here or among what is published:
    number of tokens -> (columns, 3, 28, 28) in [-1, 1]; 0 -> the originals."""
    places = [study.place(recipe, seed) / EXAMPLES for seed in study.all_seeds()]
    if study.published:
        files = [published_file(study.folder.name, recipe, n) for n in study.all_seeds()]
        places += [path.with_suffix(".png") for path in files]
    lengths = GENERATED[recipe][1] if recipe in GENERATED else [0, *study.lengths(recipe)]
    for path in places:
        if path.exists():
            try:
                pixels = torch.from_numpy(np.array(Image.open(path))) / 127.5 - 1
                tiles = rearrange(pixels, "(r h) (c w) d -> r c d h w", h=28, w=28)
                return dict(zip(lengths, tiles, strict=True))
            except (OSError, ValueError, EinopsError) as error:
                raise ConfigError(f"{path} is damaged ({error}): remove it") from None
    return {}


def labelled_examples(
    study: Study, table: str, wanted: dict[str, list[int]]
) -> list[tuple[str, Tensor]]:
    """What a table's label of a recipe begins with and a number of tokens, and such examples."""
    rows = study.file.tables[table]["rows"]
    return [
        (f"{rows[recipe].partition(',')[0]}, {k}", made[k])
        for recipe, lengths in wanted.items()
        if (made := find_examples(study, recipe))
        for k in lengths
    ]


def labelled_grid(rows: list[tuple[str, Tensor]]) -> Image.Image:
    labels, images = zip(*rows, strict=True)
    return viz.grid(list(images), class_names(images[0]), list(labels), scale=3)


def class_names(images: Tensor) -> list[str] | None:
    """The names of images of one class each; None where the few that are measured lack a class."""
    return list(FashionMNIST.class_names) if len(images) == len(FashionMNIST.class_names) else None


def mean_points(runs: list[dict[str, Any]], score: str) -> list[tuple[float, float]]:
    """(number of tokens, the score's mean over the runs)."""
    reports = zip(*(run["report"]["results"] for run in runs), strict=True)
    return [
        (rows[0]["num_tokens"], sum(row["scores"][score] for row in rows) / len(rows))
        for rows in reports
    ]


def first_token_figure(model: Any, images: Tensor, labels: Tensor, wide: int = 8) -> Any:
    """The most frequent first token of each class: a row of images that have it, of any class, and
    below it as many decodes of this token alone from other noise."""
    first = torch.cat([model.encode(some)[:, 0] for some in images.split(100)])
    rows, names = [], []
    classes: dict[int, list[str]] = {}  # of which a code is the most frequent first token
    for c in labels.unique():
        value = int(first[labels == c].mode().values)
        classes.setdefault(value, []).append(FashionMNIST.class_names[c])
    for value, of in classes.items():
        same = images[first == value][:wide]
        rngs = [torch.Generator().manual_seed(i) for i in range(wide)]
        rows += [same, model.decode(torch.full((wide, 1), value), generator=rngs)]
        names += [f"{', '.join(of)}: code {value}", "decoded"]
    return viz.grid(rows, row_labels=names, scale=2)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--budget", default="full", help="one of study.yaml's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, a core each")
    parser.add_argument("--only", nargs="+", metavar="RECIPE", help="and what they need")
    parser.add_argument("--seeds", nargs="+", type=int, help="by default those of the budget")
    parser.add_argument("--accelerator", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--root", default="data", help="of the data set, see FashionMNIST")
    parser.add_argument("--output", type=Path, default=Path("outputs/paper"))
    parser.add_argument("--page", action="store_true", help="train nothing, see above")
    parser.add_argument(
        "--publish", action="store_true", help="keep the results, and docs/paper.md of `full`"
    )
    options = parser.parse_args(arguments)
    try:
        make(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def make(options: argparse.Namespace) -> None:
    """What the command line asks for."""
    if options.jobs < 1:
        raise ConfigError(f"--jobs {options.jobs} must be at least 1")
    if options.accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("--accelerator gpu: PyTorch finds no GPU here")
    check_writable(options.output, "--output", folder=True)
    for name in options.only or []:
        if name not in RECIPES:
            raise ConfigError(f"no recipe {name!r}; known: {', '.join(RECIPES)}")
    study = Study.load(
        options.budget, options.output, options.root, options.page, options.accelerator
    )
    for seed in options.seeds or []:
        if seed not in study.budget.seeds:
            known = ", ".join(map(str, study.budget.seeds))
            raise ConfigError(f"--seeds {seed}: budget {options.budget} has {known}")
    chosen = [seed for seed in study.budget.seeds if seed in (options.seeds or study.budget.seeds)]
    adds = bool(options.page or options.only or options.seeds)  # to what is published
    if options.publish and adds and not options.page:
        take_classifier(study)
    if not options.page:
        run_parts(study._replace(chosen=chosen), options.only, options.jobs)
    elif not study.classifier():
        raise ConfigError(f"no results of budget {options.budget} in {study.folder}, {PUBLISHED}")
    compare(study._replace(chosen=chosen))
    # what is published is a page of all that is there, of all seeds
    study = study._replace(**({"published": adds} if options.publish else {"chosen": chosen}))
    page = write_page(study)
    if options.publish:
        publish(study, page)
    print(f"page: {page}")


if __name__ == "__main__":
    main()
