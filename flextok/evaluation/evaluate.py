"""Evaluations: load the networks, run the pass, score the rows, write report.json."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from flextok.data.labels import by_name
from flextok.evaluation import processes
from flextok.evaluation.distances import NEIGHBOURS, statistics
from flextok.evaluation.features import Networks, load_networks
from flextok.evaluation.job import Cell, Job, Options
from flextok.evaluation.passes import (
    Captions,
    Labels,
    Numbered,
    asked_of,
    collect,
    generation,
    real_pictures,
    reconstruction,
)
from flextok.evaluation.records import Records
from flextok.evaluation.reference import Reference, check_suffix, save_reference
from flextok.evaluation.report import check_output, make_report, read_report, write_report
from flextok.evaluation.scores import Measured
from flextok.generators.conditioning import NULL_CLASS, ClassConditioner, TextConditioner


def evaluate_tokenizer(
    tokenizer: Any,
    dataset: Any,
    cells: list[Cell],
    options: Options,
    output: str | Path | None = None,
    names: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Reconstruct every readable picture in each cell's way and compare it with the same crop.

    output: folder for report.json and, until it is done, the records from which an interrupted
    evaluation continues; None keeps nothing (one process only). names: "model" and "data", for the
    report. The tokenizer's dtype decides the precision of its and the networks' arithmetic. Returns
    the report, on every process. Raises ValueError for missing weights, a reference that does not
    fit, decoding options that the tokenizer does not have, and where no picture can be read."""
    job = make_job(tokenizer, None, cells, options, names)
    references = load_references(options.reference, job.networks, tokenizer.image_size)
    source = Numbered(dataset, tokenizer.image_size)
    check_enough(job, len(source))
    with folder_of(output) as folder:
        records = open_records(folder / "flextok-records", job, "reconstruction", source)
        seconds = collect(records, source, reconstruction(job), job, "reconstructing")
        measured = Measured(records, records, references, len(source), seconds)
        return finish(job, measured, folder)


def evaluate_generator(
    generator: Any,
    tokenizer: Any,
    data: Any,
    cells: list[Cell],
    options: Options,
    output: str | Path | None = None,
    names: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Generate pictures, decode them in each cell's way and score them as a set.

    data: a data set whose crops are the reference, or the path of a reference .npz. A generator
    that reads prompts gets the captions of data, one a sample. All else as in
    evaluate_tokenizer."""
    job = make_job(tokenizer, generator, cells, options, names)
    stored = data if isinstance(data, str | Path) else None
    by_caption = isinstance(generator.conditioner, TextConditioner)
    if stored is not None and by_caption:
        raise ValueError(f"this generator reads prompts, and {stored} holds none: name pictures")
    if stored is not None and (options.labels == "data" or options.num_samples is None):
        raise ValueError(
            f"{stored} says neither how many pictures to generate nor of which classes: give "
            "num_samples, and labels=balanced"
        )
    references = load_references(stored, job.networks, tokenizer.image_size)
    number = options.num_samples or (0 if stored is not None else len(data))
    check_enough(job, number if stored is not None else min(number, len(data)))
    captions = Captions(data, number) if by_caption else None
    with folder_of(output) as folder:
        real = None
        if stored is None:
            source = Numbered(in_classes_of(generator, data, options), tokenizer.image_size)
            real = open_records(folder / "flextok-records-real", job, "real", source)
            collect(real, source, real_pictures(job), job, "real pictures")
            processes.barrier()  # labels may come from other processes' rows
        prompts = captions or Labels(class_of_each(generator, number, real, options))
        made = open_records(folder / "flextok-records-generated", job, "generated", prompts)
        seconds = collect(made, prompts, generation(job), job, "generating")
        asked = 0 if real is None else real.length
        return finish(job, Measured(made, real, references, asked, seconds), folder)


def in_classes_of(generator: Any, data: Any, options: Options) -> Any:
    """The data with labels that count as a class generator's do, where it is asked for pictures of
    these. Raises ValueError for classes that it does not have."""
    names = generator.metadata.get("class_names")
    by_class = isinstance(generator.conditioner, ClassConditioner)
    if options.labels != "data" or not by_class or not names:
        return data
    try:
        return by_name(data, names)
    except ValueError as error:
        raise ValueError(f"{error}, or generate all classes alike (labels=balanced)") from None


def make_job(
    tokenizer: Any,
    generator: Any | None,
    cells: list[Cell],
    options: Options,
    names: dict[str, str] | None,
) -> Job:
    check_cells(cells, tokenizer, generator, options)
    if options.batch_size < 1:
        raise ValueError(f"batch_size={options.batch_size} must be at least 1")
    if options.num_samples is not None and options.num_samples < 2:
        raise ValueError(f"num_samples={options.num_samples} must be at least 2")
    parameter = next(tokenizer.parameters())
    networks = load_networks(
        options.networks, parameter.device, parameter.dtype, options.inception_weights
    )
    if options.save_reference:
        check_suffix(options.save_reference)
    if options.save_reference and len(networks.features) != 1:
        raise ValueError("a reference file holds one network's features: choose one of --networks")
    return Job(tokenizer, generator, networks, cells, options, names or {})


def check_cells(cells: list[Cell], tokenizer: Any, generator: Any | None, options: Options) -> None:
    """Raises ValueError for a way to decode that the models do not have."""
    total = (tokenizer if generator is None else generator).num_tokens
    for cell in cells:
        if not 1 <= cell.num_tokens <= total:
            raise ValueError(f"num_tokens={cell.num_tokens} must be in [1, {total}]")
        if cell.num_tokens < tokenizer.num_tokens and not tokenizer.ordered:
            raise ValueError(
                f"num_tokens={cell.num_tokens} must be {tokenizer.num_tokens}: this tokenizer "
                "decodes all of its tokens only"
            )
        asked_of(tokenizer, cell, options)


def check_enough(job: Job, number: int) -> None:
    """Raises ValueError for too few images to compare as sets."""
    if job.networks.features and number <= NEIGHBOURS:
        raise ValueError(
            f"{number} images are too few to compare as sets: give at least {NEIGHBOURS + 1}, or "
            "no --networks"
        )


def load_references(path: Any, networks: Networks, size: int) -> dict[str, Reference]:
    if path is None:
        return {}
    if not networks.features:
        raise ValueError(f"reference {path} needs a feature network: inception, for ADM's files")
    return {n.name: Reference(path, n, size) for n in networks.features}


def open_records(
    folder: Path, job: Job, what: str, source: Numbered | Labels | Captions
) -> Records:
    first = processes.rank() == 0  # it alone writes the identity down
    identity = job.identity(what, source.identity()) if first else {}
    return Records(folder, len(source), identity)


def class_of_each(generator: Any, number: int, real: Records | None, options: Options) -> Tensor:
    """The label that each of `number` samples is generated from, (number,) long."""
    if options.labels == "data":
        assert real is not None, "checked before"
        labels = real.column("label")[:]
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
            (network,) = job.networks.features
            save_reference(
                job.options.save_reference,
                statistics(measured.real.column(f"real/{network.name}")),
                network,
                job.tokenizer.image_size,
                job.names.get("data", ""),
            )
        write_report(make_report(job, measured), folder)
        for records in {measured.made, measured.real or measured.made}:
            records.close()
    processes.barrier()
    return read_report(folder)
