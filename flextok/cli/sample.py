"""`flextok sample`: pictures by class or prompt, and coarse-to-fine grids."""

import argparse
import difflib
import sys
from pathlib import Path
from typing import Any

from flextok.cli.common import (
    BY_CLASS,
    BY_PROMPT,
    TOKENIZER,
    add_command,
    add_decoding,
    add_json,
    data_of,
    decoding_options,
    open_data,
    pick_device,
    token_lengths,
)
from flextok.schema import check_number

MOST_CLASSES = 16  # in a grid whose classes nobody named
MOST_PIXELS = 2**26  # of a grid
MOST_SAMPLES, MOST_PICTURES = 10_000, 1_000_000
MOST_BYTES = 2**26  # of a file of prompts
BATCH = 64


def add_commands(commands: Any) -> None:
    sample = add_command(
        commands,
        "sample",
        run_sample,
        "reconstruct pictures, or generate by class or prompt, as a coarse-to-fine grid",
        "With a tokenizer: reconstruct --images or --data at each of --num-tokens. "
        "With a generator: generate --classes, or --prompt, --prompts-file or the captions of "
        "--data; prompts also get their last pictures as files beside the grid. "
        "Without a model: the one for the purpose of those that come with the package.",
        "flextok sample\n"
        "flextok sample --images cat.jpg --num-tokens 1 16 256\n"
        "flextok sample --classes food-fruit heart none --num-samples 4\n"
        'flextok sample --prompt "a red heart left of a bomb" --output heart.png\n'
        "flextok sample outputs/quickstart/generator",
    )
    sample.add_argument(
        "model",
        nargs="?",
        help="folder, name or hub id of a tokenizer or a generator; "
        f"default {TOKENIZER}, {BY_CLASS} or {BY_PROMPT}",
    )
    sample.add_argument("--images", nargs="+", metavar="FILE", help="picture files or folders")
    sample.add_argument(
        "--classes",
        nargs="*",
        metavar="CLASS",
        help="names, else numbers, else 'none' (or ''), for no class; alone: all, or "
        f"{MOST_CLASSES} of them",
    )
    sample.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts; '' = none")
    sample.add_argument("--prompts-file", metavar="FILE", help="one prompt a line")
    sample.add_argument("--num-samples", type=int, default=1, help="pictures a class or prompt")
    sample.add_argument("--tokenizer", help="generator: another place to find its tokenizer")
    sample.add_argument("--temperature", type=float)
    sample.add_argument("--top-k", type=int)
    sample.add_argument("--top-p", type=float)
    sample.add_argument(
        *("--class-guidance", "--text-guidance"),
        dest="cond_guidance",
        type=float,
        help="generator's guidance; none is 1, and 0 for a MaskGIT with linear or constant decay",
    )
    sample.add_argument("--generator-steps", type=int, help="MaskGIT's sampling steps")
    sample.add_argument("--output", default="outputs/sample.png", help="the PNG to write")
    add_decoding(sample)
    add_json(sample)


def run_sample(options: argparse.Namespace) -> dict[str, Any]:
    from flextok.pipeline import is_generator, load_model

    check_output(Path(options.output))
    if options.model is None:
        by_prompt = options.prompt or options.prompts_file
        by_class = options.classes is not None
        options.model = BY_PROMPT if by_prompt else BY_CLASS if by_class else TOKENIZER
    model = load_model(options.model, pick_device(options.device))
    make = generate if is_generator(model) else reconstruct
    found = make(model, options)
    return {"model": options.model, "seed": options.seed, "output": options.output, **found}


def generate(model: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Pictures by class, by prompt or of nothing; those of prompts are files, too. Returns what
    --json says of them."""
    import torch
    from tqdm import tqdm

    from flextok import viz
    from flextok.data.transforms import to_image
    from flextok.pipeline import generate_batches, load_tokenizer_of

    by_text, cond, names = conditions(model, options)
    device = next(model.parameters()).device
    tokenizer = load_tokenizer_of(model, options.model, options.tokenizer, device)
    lengths = token_lengths(options.num_tokens, tokenizer, model.num_tokens)
    room = max(1, MOST_PIXELS // (len(lengths) * max(128, tokenizer.image_size) ** 2))
    if len(names) > room and not by_text:
        raise ValueError(
            f"{len(names)} pictures of {len(lengths)} lengths do not fit one grid of {room}: ask "
            "for fewer --classes, --num-samples or --num-tokens"
        )
    sampling = {
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "guidance_scale": options.cond_guidance,
        "num_steps": options.generator_steps,
    }
    output, kept, done, files = Path(options.output), [], 0, []
    with tqdm(total=len(names), unit="picture", disable=None) as bar:
        for batch in generate_batches(
            *(model, tokenizer, cond, lengths, options.seed, sampling, decoding_options(options)),
            progress=lambda step: bar.set_postfix_str(f"step {step} of a batch"),
        ):
            pictures = {k: images.cpu() for k, images in batch.items()}
            last = pictures[lengths[-1]]
            if done < room:
                kept.append({k: images[: room - done] for k, images in pictures.items()})
            for number, picture in enumerate(last if by_text else (), done + 1):
                place = output.with_name(f"{output.stem}-{number}.png")
                files.append(str(viz.save(to_image(picture), place)))
                bar.write(f"wrote {files[-1]}", file=sys.stdout)
            done += len(last)
            bar.update(len(last))
    grid = {k: torch.cat([batch[k] for batch in kept]) for k in lengths}
    shown = names[: len(grid[lengths[0]])]
    if len(lengths) > 1:
        picture = viz.coarse_to_fine(None, grid, shown)
    else:
        picture = viz.samples(grid[lengths[0]], shown, options.num_samples)
    print(f"wrote {viz.save(picture, output)}" + beyond(len(shown), len(names)))
    return {"num_tokens": lengths, "conditions": names, "files": files}


def reconstruct(model: Any, options: argparse.Namespace) -> dict[str, Any]:
    """--images, --data or what the model was validated on, batch by batch; unreadable ones are
    skipped, and an error at the end if they were named. Returns what --json says of them."""
    import torch
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from flextok import viz
    from flextok.data.datasets import PictureFiles, take
    from flextok.data.stream import collate
    from flextok.evaluation.passes import Numbered
    from flextok.pipeline import decoding_options as checked
    from flextok.pipeline import reconstruct_prefixes

    if options.classes is not None or options.prompt or options.prompts_file:
        raise ValueError(
            "a tokenizer reconstructs --images or --data; it has no --classes or prompts"
        )
    if options.images and options.data:
        raise ValueError("name the pictures to reconstruct by --images or by --data, not by both")
    lengths = token_lengths(options.num_tokens, model, model.num_tokens)
    decoding = decoding_options(options)
    if model.vocab_size:
        checked(model, decoding)
    if options.images:
        source: Any = PictureFiles(options.images)
    else:
        source = data_of(options.data, options.model)
    limit = 8 if options.limit is None and not options.images else options.limit
    dataset = Numbered(take(source, limit), model.image_size)
    room = max(1, MOST_PIXELS // ((len(lengths) + 1) * max(128, model.image_size) ** 2))
    if len(dataset) > room:
        raise ValueError(
            f"{len(dataset)} pictures do not fit one grid of {room}: --limit them, or use flextok "
            "reconstruct, which writes one file each"
        )
    originals, made = [], []
    with tqdm(total=len(dataset), unit="picture", disable=None) as bar:
        for batch in DataLoader(dataset, batch_size=BATCH, collate_fn=collate):
            if batch:
                images, rows = batch["image"], batch["index"].tolist()
                decoded = reconstruct_prefixes(model, images, lengths, options.seed, decoding, rows)
                originals.append(images)
                made.append({k: pictures.cpu() for k, pictures in decoded.items()})
                bar.update(len(images))
    if not made:
        raise ValueError("none of the pictures could be read; see the warnings above")
    grid = {k: torch.cat([part[k] for part in made]) for k in lengths}
    print(f"wrote {viz.save(viz.coarse_to_fine(torch.cat(originals), grid), options.output)}")
    if options.images and (lost := len(dataset) - sum(map(len, originals))):
        raise ValueError(f"{lost} of {len(dataset)} pictures could not be read, see above")
    return {"num_tokens": lengths, "count": sum(map(len, originals))}


def beyond(shown: int, total: int) -> str:
    return "" if shown == total else f", which shows the first {shown} of {total} pictures"


def check_output(output: Path) -> None:
    """Raises ValueError where no picture can be written by that name."""
    from PIL import Image

    if output.is_dir():
        raise ValueError(f"--output {output} is a folder: name a picture, such as grid.png in it")
    Image.init()
    if output.suffix.lower() not in Image.EXTENSION or (
        Image.EXTENSION[output.suffix.lower()] not in Image.SAVE
    ):
        raise ValueError(f"--output {output} must end in .png, or as another picture format does")


def conditions(model: Any, options: argparse.Namespace) -> tuple[bool, Any, list[str]]:
    """Whether a generator reads prompts, what it is to generate from, and a name for each."""
    import torch

    from flextok.generators.conditioning import NULL_CLASS, NoConditioner, TextConditioner

    check_number("--num-samples", options.num_samples, 1, MOST_SAMPLES, whole=True)
    if isinstance(model.conditioner, TextConditioner):
        prompts = read_prompts(options)
        return True, prompts, prompts
    if isinstance(model.conditioner, NoConditioner):
        if options.classes is not None or options.prompt or options.prompts_file or options.data:
            raise ValueError(
                f"{options.model} generates without a condition: it takes no --classes, no "
                "prompts and no --data, only --num-samples"
            )
        return False, torch.full((options.num_samples,), NULL_CLASS), [""] * options.num_samples
    if options.images or options.data:
        raise ValueError("a generator makes pictures from --classes, not --images or --data")
    if options.prompt or options.prompts_file:
        raise ValueError(f"{options.model} knows classes, not prompts: use --classes")
    known, total = model.metadata.get("class_names", []), model.conditioner.num_classes
    return False, *class_labels(known, total, options.classes, options.num_samples)


def read_prompts(options: argparse.Namespace) -> list[str]:
    """--prompt, --prompts-file or the captions of --data, each --num-samples times."""
    if options.images or options.classes is not None:
        raise ValueError("this generator makes pictures from prompts, not --images or --classes")
    given = [bool(x) for x in (options.prompt, options.prompts_file, options.data)]
    if sum(given) != 1:
        raise ValueError("name the prompts: --prompt TEXT ..., --prompts-file FILE or --data SET")
    if options.prompt:
        prompts = options.prompt
    elif options.prompts_file:
        prompts = read_lines(Path(options.prompts_file))
    else:
        from flextok.data.datasets import take

        dataset = take(open_data(options.data), 8 if options.limit is None else options.limit)
        prompts = [dataset[i]["caption"] for i in range(len(dataset))]
    check_number("the number of pictures", len(prompts) * options.num_samples, 0, MOST_PICTURES)
    return [prompt for prompt in prompts for _ in range(options.num_samples)]


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    from flextok.data.pictures import decode_text

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
) -> tuple[Any, list[str]]:
    """Classes to labels and names, each num_samples times. An entry is a class's name; else its
    number; else "none" or "", for no class. By default all of them, or MOST_CLASSES, evenly
    spread."""
    import torch

    from flextok.generators.conditioning import NULL_CLASS

    names = known or [str(i) for i in range(total)]
    shown = min(len(names), MOST_CLASSES)
    asked = [label_of(entry, names) for entry in classes or ()]
    labels = asked or [i * len(names) // shown for i in range(shown)]
    titles = ["none" if label == NULL_CLASS else names[label] for label in labels]
    return (
        torch.tensor(labels).repeat_interleave(num_samples),
        [title for title in titles for _ in range(num_samples)],
    )


def label_of(entry: str, names: list[str]) -> int:
    from flextok.generators.conditioning import NULL_CLASS

    if entry in names:
        return names.index(entry)
    if entry.isascii() and entry.isdigit() and int(entry) < len(names):
        return int(entry)
    if entry in ("none", ""):
        return NULL_CLASS
    some = ", ".join(names[:MOST_CLASSES]) + (", ..." if len(names) > MOST_CLASSES else "")
    near = difflib.get_close_matches(entry, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown class {entry!r}; known: {some}, or 0 to {len(names) - 1}{hint}")
