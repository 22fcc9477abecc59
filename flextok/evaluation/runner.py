"""`evaluate`: one pass over the images, a row of measurements for each, and the report of them."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from flextok.data.labels import by_name
from flextok.data.parts import PartStore
from flextok.data.processes import Process
from flextok.evaluation import processes
from flextok.evaluation.distances import NEIGHBOURS, statistics
from flextok.evaluation.job import Cell, Job, Options, make_job
from flextok.evaluation.reference import Reference, save_reference
from flextok.evaluation.report import (
    Measured,
    check_output,
    make_report,
    read_report,
    write_report,
)
from flextok.evaluation.sources import (
    Batch,
    Captions,
    Images,
    Labels,
    Show,
    generated,
    real,
    reconstructed,
)
from flextok.generators.base import Generator
from flextok.generators.conditioning import NULL_CLASS, ClassConditioner, TextConditioner
from flextok.tokenizers.base import Tokenizer

PART = 64  # images: the unit of work that an interruption may lose, and that processes share


def evaluate(
    model: Tokenizer | Generator,
    data: Any,
    cells: Sequence[Cell] | None = None,
    options: Options | None = None,
    output: str | Path | None = None,
    names: Mapping[str, str] | None = None,
    tokenizer: Tokenizer | None = None,
) -> dict[str, Any]:
    """Measure a tokenizer by its reconstructions of every readable image of `data`, or a generator
    and its `tokenizer` by generated images, as a set, against those of `data`.

    data: a data set; for a generator also the path of a reference .npz. A generator that reads
    prompts gets the captions of data, one a sample. cells: ways to decode, by default all tokens.
    output: folder for report.json and, until it is done, the rows from which an interrupted
    evaluation continues; None keeps nothing (one process only). names: "model" and "data", for the
    report. The tokenizer's dtype decides the precision of its and the networks' arithmetic. Returns
    the report, on every process. Raises ValueError for missing weights, a reference that does not
    fit, options that the models do not have, and where no image can be read."""
    stored = str(data) if isinstance(data, str | Path) else None
    if isinstance(model, Generator):
        assert tokenizer is not None, "a generator needs its tokenizer"
        job = make_job(tokenizer, model, cells, options, names)
        if job.options.reference is not None:
            raise ValueError("a generator is compared with its data: name the .npz there")
        return evaluate_generator(job, model, data, stored, output)
    if stored is not None:
        raise ValueError(f"a tokenizer needs images to reconstruct, not {stored}")
    job = make_job(model, None, cells, options, names)
    load_references(job, job.options.reference)
    source = Images(data, model.image_size)
    check_enough(job, len(source))
    with folder_of(output) as folder:
        rows, seconds = measure(job, "reconstructed", source, reconstructed, folder)
        return finish(job, Measured(job, rows, rows, len(source), seconds), folder)


def evaluate_generator(
    job: Job, generator: Generator, data: Any, stored: str | None, output: str | Path | None
) -> dict[str, Any]:
    options, size = job.options, job.tokenizer.image_size
    by_caption = isinstance(generator.conditioner, TextConditioner)
    if stored is not None and by_caption:
        raise ValueError(f"this generator reads prompts, and {stored} holds none: name images")
    if stored is not None and (options.labels == "data" or options.num_samples is None):
        raise ValueError(
            f"{stored} states neither how many images to generate nor of which classes: give "
            "num_samples, and labels=balanced"
        )
    load_references(job, stored)
    number = options.num_samples or (0 if stored is not None else len(data))
    check_enough(job, number if stored is not None else min(number, len(data)))
    prompts: Captions | Labels | None = Captions(data, number) if by_caption else None
    with folder_of(output) as folder:
        images, asked = None, 0
        if stored is None:
            source = Images(in_classes_of(generator, data, options), size)
            images, _ = measure(job, "real", source, real, folder)
            processes.barrier()  # labels may come from other processes' rows
            asked = len(source)
        prompts = prompts or Labels(class_of_each(generator, number, images, options))
        made, seconds = measure(job, "generated", prompts, generated, folder)
        return finish(job, Measured(job, made, images, asked, seconds), folder)


def measure(
    job: Job, what: str, source: Images | Captions | Labels, show: Show, folder: Path
) -> tuple[PartStore, float]:
    """The rows of a source, those that the folder does not hold yet measured by this process and
    the others together, and the seconds it took."""
    store = PartStore.make(
        folder / f"flextok-{what}",
        what="evaluation",
        identity=job.identity(what, source.identity()),
        length=len(source),
        part_size=PART,
        process=Process(processes.rank(), processes.count()),
        replace=True,
    )
    started = time.perf_counter()
    compute = partial(measured_rows, job, show)
    store.fill(source, compute, job.options.batch_size, job.options.num_workers, desc=what)
    return store, time.perf_counter() - started


def measured_rows(job: Job, show: Show, batch: Batch) -> dict[str, Tensor]:
    """A row for each image of a batch: its "label", what each evaluator measured, as <side>/<name>,
    and each side's "hash" or "seconds"."""
    rows = {"label": batch["label"]}
    for side, shown in show(job, batch):
        columns = {key: shown[key] for key in shown if key in ("hash", "seconds")}
        for evaluator in job.evaluators:
            if all(need in shown for need in evaluator.needs):
                columns |= evaluator.measure(*(shown[need] for need in evaluator.needs))
        rows |= {f"{side}/{name}": column.cpu() for name, column in columns.items()}
    return rows


def in_classes_of(generator: Generator, data: Any, options: Options) -> Any:
    """The data with labels that count as a class generator's do, where it is asked for images of
    these. Raises ValueError for classes that it does not have."""
    names = generator.metadata.get("class_names")
    by_class = isinstance(generator.conditioner, ClassConditioner)
    if options.labels != "data" or not by_class or not names:
        return data
    try:
        return by_name(data, names)
    except ValueError as error:
        raise ValueError(f"{error}, or generate all classes alike (labels=balanced)") from None


def check_enough(job: Job, number: int) -> None:
    """Raises ValueError for too few images to compare as sets."""
    if job.networks and number <= NEIGHBOURS:
        raise ValueError(
            f"{number} images are too few to compare as sets: give at least {NEIGHBOURS + 1}, or "
            "no --networks"
        )


def load_references(job: Job, path: str | None) -> None:
    if path is None:
        return
    if not job.networks:
        raise ValueError(f"reference {path} needs a feature network: inception, for ADM's files")
    for evaluator in job.networks:
        evaluator.reference = Reference(path, evaluator.network, job.tokenizer.image_size)


def class_of_each(
    generator: Generator, number: int, images: PartStore | None, options: Options
) -> Tensor:
    """The label that each of `number` samples is generated from, (number,) long."""
    if options.labels == "data":
        assert images is not None, "checked before"
        labels = images.column("label")[:]
        return labels[torch.arange(number) % len(labels)]
    if not isinstance(generator.conditioner, ClassConditioner):
        return torch.full((number,), NULL_CLASS)
    return torch.arange(number) % generator.conditioner.num_classes


@contextmanager
def folder_of(output: str | Path | None) -> Iterator[Path]:
    if output is not None:
        Path(output).mkdir(parents=True, exist_ok=True)
        if processes.rank() == 0:  # what lies there until this one is done would be another's
            check_output(Path(output)).unlink(missing_ok=True)
        yield Path(output)
    elif processes.count() > 1:
        raise ValueError("several processes need an output folder, which they share")
    else:
        with TemporaryDirectory() as folder:
            yield Path(folder)


def finish(job: Job, measured: Measured, folder: Path) -> dict[str, Any]:
    """When all processes are done, the first one scores and cleans up; then all read the report."""
    processes.barrier()
    if processes.rank() == 0:
        if job.options.save_reference and measured.real is not None:
            (evaluator,) = job.networks
            save_reference(
                job.options.save_reference,
                statistics(measured.real.column(f"real/{evaluator.name}")[:]),
                evaluator.network,
                job.tokenizer.image_size,
                job.names.get("data", ""),
            )
        write_report(make_report(measured), folder)
        for store in {measured.made, measured.real or measured.made}:
            store.remove()
    processes.barrier()
    return read_report(folder)
