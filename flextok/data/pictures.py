"""Open any picture as 8-bit RGB, or say which one cannot be opened and why."""

import io
import itertools
import logging
import os
import struct
import zlib
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

UNLABELLED = "unlabelled"  # the class of pictures without one
log = logging.getLogger(__name__)
_undecodable = itertools.count(1)  # texts, in this process
PictureSource = str | os.PathLike[str] | bytes | IO[bytes]

# What Pillow raises on damaged files of one format or another; opening a picture does nothing else.
PILLOW_ERRORS = (
    OSError,  # includes UnidentifiedImageError and truncation
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class CorruptPicture(ValueError):
    """A picture that cannot be read; the message names it and the reason."""

    def __init__(self, name: str, reason: object) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, str(reason)

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Two arguments, not the message alone: it must survive the way out of a data worker."""
        return type(self), (self.name, self.reason)


def load_picture(source: PictureSource, name: str | None = None) -> Image.Image:
    """A path, the bytes of a picture or a binary file -> PIL picture in mode RGB.

    Turned upright as its EXIF orientation says; transparency composited on white; 16-bit grey
    scaled to 8 bits. Raises CorruptPicture, naming `name` (by default the path), if unreadable.
    """
    if name is None:
        if isinstance(source, str | os.PathLike):
            name = os.fspath(source)
        else:
            name = getattr(source, "name", "picture")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except PILLOW_ERRORS as error:
        raise CorruptPicture(str(name), error or type(error).__name__) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB, on white where the picture is transparent."""
    if image.mode == "F":
        raise ValueError("floating-point pictures have no agreed range; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's convert would clip it at 255
        grey = np.clip(np.asarray(image, dtype=np.float64), 0, 65535)
        image = Image.fromarray(np.rint(grey / 257).astype(np.uint8))
    if {"A", "a"} & set(image.getbands()) or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def read_text(data: bytes, name: str) -> str:
    """UTF-8 text, stripped. Bytes that are none are replaced, with a counted warning that names
    whose they are."""
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        count = next(_undecodable)
        log.warning("replaced text that is not UTF-8 (%d so far): %s: %s", count, name, error)
        return data.decode("utf-8", "replace").strip()


def list_pictures(root: Path, extensions: tuple[str, ...]) -> list[Path]:
    """Pictures under root, at any depth, sorted by their relative path; hidden ones left out."""
    found = []
    for folder, folders, files in os.walk(root, followlinks=True):
        here = Path(folder)
        folders[:] = [f for f in folders if f[0] != "." and not leads_back(here, here / f)]
        found += [here / f for f in files if f.lower().endswith(extensions) and f[0] != "."]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def leads_back(folder: Path, child: Path) -> bool:
    """True for a link to a folder above itself: following it would never end."""
    return child.is_symlink() and folder.resolve().is_relative_to(child.resolve())
