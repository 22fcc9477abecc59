"""`flextok sample`: images by class or prompt, and coarse-to-fine grids."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from flextok import viz
from flextok.cli.arguments import MOST_CLASSES, Sample
from flextok.cli.common import (
    data_of,
    files_of,
    open_data,
    pick_device,
    spare_others,
    spare_sources,
    token_lengths,
)
from flextok.cli.options import (
    BY_CLASS,
    BY_PROMPT,
    SAMPLING,
    TOKENIZER,
    Incomplete,
    chosen,
    decoding_options,
    refuse_given,
)
from flextok.data.datasets import PictureFiles
from flextok.data.pictures import decode_text
from flextok.data.sets import take
from flextok.data.stream import EvaluationSet, as_it_is, collate
from flextok.evaluation.sources import Images, skipping
from flextok.files import check_writable
from flextok.generators import Generator
from flextok.generators.conditioning import (
    NULL_CLASS,
    NoConditioner,
    TextConditioner,
    class_label,
)
from flextok.images import to_image
from flextok.pipeline import (
    batches_of,
    generate_images,
    load_token_model,
    load_tokenizer_of,
    reconstruct_prefixes,
)
from flextok.schema import check_number
from flextok.tokenizers import Tokenizer

MOST_PIXELS = 2**26  # of a grid
MOST_IMAGES = 1_000_000
MOST_BYTES = 2**26  # of a file of prompts
BATCH = 64
Batches = Iterator[tuple[Tensor | None, dict[int, Tensor]]]  # originals, images by length
ORIGINAL = 0  # in place of a number of tokens


# what makes images of what
TAKES: dict[str, tuple[str, tuple[str, ...]]] = {
    "tokenizer": ("is a tokenizer, which reconstructs", ("images", "data")),
    "text": ("generates from prompts", ("prompt", "prompts_file", "data")),
    "class": ("generates by class", ("classes",)),
    "none": ("generates without a condition", ()),
}


def run_sample(options: Sample) -> dict[str, Any]:
    output = Path(options.output)
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder: name a file, such as grid.png in it")
    longest = viz.LONGEST_SIDE.get(viz.image_format(output), MOST_PIXELS)
    check_writable(output, "--output")
    if not options.model:
        by_prompt = options.prompt or options.prompts_file
        by_class = options.classes is not None
        options.model = BY_PROMPT if by_prompt else BY_CLASS if by_class else TOKENIZER
    model: Any = load_token_model(options.model, pick_device(options.device))
    reconstructs = isinstance(model, Tokenizer)
    kind = "tokenizer" if reconstructs else model.config.conditioner["name"]
    check_taken(kind, options)
    tokenizer = model
    if not reconstructs:
        tokenizer = load_tokenizer_of(model, options.model, options.tokenizer, model.device)
    lengths = token_lengths(options.num_tokens, tokenizer, model.num_tokens)
    size = tokenizer.checked_shape(options.height, options.width)
    if reconstructs:
        names, batches = reconstruction(model, lengths, options)
    else:
        names, batches = generation(model, tokenizer, lengths, options)
    columns = len(lengths) + reconstructs
    room = max(1, MOST_PIXELS // (columns * max(128, *size) ** 2))
    in_a_row = options.num_samples if reconstructs or len(lengths) == 1 else 1
    room = min(room, longest // (max(128, *size) + 2 * viz.GAP) * in_a_row)
    if reconstructs:  # whole rows
        room = max(1, room // options.num_samples) * options.num_samples
    if len(names) > room and kind != "text":
        raise ValueError(
            f"{len(names)} images do not fit one grid of {room} in {output}: ask for "
            "fewer by --limit, --classes, --num-samples or --num-tokens"
        )
    bar = tqdm(total=len(names), unit="image", disable=None)
    grid, done, files = collect(batches, room, output, kind == "text", bar)
    shown_names = names[: len(grid[lengths[0]])]
    if reconstructs:
        picture = viz.coarse_to_fine(grid.pop(ORIGINAL), grid, draws=options.num_samples)
    elif len(grid) > 1:
        picture = viz.coarse_to_fine(None, grid, shown_names)
    else:
        picture = viz.samples(grid[lengths[0]], shown_names, options.num_samples)
    beyond = f", which shows the first {len(shown_names)} of {done} images"
    print(f"wrote {viz.save(picture, output)}{beyond if len(shown_names) < done else ''}")
    lost = len(names) - done
    found: dict[str, Any] = {"count": done, "unreadable": lost}
    if not reconstructs:
        found = {"conditions": names, "files": files}
    asked = {"model": options.model, "seed": options.seed, "output": options.output}
    report = {**asked, "num_tokens": lengths, **found}
    if options.images and lost:
        raise Incomplete(f"{lost} of {len(names)} images could not be read, see above", report)
    return report


def collect(
    batches: Batches, room: int, output: Path, as_files: bool, bar: tqdm
) -> tuple[dict[int, Tensor], int, list[str]]:
    """The first `room` images of each length (and the originals), how many were made, and the files
    written beside `output`, as_files: one for each image of the longest length."""
    kept: list[dict[int, Tensor]] = []
    done, files = 0, []
    with bar:
        for original, batch in batches:
            images = {k: made.cpu() for k, made in batch.items()}
            last = images[max(images)]
            if done < room:
                shown = images if original is None else {**images, ORIGINAL: original}
                kept.append({k: some[: room - done] for k, some in shown.items()})
            for number, image in enumerate(last if as_files else (), done + 1):
                files.append(str(viz.save(to_image(image), numbered(output, number))))
                bar.write(f"wrote {files[-1]}", file=sys.stdout)
            done += len(last)
            bar.update(len(last))
    if not done:
        raise ValueError("none of the images could be read; see the warnings above")
    return {k: torch.cat([batch[k] for batch in kept]) for k in kept[0]}, done, files


def check_taken(kind: str, options: Sample) -> None:
    """Raise ValueError for an option that a model of this kind does not take, and for two of which
    it takes one."""
    does, taken = TAKES[kind]
    every = sorted({name for _, names in TAKES.values() for name in names})
    given = [name for name in every if vars(options)[name] is not None]
    flags = [f"--{name.replace('_', '-')}" for name in taken]
    if wrong := [name for name in given if name not in taken]:
        instead = f"it takes {' or '.join(flags) or '--num-samples only'}"
        raise ValueError(f"{options.model} {does}: {instead}, not --{wrong[0].replace('_', '-')}")
    if len(given) > 1 or (kind == "text" and not given):
        raise ValueError(f"{options.model} {does}: name one of {', '.join(flags)}")
    if kind == "tokenizer":
        refuse_given(options, (*SAMPLING.values(), "tokenizer"), f"{options.model} {does}")
    elif options.data is None:
        refuse_given(options, ("limit",), f"{options.model} {does}, not from images")


def reconstruction(
    model: Tokenizer, lengths: list[int], options: Sample
) -> tuple[list[str], Batches]:
    """--images, --data or what the model was validated on, each drawn --num-samples times;
    unreadable ones are skipped."""
    decoding, number = decoding_options(options), options.num_samples
    if number > 1 and not model.stochastic:
        raise ValueError(f"{options.model} decodes to one image: leave --num-samples out")
    if options.images:
        data, limit = PictureFiles(options.images), options.limit
    else:
        data, limit = data_of(options.data, options.model), options.limit or 8
    spare_sources([options.output], files_of(data))
    data = take(data, limit)
    dataset = skipping(Images(data, model.checked_shape(options.height, options.width)))

    def batches() -> Batches:
        for batch in DataLoader(dataset, batch_size=BATCH, collate_fn=collate):
            if batch:
                images = batch["image"].repeat_interleave(number, dim=0)
                rows = [number * i + j for i in batch["index"].tolist() for j in range(number)]
                made = reconstruct_prefixes(model, images, lengths, options.seed, decoding, rows)
                yield images, made

    return [""] * len(dataset) * number, batches()


def generation(
    model: Generator, tokenizer: Tokenizer, lengths: list[int], options: Sample
) -> tuple[list[str], Batches]:
    """Images by class, by prompt or without a condition, and their names."""
    cond: Tensor | list[str]
    if isinstance(model.conditioner, TextConditioner):
        data = open_data(options.data) if options.data else None
        cond = names = read_prompts(options, data)
        beside = [numbered(options.output, n) for n in range(1, len(names) + 1)]
        spare_sources([options.output, *beside], files_of(data))
        spare_others(beside)
    elif isinstance(model.conditioner, NoConditioner):
        names = [""] * options.num_samples
        cond = torch.full((options.num_samples,), NULL_CLASS)
    else:
        known, total = model.metadata.get("class_names", []), model.conditioner.num_classes
        cond, names = class_labels(known, total, options.classes, options.num_samples)
    how = (lengths, options.seed, chosen(options, SAMPLING), decoding_options(options))

    def batches() -> Batches:
        for rows in batches_of(len(names), BATCH):
            some = cond[rows.start : rows.stop]
            yield None, generate_images(model, tokenizer, some, *how, rows)

    return names, batches()


def numbered(output: str | Path, number: int) -> Path:
    """The file beside a grid that holds one of its images."""
    return Path(output).with_name(f"{Path(output).stem}-{number}.png")


def read_prompts(options: Sample, data: Any) -> list[str]:
    """--prompt, --prompts-file or the captions of data, each --num-samples times."""
    prompts = options.prompt or []
    if options.prompts_file:
        prompts = read_lines(Path(options.prompts_file))
    elif data is not None:
        prompts = captions_of(take(data, options.limit or 8))
        if not prompts:
            raise ValueError(
                f"no image of --data {options.data} has a caption: put .txt files beside them, or "
                "give --prompt"
            )
    check_number("the number of images", len(prompts) * options.num_samples, 0, MOST_IMAGES)
    return [prompt for prompt in prompts for _ in range(options.num_samples)]


def captions_of(dataset: Any) -> list[str]:
    """Those of the images that can be read and have one."""
    read = EvaluationSet(dataset, as_it_is)
    items = (read[i] for i in range(len(read)))
    return [item["caption"] for item in items if item and item["caption"]]


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    if not path.is_file():
        raise ValueError(f"--prompts-file {path}: there is no such file")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"--prompts-file {path} has over {MOST_BYTES >> 20} MB: split it")
    try:
        lines = [line.strip() for line in decode_text(path.read_bytes()).splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts-file {path} is not UTF-8 text ({error})") from None
    if not any(lines):
        raise ValueError(f"--prompts-file {path} is empty: write one prompt a line")
    return [line for line in lines if line]


def class_labels(
    known: list[str], total: int, classes: list[str] | None, num_samples: int
) -> tuple[Tensor, list[str]]:
    """Classes to labels and names, each num_samples times. An entry is a class's name; else its
    number; else "none" or "", for no class. By default all of them, or MOST_CLASSES, evenly
    spread."""
    names = known or [str(i) for i in range(total)]
    shown = min(len(names), MOST_CLASSES)
    asked = [class_label(entry, names) for entry in classes or ()]
    labels = asked or [i * len(names) // shown for i in range(shown)]
    titles = ["none" if label == NULL_CLASS else names[label] for label in labels]
    return (
        torch.tensor(labels).repeat_interleave(num_samples),
        [title for title in titles for _ in range(num_samples)],
    )
