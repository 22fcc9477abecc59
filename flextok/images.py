"""The one way from a picture to the (3, H, W) tensor that a model takes, and back.

Whatever a picture comes from (a path, bytes, an open file, a PIL picture), load_picture decodes it
to 8-bit RGB, turned upright, in sRGB, on white where it is transparent. Inside the package images
are (3, H, W) float in [-1, 1]; at its edges they are uint8.
"""

import contextlib
import io
import logging
import os
import stat
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import IO

import numpy as np
import torch
from PIL import (
    ExifTags,
    Image,
    ImageCms,
    ImageFile,
    ImageOps,
    TiffImagePlugin,
    UnidentifiedImageError,
)
from torch import Tensor

from flextok.nn.devices import check_finite, span

# Raster formats by Pillow's names. No other decoder sees a file, whatever the file is called: one
# for PostScript, say, would start another program.
FORMATS = (
    *("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM"),
    *("AVIF", "JPEG2000", "QOI"),
)
MAX_FILE_BYTES = 2**30
MAX_SIDE = 2**20  # pixels
MAX_DECODED_BYTES = 384 * 2**20  # pixels x channels (at least RGB) x bytes of a channel
MAX_PROFILE_BYTES = 4 * 2**20
# a resized picture up to so many times longer than its crop is cropped afterwards
LONGEST_WHOLE = 4

BICUBIC = Image.Resampling.BICUBIC  # PIL's resize is antialiased
SIXTEEN_TO_EIGHT = [(value + 128) // 257 for value in range(2**16)]
PROFILED = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # ICC space -> PIL mode
log = logging.getLogger(__name__)
PictureSource = str | os.PathLike[str] | bytes | IO[bytes] | Image.Image
Picture = PictureSource | np.ndarray | Tensor
Pictures = Picture | Sequence[Picture]  # one or several


class CorruptPicture(ValueError):
    """A picture that cannot be read; the message names it and the reason."""

    def __init__(self, name: str, reason: object, samples: int = 1) -> None:
        """samples: how many are unreadable for this same reason."""
        super().__init__(f"{name}: {reason}")
        self.name, self.reason, self.samples = name, str(reason), samples

    def __reduce__(self) -> tuple[type, tuple[str, str, int]]:
        """Not the message alone: it must survive the way out of a data worker."""
        return type(self), (self.name, self.reason, self.samples)


def load_picture(source: PictureSource, name: str | None = None) -> Image.Image:
    """A path, the bytes of a picture, a binary file or a PIL picture -> PIL picture in mode RGB.

    Turned upright as its EXIF orientation says; converted to sRGB if it carries a colour profile;
    transparency composited on white; 16-bit grey scaled to 8 bits. Raises CorruptPicture, naming
    `name` (by default the path), if the picture is unreadable, too large or of another format.
    """
    is_file = isinstance(source, ImageFile.ImageFile)
    if isinstance(source, Image.Image) and source.mode == "RGB" and not (is_file or source.info):
        return source  # in memory, without turns, profiles or transparency
    try:
        if isinstance(source, Image.Image):
            return decode(source)
        with open_picture(source) as image:
            return decode(image)
    except Exception as error:  # a decoder may raise anything on a damaged file
        if name is None and isinstance(source, str | os.PathLike):
            name = os.fspath(source)
        elif name is None and isinstance(source, ImageFile.ImageFile):
            name = os.fsdecode(source.filename)
        reason = error if str(error) else type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # its message holds a memory address
            reason = "no image of a known format"
        raise CorruptPicture(name or "picture", reason) from error


def open_picture(source: str | os.PathLike[str] | bytes | IO[bytes]) -> ImageFile.ImageFile:
    """Read the header of a picture of one of FORMATS. Other formats raise."""
    size = len(source) if isinstance(source, bytes) else 0
    if isinstance(source, str | os.PathLike):
        facts = os.stat(source)
        if not stat.S_ISREG(facts.st_mode):  # opening a named pipe would wait for ever
            raise ValueError("it is not a regular file")
        size = facts.st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"a file of {size} bytes is too large: at most {MAX_FILE_BYTES}")
    Image.init()
    installed = [form for form in FORMATS if form in Image.OPEN]
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, "r", installed)


def header_size(source: str | os.PathLike[str]) -> tuple[int, int]:
    """Width and height of a picture turned upright, from its header. Raises as open_picture."""
    with open_picture(source) as image:
        if image.format == "TIFF":  # whether Pillow has turned it by now depends on its version
            return decode(image).size
        width, height = image.size
        is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (height, width) if is_turned else (width, height)


def decode(image: Image.Image) -> Image.Image:
    levels = None
    if isinstance(image, ImageFile.ImageFile):
        if image.format not in (*FORMATS, "MPO"):  # MPO: JPEGs in a row, the first one counts
            raise ValueError(f"format {image.format} is not read: convert it to PNG")
        check_size(image)
        if image.format == "TIFF" and image.mode == "I":
            raise ValueError("grey of 32 bits has no agreed range; convert it to 8 or 16 bits")
        key, levels = transparent_value(image), grey_levels(image)
        image.load()
        if key is not None:
            image.info["transparency"] = key
    with contextlib.suppress(Exception):  # whatever damaged metadata raise, the pixels are there
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    if levels is not None:
        image = Image.fromarray(levels[np.asarray(image)])
    return to_rgb(image)


def check_size(image: Image.Image) -> None:
    """Raise ValueError if the decoded picture would be too large."""
    width, height = image.size
    depth = 4 if image.mode in ("I", "F") else 2 if image.mode.startswith("I") else 1
    channels = max(3, len(image.getbands())) + ("transparency" in image.info)
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"{width} x {height} pixels: a side has at most {MAX_SIDE}")
    if (decoded := width * height * channels * depth) > MAX_DECODED_BYTES:
        raise ValueError(
            f"{width} x {height} pixels of mode {image.mode} take {decoded / 2**20:.0f} MiB, more "
            f"than {MAX_DECODED_BYTES / 2**20:.0f} MiB: make it smaller"
        )


def grey_levels(image: ImageFile.ImageFile) -> np.ndarray | None:
    """For the grey values of a TIFF, those of 16 bits that they stand for, where Pillow leaves them
    in another range (12 bits) or reversed (white is zero); else None."""
    if image.format != "TIFF" or not image.mode.startswith("I;16"):
        return None
    tags = image.tag_v2  # type: ignore[attr-defined]
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
    white_is_zero = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    if bits >= 16 and not white_is_zero:
        return None
    most = 2 ** min(bits, 16) - 1
    levels = np.rint(np.minimum(np.arange(2**16), most) / most * 65535).astype(np.uint16)
    return 65535 - levels if white_is_zero else levels


def transparent_value(image: ImageFile.ImageFile) -> int | tuple[int, ...] | None:
    """The transparent grey value or colour of a PNG, in the range of its decoded pixels. Pillow
    scales the pixels of 2, 4 and 16 bits to 8 bits, but not this value."""
    key = image.info.get("transparency")
    raw = image.tile[0][3] if image.tile else None
    if isinstance(key, int) and raw in ("L;2", "L;4"):
        return key * {"L;2": 85, "L;4": 17}[raw]
    if isinstance(key, tuple) and raw == "RGB;16B":
        return tuple(value >> 8 for value in key)
    return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB in sRGB, on white where the picture is transparent."""
    if image.mode == "F":
        raise ValueError("floating-point pictures have no agreed range; convert it to 8 or 16 bits")
    key, profile = image.info.get("transparency"), image.info.get("icc_profile")
    alpha = None
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's convert would clip it at 255
        deep = image.convert("I")
        image = deep.point(SIXTEEN_TO_EIGHT, "L")
        if isinstance(key, int):
            alpha = deep.point([0 if value == key else 255 for value in range(2**16)], "L")
    elif {"A", "a"} & set(image.getbands()) or key is not None:
        if isinstance(key, tuple) and max(key) > 255:  # of a 16-bit picture, decoded to 8
            image = image.copy()
            image.info["transparency"] = tuple(value >> 8 for value in key)
        if image.mode == "La":
            image = image.convert("LA")
        grey = image.mode in ("1", "L", "LA")
        image = image.convert("LA" if grey else "RGBA")
        alpha = image.getchannel("A")
        image = image.convert("L" if grey else "RGB")
    image = to_srgb(image, profile) if profile else image.convert("RGB")
    if alpha is not None:
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=alpha)
        image = white
    image.info = {}  # all of it has been heeded
    return image


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """RGB picture in sRGB. A profile that cannot be read, or is of other channels, is ignored."""
    mode, transform = srgb_transform(profile)
    if mode == "RGB" and image.mode not in ("CMYK", "LAB"):
        image = image.convert("RGB")
    if transform is None or image.mode != mode:
        return image.convert("RGB")
    return transform.apply(image)


@lru_cache(maxsize=16)
def srgb_transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The mode that a colour profile is for, and the way from there to sRGB; None where that way
    changes no color by more than rounding does, as those of sRGB's own profiles."""
    try:
        if len(profile) > MAX_PROFILE_BYTES:
            raise ValueError(f"it has {len(profile)} bytes, more than {MAX_PROFILE_BYTES}")
        source = ImageCms.getOpenProfile(io.BytesIO(profile))
        mode = PROFILED[source.profile.xcolor_space.strip()]
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode not in ("RGB", "L"):
            return mode, transform
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        colors = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, len(levels), 3)
        before = Image.fromarray(colors).convert(mode)
        change = np.asarray(transform.apply(before), int) - np.asarray(before.convert("RGB"), int)
        return mode, transform if np.abs(change).max() > 2 else None
    except Exception as error:  # whatever a damaged profile raises
        log.warning("ignored a colour profile that cannot be used: %r", error)
        return "", None


def center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize the picture until it just covers height x width, then crop the middle: the evaluation
    transform."""
    across, down = covering_size(image, height, width)
    return resized_crop(image, height, width, (across - width) // 2, (down - height) // 2)


def covering_size(image: Image.Image, height: int, width: int) -> tuple[int, int]:
    """Width and height of the smallest resized picture that covers height x width."""
    scale = max(width / image.width, height / image.height)
    return max(width, round(image.width * scale)), max(height, round(image.height * scale))


def resized_crop(image: Image.Image, height: int, width: int, left: int, top: int) -> Image.Image:
    """The rectangle of height x width at (left, top) of the picture resized to covering_size. Of
    long pictures only that rectangle is resized; its pixels differ from those of the whole resized
    picture by rounding at most."""
    target = covering_size(image, height, width)
    if target[0] <= LONGEST_WHOLE * width and target[1] <= LONGEST_WHOLE * height:
        resized = image if target == image.size else image.resize(target, BICUBIC)
        return resized.crop((left, top, left + width, top + height))
    across, down = image.width / target[0], image.height / target[1]
    right = min(image.width, (left + width) * across)
    bottom = min(image.height, (top + height) * down)
    return image.resize((width, height), BICUBIC, box=(left * across, top * down, right, bottom))


def to_tensor(image: Image.Image) -> Tensor:
    """Picture -> (3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(load_picture(image), dtype=np.uint8))
    return pixels.permute(2, 0, 1).contiguous().float() / 127.5 - 1


def image_tensor(picture: Picture, height: int, width: int) -> Tensor:
    """A picture, as as_picture takes it -> (3, height, width) float in [-1, 1]: the evaluation
    transform, which every model input goes through."""
    return to_tensor(center_crop(as_picture(picture), height, width))


def as_picture(picture: Picture) -> Image.Image:
    """A path, the bytes of a picture, a binary file, a PIL picture, an array (H, W), (H, W, 3) or
    (H, W, 4) uint8, or a tensor (3, H, W), uint8 or float in [-1, 1] -> PIL picture in mode RGB.
    Raises CorruptPicture, and ValueError for another tensor; warns once of one that is likely to
    be in [0, 1]."""
    if isinstance(picture, Tensor):
        if picture.is_floating_point() and picture.numel() and is_bright(*check_range(picture)):
            warnings.warn(f"images are {BRIGHT}", stacklevel=2)  # one text, so it is shown once
        check_pixels(picture)
        return to_image(picture)
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.shape[2:] not in ((), (3,), (4,)):
            found = f"array of shape {picture.shape} and type {picture.dtype}"
            raise CorruptPicture(found, "expected uint8 (H, W), (H, W, 3) or (H, W, 4)")
        check_pixels(picture)
        return load_picture(Image.fromarray(picture))
    if not isinstance(picture, str | os.PathLike | bytes | io.IOBase | Image.Image):
        raise CorruptPicture(
            f"{picture!r} of type {type(picture).__name__}",
            "no picture: give a path, bytes, a binary file, a PIL picture, an array or a tensor",
        )
    if isinstance(picture, Image.Image):
        check_pixels(picture)
    return load_picture(picture)


def check_pixels(picture: Tensor | np.ndarray | Image.Image) -> None:
    """Raises CorruptPicture where there are none."""
    shape = picture.size if isinstance(picture, Image.Image) else tuple(picture.shape)
    if 0 in shape:
        raise CorruptPicture(f"image of shape {shape}", "it has no pixels")


BRIGHT = "all bright: if they are in [0, 1], scale them to [-1, 1] with 2 * x - 1"


def check_range(images: Tensor) -> tuple[float, float]:
    """The least and the greatest value. Raises ValueError outside [-1, 1]."""
    low, high = span(images)
    if not (low >= -1.001 and high <= 1.001):  # NaN fails too
        raise ValueError(
            f"images span [{low:.4g}, {high:.4g}], expected [-1, 1]: scale uint8 images with "
            "x / 127.5 - 1"
        )
    return low, high


def is_bright(low: float, high: float) -> bool:
    """Whether images whose values span [low, high] are likely to be in [0, 1]."""
    return low >= 0 and high > 0


def several(pictures: Pictures) -> list[Picture] | None:
    """The pictures of a list, or of an array or a tensor of four axes; None for one picture."""
    batch = isinstance(pictures, np.ndarray | Tensor) and pictures.ndim == 4
    return list(pictures) if batch or isinstance(pictures, list | tuple) else None  # type: ignore


def to_uint8(images: Tensor) -> np.ndarray:
    """(..., 3, H, W) float in [-1, 1] -> (..., H, W, 3) uint8, clamped and rounded. Raises
    NotFinite."""
    check_finite(images, "the images")
    pixels = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.movedim(-3, -1).cpu().numpy()


def to_image(image: Tensor) -> Image.Image:
    """(3, H, W) float in [-1, 1], or uint8 -> RGB picture."""
    if image.ndim != 3 or len(image) != 3:
        found = tuple(image.shape)
        raise ValueError(f"a tensor of shape {found} is no picture: expected (3, H, W)")
    if image.dtype == torch.uint8:
        return Image.fromarray(image.movedim(0, -1).cpu().numpy())
    if not image.is_floating_point():
        raise ValueError(f"a tensor of type {image.dtype} is no picture: expected uint8 or float")
    return Image.fromarray(to_uint8(image))
