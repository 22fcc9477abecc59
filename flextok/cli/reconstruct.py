"""`flextok reconstruct`: pictures in, their reconstructions from the first tokens out, as PNG."""

import io
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from flextok import viz
from flextok.cli.arguments import RECONSTRUCTED, Reconstruct
from flextok.cli.common import check_folder, check_lengths, load_tokenizer, spare_sources
from flextok.cli.options import Incomplete, decoding_options
from flextok.data.datasets import EXTENSIONS
from flextok.data.pictures import CorruptPicture, list_pictures, load_picture
from flextok.evaluation.metrics import psnr
from flextok.files import check_writable
from flextok.images import MAX_FILE_BYTES, to_image
from flextok.pipeline import reconstruct_prefixes
from flextok.printing import printable

log = logging.getLogger(__name__)


def run_reconstruct(options: Reconstruct) -> list[dict[str, Any]]:
    output = options.output or ("-" if options.pictures == ["-"] else RECONSTRUCTED)
    sources = dict(list_sources(options.pictures, Path(output).resolve()))
    number = len(sources) * len(set(options.num_tokens or [0]))
    check_output(output, number, options.json == "-")
    model = load_tokenizer(options.model, options.device)
    lengths = check_lengths(options.num_tokens or [model.num_tokens], model.num_tokens)
    height, width = model.checked_shape(options.height, options.width)
    size = {"height": height, "width": width}
    places = {(name, k): place_of(output, name, k) for name in sources for k in lengths}
    spare_sources(places.values(), sources.values())
    results: list[dict[str, Any]] = []
    unreadable = 0
    for name, source in tqdm(sources.items(), unit="picture", disable=None):
        try:
            piped = source == "-"
            content = sys.stdin.buffer.read(MAX_FILE_BYTES + 1) if piped else source
            picture = load_picture(content, source)
        except CorruptPicture as error:
            log.warning("skipped %s", error)
            results.append({"picture": source, "error": str(error)})
            unreadable += 1
            continue
        images = model.transform(picture, **size)[None]
        decoded = reconstruct_prefixes(
            model, images, lengths, options.seed, decoding_options(options)
        )
        for k, made in decoded.items():
            place = places[name, k]
            write_picture(to_image(made[0]), place)
            quality = psnr(made.cpu(), images).item()
            results.append({"picture": source, "output": place, "num_tokens": k, "psnr": quality})
            if output != "-":
                print(f"wrote {printable(place)}  ({k} token{'s' * (k > 1)}, {quality:.2f} dB)")
    if unreadable:
        message = f"{unreadable} of {len(sources)} pictures could not be read, see above"
        raise Incomplete(message, results)
    return results


def list_sources(pictures: list[str], output: Path) -> Iterator[tuple[str, str]]:
    """(name of the output without ending, path or -) of each picture; those of a folder keep their
    place in it, and what lies in an output folder inside of it is left out."""
    taken: dict[str, str] = {}
    for entry in pictures:
        place = Path(entry)
        if entry != "-" and not place.exists():
            raise ValueError(f"there is no picture {entry!r}")
        found = {Path("stdin" if entry == "-" else place.name): entry}
        if place.is_dir():
            found = {p.relative_to(place): str(p) for p in list_pictures(place, EXTENSIONS)}
            if place.resolve() in output.parents:  # of an earlier command
                found = {k: v for k, v in found.items() if output not in Path(v).resolve().parents}
            if not found:
                raise ValueError(f"no pictures in {entry!r}")
        stems = Counter(path.with_suffix("") for path in found)
        for path, source in found.items():
            stem = path.with_suffix("")  # of a.jpg beside a.png the names stay whole
            name = (stem if stems[stem] == 1 else path).as_posix()
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
    if output.endswith(".png"):
        if Path(output).is_dir():
            raise ValueError(f"--output {output} is a folder: name one that does not end in .png")
        check_writable(output, "--output")
    elif output != "-":
        check_folder(output)


def place_of(output: str, name: str, k: int) -> str:
    """Where the reconstruction of a picture from k tokens is written; - for standard output."""
    one = output == "-" or output.endswith(".png")
    return output if one else str(Path(output) / f"{name}-{k}.png")


def write_picture(picture: Image.Image, place: str) -> None:
    if place == "-":
        buffer = io.BytesIO()
        picture.save(buffer, format="png")
        sys.stdout.buffer.write(buffer.getvalue())
    else:
        viz.save(picture, place)
