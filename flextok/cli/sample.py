"""`flextok sample`: pictures by class or prompt, and coarse-to-fine grids."""

import argparse
from pathlib import Path
from typing import Any

from flextok.cli.common import (
    BY_CLASS,
    BY_PROMPT,
    HELD_OUT,
    TOKENIZER,
    add_command,
    add_decoding,
    decoding_options,
    open_data,
    pick_device,
    token_lengths,
)

MOST_CLASSES = 16  # in a grid whose classes nobody named


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
        help=f"names or numbers; 'none'; alone: all, or {MOST_CLASSES} of them",
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


def run_sample(options: argparse.Namespace) -> None:
    from flextok import viz
    from flextok.generators.conditioning import TextConditioner
    from flextok.pipeline import (
        generate_images,
        is_generator,
        load_model,
        load_tokenizer_of,
        reconstruct_prefixes,
    )

    if options.model is None:
        by_prompt = options.prompt or options.prompts_file
        by_class = options.classes is not None
        options.model = BY_PROMPT if by_prompt else BY_CLASS if by_class else TOKENIZER
    model = load_model(options.model, pick_device(options.device))
    device = next(model.parameters()).device
    decoding = decoding_options(options)
    if is_generator(model):
        by_text = isinstance(model.conditioner, TextConditioner)
        if by_text:
            cond = names = read_prompts(options)
        elif options.images or options.data:
            raise ValueError("a generator makes pictures from --classes, not --images or --data")
        elif options.prompt or options.prompts_file:
            raise ValueError(f"{options.model} knows classes, not prompts: use --classes")
        else:
            cond, names = class_labels(model, options.classes, options.num_samples)
            cond = cond.to(device)
        tokenizer = load_tokenizer_of(model, options.model, options.tokenizer, device)
        lengths = token_lengths(options.num_tokens, tokenizer, model.num_tokens)
        sampling = {
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
            "guidance_scale": options.cond_guidance,
            "num_steps": options.generator_steps,
        }
        pictures = generate_images(
            model, tokenizer, cond, lengths, options.seed, sampling, decoding
        )
        if len(lengths) > 1:
            picture = viz.coarse_to_fine(None, pictures, names)
        else:
            picture = viz.samples(pictures[lengths[0]], names, options.num_samples)
        if by_text:
            save_each(pictures[lengths[-1]], Path(options.output))
    else:
        if options.classes is not None or options.prompt or options.prompts_file:
            raise ValueError(
                "a tokenizer reconstructs --images or --data; it has no --classes or prompts"
            )
        lengths = token_lengths(options.num_tokens, model, model.num_tokens)
        images = read_images(options, model.image_size)
        decoded = reconstruct_prefixes(model, images, lengths, options.seed, decoding)
        picture = viz.coarse_to_fine(images, decoded)
    print(f"wrote {viz.save(picture, options.output)}")


def read_images(options: argparse.Namespace, size: int) -> Any:
    """--images, --data or held-out emoji as (n, 3, size, size) in [-1, 1]; unreadable ones are
    skipped."""
    from torch.utils.data import DataLoader

    from flextok.data.datamodule import prepare_image
    from flextok.data.datasets import PictureFiles, take
    from flextok.data.stream import EvaluationSet, collate
    from flextok.data.transforms import ImageTransform

    if options.images and options.data:
        raise ValueError("name the pictures to reconstruct by --images or by --data, not by both")
    source = PictureFiles(options.images) if options.images else open_data(options.data or HELD_OUT)
    limit = 8 if options.limit is None and not options.images else options.limit
    dataset = EvaluationSet(take(source, limit), prepare_image(ImageTransform(size)))
    batch = next(iter(DataLoader(dataset, batch_size=len(dataset), collate_fn=collate)))
    if not batch:
        raise ValueError("none of the pictures could be read; see the warnings above")
    return batch["image"]


def read_prompts(options: argparse.Namespace) -> list[str]:
    """--prompt, --prompts-file or the captions of --data, each --num-samples times."""
    if options.images or options.classes is not None:
        raise ValueError("this generator makes pictures from prompts, not --images or --classes")
    given = [bool(x) for x in (options.prompt, options.prompts_file, options.data)]
    if sum(given) != 1:
        raise ValueError("name the prompts: --prompt TEXT ..., --prompts-file FILE or --data SET")
    if options.num_samples < 1:
        raise ValueError(f"--num-samples {options.num_samples} must be at least 1")
    if options.prompt:
        prompts = options.prompt
    elif options.prompts_file:
        prompts = read_lines(Path(options.prompts_file))
    else:
        from flextok.data.datasets import take

        dataset = take(open_data(options.data), 8 if options.limit is None else options.limit)
        prompts = [dataset[i]["caption"] for i in range(len(dataset))]
    return [prompt for prompt in prompts for _ in range(options.num_samples)]


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    from flextok.data.pictures import decode_text

    if not path.is_file():
        raise ValueError(f"--prompts-file {path}: there is no such file")
    try:
        lines = [line.strip() for line in decode_text(path.read_bytes()).splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts-file {path} is not UTF-8 text ({error})") from None
    if not any(lines):
        raise ValueError(f"--prompts-file {path} is empty: write one prompt a line")
    return [line for line in lines if line]


def save_each(pictures: Any, output: Path) -> None:
    """(n, 3, H, W) -> <output>-1.png, <output>-2.png, ... beside the grid."""
    from flextok import viz
    from flextok.data.transforms import to_image

    for number, picture in enumerate(pictures, 1):
        path = viz.save(to_image(picture), output.with_name(f"{output.stem}-{number}.png"))
        print(f"wrote {path}")


def class_labels(model: Any, classes: list[str] | None, num_samples: int) -> tuple[Any, list[str]]:
    """Class names or numbers to labels, each num_samples times. By default all of
    them, or MOST_CLASSES, evenly spread."""
    import torch

    from flextok.generators.conditioning import NULL_CLASS

    known: list[str] = model.metadata.get("class_names", [])
    if num_samples < 1:
        raise ValueError(f"--num-samples {num_samples} must be at least 1")
    labels, names = [], []
    total = len(known) or 1
    shown = min(total, MOST_CLASSES)
    for entry in classes or [str(i * total // shown) for i in range(shown)]:
        if entry == "none":
            label = NULL_CLASS
        elif entry in known:
            label = known.index(entry)
        elif entry.isdigit() and (not known or int(entry) < len(known)):
            label = int(entry)
        else:
            raise ValueError(f"unknown class {entry!r}; known: {', '.join(known) or 'numbers'}")
        name = known[label] if known and label != NULL_CLASS else entry
        labels += [label] * num_samples
        names += [name] * num_samples
    return torch.tensor(labels), names
