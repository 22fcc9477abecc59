"""A user's files: which of a folder are pictures, and the text beside them."""

import codecs
import itertools
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from flextok.images import CorruptPicture, load_picture

__all__ = ["EXTENSIONS", "UNLABELLED", "CorruptPicture", "list_pictures", "load_picture"]

UNLABELLED = "unlabelled"  # the class of pictures without one
EXTENSIONS = (  # of flextok.images.FORMATS; what is in a file is found out when it is opened
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"),
    *(".jpe", ".jfif", ".mpo", ".apng", ".dib", ".pbm", ".pgm", ".pnm"),
    *(".avif", ".avifs", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".qoi"),
)
# Pictures that Pillow does not read; those of its other formats are added when a folder is listed.
OTHER_PICTURES = {
    *(".heic", ".heif", ".jxl", ".svg", ".svgz", ".exr", ".hdr", ".ai", ".spi", ".spider"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".pef", ".srw", ".raw"),
}
MAX_TEXT_BYTES = 16 * 2**20
MARKS = {  # byte order mark -> encoding; UTF-32's begins with UTF-16's
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
log = logging.getLogger(__name__)
_undecodable = itertools.count(1)  # texts, in this process


def read_text_file(path: Path) -> str:
    """A caption's file, as read_text. Raises CorruptPicture also where it cannot be opened."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise CorruptPicture(str(path), error.strerror or error) from None
    return read_text(data, str(path))


def read_text(data: bytes, name: str) -> str:
    """The text, clean. Bytes that are none are replaced, with a counted warning that names whose
    they are. Raises CorruptPicture if it is too large to be a caption or a label."""
    if len(data) > MAX_TEXT_BYTES:
        raise CorruptPicture(name, f"a text has at most {MAX_TEXT_BYTES} bytes")
    try:
        return decode_text(data)
    except UnicodeDecodeError as error:
        count = next(_undecodable)
        log.warning("replaced text that is not UTF-8 (%d so far): %s: %s", count, name, error)
        return clean_text(data.decode("utf-8", "replace"))


def decode_text(data: bytes) -> str:
    """The text of UTF-8 bytes, or of the encoding that their byte order mark names. Raises
    UnicodeDecodeError."""
    encoding = next((MARKS[mark] for mark in MARKS if data.startswith(mark)), "utf-8")
    return clean_text(data.decode(encoding))


def clean_text(text: str) -> str:
    """Without byte order marks, with lines that end in a newline only, stripped."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return lines.replace("\ufeff", "").strip()


RUN = {"starts", "checkpoints"}  # folders that every run's output_dir has


def list_pictures(root: Path, extensions: Sequence[str] = EXTENSIONS) -> list[Path]:
    """Pictures under root, at any depth, sorted by their relative path; hidden ones left out.

    Links to folders are followed, each folder is listed once, under its own name if it lies under
    root. One warning counts what is left out: pictures of other formats, what is no regular file,
    links to a folder that is listed already or holds root, folders that cannot be read, and the
    output folders of training runs, whose pictures are none of the data's.
    """
    endings = tuple(extensions)
    others = (OTHER_PICTURES | set(Image.registered_extensions())) - set(EXTENSIONS)
    left_out: dict[str, list[Path]] = {}
    found: list[Path] = []
    real_root = root.resolve()
    seen = {identity(folder) for folder in real_root.parents}
    folders, links = [root], list[Path]()
    while folders or links:
        links.sort(reverse=True)
        folder = folders.pop() if folders else links.pop()  # real ones first
        try:
            if (number := identity(folder)) in seen:
                left_out.setdefault("links to folders that are listed already", []).append(folder)
                continue
            seen.add(number)
            entries = list(os.scandir(folder))
        except OSError:
            left_out.setdefault("folders that cannot be read", []).append(folder)
            continue
        if folder != root and {entry.name for entry in entries} >= RUN:
            left_out.setdefault("folders of training runs, which draw pictures", []).append(folder)
            continue
        for entry in entries:
            name = entry.name.lower()
            if name.startswith("."):
                continue
            is_link = entry.is_symlink()
            if entry.is_dir(follow_symlinks=False):
                folders.append(folder / entry.name)
            elif is_link and os.path.isdir(entry.path):
                links.append(folder / entry.name)
            elif name.endswith(endings):
                if os.path.isfile(entry.path) if is_link else entry.is_file():
                    found.append(folder / entry.name)
                else:
                    kind = "no regular files, such as pipes and broken links"
                    left_out.setdefault(kind, []).append(folder / entry.name)
            elif os.path.splitext(name)[1] in others:
                kind = "pictures of other formats (convert them to PNG or JPEG)"
                left_out.setdefault(kind, []).append(folder / entry.name)
    if left_out:
        counts = [f"{len(v)} {k}, {min(v).relative_to(root)} for one" for k, v in left_out.items()]
        log.warning("left out of %s: %s", root, "; ".join(counts))
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def identity(path: Path) -> tuple[int, int]:
    facts = os.stat(path)
    return facts.st_dev, facts.st_ino
