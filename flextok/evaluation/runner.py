"""`evaluate`: one pass over the images, a row of measurements for each, and the report of them."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from flextok.data import parts
from flextok.data.parts import PartStore
from flextok.data.processes import Process
from flextok.data.sets import by_name
from flextok.draws import sample_evenly
from flextok.evaluation import processes, sources
from flextok.evaluation.distances import NEIGHBOURS, statistics
from flextok.evaluation.job import Cell, Job, Options, make_job
from flextok.evaluation.reference import MeasuredReference, Reference, save_reference
from flextok.evaluation.report import (
    REPORT,
    Measured,
    check_output,
    classes_of,
    labels_of,
    make_report,
    write_report,
)
from flextok.evaluation.sources import Batch, Images, Prompts, Show, readable
from flextok.files import only_one, read_mapping
from flextok.generators.base import Generator
from flextok.generators.conditioning import NULL_CLASS, ClassConditioner
from flextok.tokenizers.base import Tokenizer

PART = 64  # images: the unit of work that an interruption may lose, and that processes share


def evaluate(
    model: Tokenizer | Generator,
    data: Any,
    cells: Sequence[Cell] | None = None,
    options: Options | None = None,
    output: str | Path | None = None,
    names: Mapping[str, str | Path] | None = None,
    tokenizer: Tokenizer | None = None,
) -> dict[str, Any]:
    """Measure a tokenizer by its reconstructions of every readable image of `data`, or a generator
    and its `tokenizer` by generated images, as a set, against those of `data`.

    data: a data set; for a generator also the path of a reference .npz. A generator that reads
    prompts gets the captions of data, one a sample. cells: ways to decode, by default all tokens.
    output: folder for report.json and, until it is done, the rows from which an interrupted
    evaluation continues; None keeps nothing (one process only). names: "model", "data" and
    "reference", for the report. The tokenizer's dtype decides the precision of its and the
    networks' arithmetic. Returns the report, on every process. Raises ValueError for missing
    weights, a reference that does not fit, options that the models do not have, and where no image
    can be read."""
    job = make_job(model, cells, options, tokenizer)
    called = {key: str(name) for key, name in (names or {}).items()}
    stored = str(data) if isinstance(data, str | Path) else None
    load_references(job, stored)
    asked = None if stored is not None else len(data)
    check_enough(job, asked)
    images = None
    if stored is None:
        images = Images(in_classes_of(job, data), job.tokenizer.image_size)
    number = (job.generator and job.options.num_samples) or asked or 0
    other = None
    if job.options.reference is not None and not isinstance(job.options.reference, str | Path):
        other = Images(job.options.reference, job.tokenizer.image_size)
    check_captions(job, images)
    with folder_of(output) as folder:
        started, real, reference = time.perf_counter(), None, None
        if other is not None:
            reference = measure(job, "reference", other, sources.real, folder)
            for evaluator in job.networks:
                name = called.get("reference", "data set")
                evaluator.reference = MeasuredReference(name, reference, evaluator.name)
        if images is not None and job.generator is None:
            real = made = measure(job, "reconstructed", images, sources.reconstructed, folder)
        else:
            if images is not None:
                real = measure(job, "real", images, sources.real, folder)
            processes.barrier()  # prompts may come from other processes' rows
            prompts = prompts_of(job, number, real)
            made = measure(job, "generated", prompts, sources.generated, folder)
        seconds = time.perf_counter() - started
        return finish(
            job, Measured(job, made, real, reference, asked or 0, seconds), folder, called
        )


def check_enough(job: Job, asked: int | None) -> None:
    """Raise ValueError where a network compares sets and there are too few images for it; asked:
    how many the data has, None where it is a reference file."""
    options = job.options
    sizes = [asked, options.num_samples]
    if options.reference is not None and not isinstance(options.reference, str | Path):
        sizes.append(len(options.reference))
    enough = min((size for size in sizes if size is not None), default=0)
    if job.networks and enough <= NEIGHBOURS:
        raise ValueError(
            f"{enough} images are too few to compare as sets: give at least {NEIGHBOURS + 1}, or "
            "name no network that does (--networks with nothing behind it)"
        )


def check_captions(job: Job, images: Images | None) -> None:
    """Raise ValueError where captions are compared, or generated from, and there are none."""
    compared = [e.name for e in job.evaluators if "captions" in e.needs]
    if compared and job.generator is not None and not job.reads_prompts:
        raise ValueError(f"{compared[0]} compares images with prompts, which this generator lacks")
    if images and (compared or job.reads_prompts) and not has_captions(images):
        reader = (
            "this generator reads prompts" if job.reads_prompts else f"{compared[0]} reads them"
        )
        raise ValueError(
            f"{reader}, and the images have no captions: give DATA with captions (.txt files "
            "beside images, a caption column or key)"
        )


def measure(job: Job, what: str, source: Images | Prompts, show: Show, folder: Path) -> PartStore:
    """The rows of a source: those that the folder does not hold yet are measured, by this process
    and the others together."""
    process = Process(processes.rank(), processes.count())
    if process.rank:
        processes.barrier()  # until the first one has begun the store
    try:
        store = PartStore.make(
            folder / f"flextok-{what}",
            what="evaluation",
            identity=job.identity(what, source.identity()),
            length=len(source),
            part_size=PART,
            process=process,
            replace=process.rank == 0,
        )
    except ValueError as error:
        if process.rank == 0:
            raise
        raise ValueError(
            f"process {process.rank} is to measure something else than the first one: {error}; all "
            "must read the same files, and not copies of them"
        ) from None
    if not process.rank:
        processes.barrier()
    compute = partial(measured_rows, job, show)
    store.fill(source, compute, job.options.batch_size, job.options.num_workers, desc=what)
    return store


def measured_rows(job: Job, show: Show, batch: Batch) -> parts.Rows:
    """A row for each image of a batch: its "label" and "caption", what each evaluator measured, as
    <side>/<name>, and each side's "hash" or "seconds"."""
    rows = {key: batch[key] for key in ("label", "caption") if key in batch}
    for side, shown in show(job, batch):
        columns = {key: shown[key] for key in shown if key in ("hash", "seconds")}
        for evaluator in job.evaluators:
            if all(need in shown for need in evaluator.needs):
                found = evaluator.measure(*(shown[need] for need in evaluator.needs))
                if twice := columns.keys() & found.keys():
                    raise ValueError(
                        f"evaluator {evaluator.name} measures {min(twice)!r}, and so does another: "
                        f"give it a name of its own, such as {evaluator.name}/{min(twice)}"
                    )
                columns |= found
        rows |= {f"{side}/{name}": column for name, column in columns.items()}
    return rows


def has_captions(images: Images) -> bool:
    """Whether any image has one: if no other has, all are read."""
    every = (item for i in range(len(images)) for item in readable(images, [i]))
    return any(item["caption"] for item in chain(images.few(), every))


def load_references(job: Job, stored: str | None) -> None:
    """Give the networks the stored reference that is in place of the data, or beside it. Raises
    ValueError for a data set, or a reference, that cannot serve."""
    options = job.options
    if job.generator is None and stored is not None:
        raise ValueError(f"a tokenizer needs images to reconstruct, not {stored}")
    if job.generator is not None and options.reference is not None:
        raise ValueError("a generator is compared with its data: name the reference there")
    if stored is not None and job.reads_prompts:
        raise ValueError(f"this generator reads prompts, and {stored} holds none: name images")
    if stored is not None and (options.labels == "data" or options.num_samples is None):
        raise ValueError(
            f"{stored} states neither how many images to generate nor of which classes: give "
            "num_samples, and labels=balanced"
        )
    if stored is not None and options.save_reference:
        raise ValueError(f"{stored} holds statistics already: leave --save-reference out")
    if (wanted := stored or options.reference) is None:
        return
    if not job.networks:
        raise ValueError(
            "a reference needs a feature network: name inception, which ADM's statistics are of, "
            "or efficientnet_lite0_native (pip install 'flextok[evaluation]')"
        )
    if isinstance(wanted, str | Path):
        for evaluator in job.networks:
            evaluator.reference = Reference(wanted, evaluator.network, job.tokenizer.image_size)


def in_classes_of(job: Job, data: Any) -> Any:
    """The data with labels that count as a class generator's do, where it is asked for images of
    these. Raises ValueError for classes that it does not have."""
    if job.generator is None or job.options.labels != "data":
        return data
    names = job.generator.metadata.get("class_names")
    if not names or not isinstance(job.generator.conditioner, ClassConditioner):
        return data
    try:
        return by_name(data, names)
    except ValueError as error:
        raise ValueError(f"{error}, or generate all classes alike (labels=balanced)") from None


def prompts_of(job: Job, number: int, real: PartStore | None) -> Prompts:
    """What each of `number` samples is generated from: the captions of the images that have one,
    their labels, or all classes alike, each in order; see sample_evenly."""
    if real is not None and (job.reads_prompts or job.options.labels == "data"):
        known = labels_of(real)
        if not job.reads_prompts:
            if lost := int((known < 0).sum()):
                raise ValueError(
                    f"{lost} of {len(known)} images have a label that is none of the classes, so "
                    "none can be generated like them: give class_names, or labels=balanced"
                )
            chosen = sample_evenly(number, len(known))
            return Prompts(known[chosen], known[chosen])
        captions = real.column("caption").texts()
        captioned = [i for i, caption in enumerate(captions) if caption]
        chosen = [captioned[i] for i in sample_evenly(number, len(captioned))]
        return Prompts([captions[i] for i in chosen], known[chosen])
    classes = classes_of(job)
    labels = torch.tensor(each_class(number, classes) if classes else [NULL_CLASS] * number)
    return Prompts(labels, labels)


def each_class(number: int, classes: int) -> list[int]:
    """The classes of `number` images: over and over, or evenly spread where there are fewer."""
    if number < classes:
        return sample_evenly(number, classes)
    return [i % classes for i in range(number)]


@contextmanager
def folder_of(output: str | Path | None) -> Iterator[Path]:
    if output is not None:
        folder = Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        first = processes.rank() == 0
        with only_one(folder, leave=False) if first else nullcontext():
            if first:  # an earlier report stays until this one is done
                check_output(folder)
            processes.barrier()  # before that the folder may be another evaluation's
            yield folder
    elif processes.count() > 1:
        raise ValueError("several processes need an output folder, which they share")
    else:
        with TemporaryDirectory() as temporary:
            yield Path(temporary)


def finish(job: Job, measured: Measured, folder: Path, names: Mapping[str, str]) -> dict[str, Any]:
    """When all processes are done, the first one scores and cleans up; then all read the report."""
    processes.barrier()
    if processes.rank() == 0:
        if job.options.save_reference and measured.real is not None:
            (evaluator,) = job.networks
            found = statistics(measured.real.column(f"real/{evaluator.name}")[:])
            how = (evaluator.network, job.tokenizer.image_size, names.get("data", ""))
            save_reference(job.options.save_reference, found, *how)
        write_report(make_report(measured, names), folder)
        stores = (measured.made, measured.real, measured.reference)
        for store in {store for store in stores if store is not None}:
            store.remove()
    processes.barrier()
    return read_mapping(folder / REPORT)
