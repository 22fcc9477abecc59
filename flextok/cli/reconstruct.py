"""`flextok reconstruct`: pictures in, their reconstructions from the first tokens out, as PNG."""

import argparse
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flextok.cli.common import (
    TOKENIZER,
    add_command,
    add_solving,
    check_lengths,
    decoding_options,
    load_tokenizer,
)
from flextok.printing import printable

FOLDER = "outputs/reconstructed"
log = logging.getLogger(__name__)


def add_commands(commands: Any) -> None:
    parser = add_command(
        commands,
        "reconstruct",
        run_reconstruct,
        "encode pictures and decode their first tokens, one PNG each",
        "Crops each picture to a square of the model's size, encodes it and decodes it from all "
        "tokens, or from the first few. Several pictures or lengths go to a folder, as "
        "<picture>-<tokens>.png. A picture named - is read from standard input, and its "
        "reconstruction goes to standard output. Unreadable pictures are skipped, and the exit "
        "code is 1 then.",
        "flextok reconstruct cat.jpg\n"
        "flextok reconstruct holiday/ --num-tokens 1 4 16 --output outputs/holiday --json\n"
        "flextok reconstruct - --num-tokens 4 < cat.jpg > cat-4.png",
        *("--num-tokens", "--seed", "--device", "--json"),
    )
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="files, folders or -")
    parser.add_argument("--model", default=TOKENIZER, help="a tokenizer's folder, name or hub id")
    add_solving(parser)
    parser.add_argument(
        "--output", help=f"a folder, a file.png or - (standard output); default {FOLDER}"
    )


def run_reconstruct(options: argparse.Namespace) -> list[dict[str, Any]]:
    from tqdm import tqdm

    from flextok.data.pictures import CorruptPicture, load_picture
    from flextok.data.transforms import ImageTransform, to_image
    from flextok.evaluation.metrics import psnr
    from flextok.images import MAX_FILE_BYTES
    from flextok.pipeline import reconstruct_prefixes

    sources = dict(list_sources(options.pictures))
    number = len(sources) * len(set(options.num_tokens or [0]))
    output = options.output or ("-" if options.pictures == ["-"] else FOLDER)
    check_output(output, number, options.json == "-")
    model = load_tokenizer(options.model, options.device)
    lengths = check_lengths(options.num_tokens or [model.num_tokens], model.num_tokens)
    results, unreadable = [], 0
    for name, source in tqdm(sources.items(), unit="picture", disable=None):
        try:
            piped = source == "-"
            content = sys.stdin.buffer.read(MAX_FILE_BYTES + 1) if piped else source
            picture = load_picture(content, source)
        except CorruptPicture as error:
            log.warning("skipped %s", error)
            unreadable += 1
            continue
        images = ImageTransform(model.image_size)(picture)[None]
        decoded = reconstruct_prefixes(
            model, images, lengths, options.seed, decoding_options(options)
        )
        for k, made in decoded.items():
            place = write_picture(to_image(made[0]), output, f"{name}-{k}.png")
            quality = psnr(made.cpu(), images).item()
            results.append({"picture": source, "output": place, "num_tokens": k, "psnr": quality})
            if output != "-":
                print(f"wrote {printable(place)}  ({k} tokens, {quality:.2f} dB)")
    if unreadable:
        raise ValueError(f"{unreadable} of {len(sources)} pictures could not be read, see above")
    return results


def list_sources(pictures: list[str]) -> Iterator[tuple[str, str]]:
    """(name of the output without ending, path or -) of each picture; those of a folder keep their
    place in it."""
    from flextok.data.datasets import EXTENSIONS
    from flextok.data.pictures import list_pictures

    taken: dict[str, str] = {}
    for entry in pictures:
        place = Path(entry)
        if entry != "-" and not place.exists():
            raise ValueError(f"there is no picture {entry!r}")
        found = {Path("stdin" if entry == "-" else place.name): entry}
        if place.is_dir():
            found = {p.relative_to(place): str(p) for p in list_pictures(place, EXTENSIONS)}
            if not found:
                raise ValueError(f"no pictures in {entry!r}")
        for path, source in found.items():
            name = path.with_suffix("").as_posix()
            if name in taken:
                raise ValueError(
                    f"{taken[name]} and {source} would be written to the same file: reconstruct "
                    "them one by one, or the folder above both"
                )
            taken[name] = source
            yield name, source


def check_output(output: str, number: int, is_json: bool) -> None:
    if (output == "-" or output.endswith(".png")) and number > 1:
        raise ValueError(f"--output {output} holds one picture, not {number}: name a folder")
    if output == "-" and is_json:
        raise ValueError("standard output takes the picture or --json: name a file for one")
    if output == "-" and sys.stdout.isatty():
        raise ValueError("standard output is a terminal: name a file with --output")


def write_picture(picture: Any, output: str, name: str) -> str:
    """Write the PNG; returns where."""
    from flextok import viz

    if output == "-":
        buffer = io.BytesIO()
        picture.save(buffer, format="png")
        sys.stdout.buffer.write(buffer.getvalue())
        return output
    place = Path(output) if output.endswith(".png") else Path(output) / name
    return str(viz.save(picture, place))
