"""A picture from a stranger: checked before it is decoded."""

import base64
import io
from dataclasses import dataclass

from PIL import Image

from flextok.data.pictures import CorruptPicture, load_picture

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # no other parser sees the data


@dataclass(frozen=True)
class Limits:
    """What one upload may cost."""

    max_bytes: int = 10 * 2**20
    max_pixels: int = 40_000_000

    @property
    def max_request(self) -> int:
        """Bytes of the message that carries two of the largest pictures, and the rest of it."""
        return 2 * self.max_url + 2**16

    @property
    def max_url(self) -> int:
        """Characters of the largest picture in base64, and of what stands before it."""
        return self.max_bytes * 4 // 3 + 2**10


def read_picture(data_url: object, limits: Limits) -> Image.Image:
    """data_url: "data:<any type>;base64,..." as a browser's FileReader makes it. Returns an upright
    RGB picture. Raises ValueError, in words for the person at the browser."""
    if not isinstance(data_url, str) or not data_url.startswith("data:"):
        raise ValueError("that is no picture: drop a file on the page")
    if len(data_url) > limits.max_url:
        raise ValueError(f"that file is too large: at most {megabytes(limits.max_bytes)}")
    try:
        data = base64.b64decode(data_url.partition(",")[2], validate=True)
    except ValueError:
        raise ValueError("that file arrived damaged: try again") from None
    if len(data) > limits.max_bytes:
        raise ValueError(f"that file is too large: at most {megabytes(limits.max_bytes)}")
    most = f"is too large: at most {limits.max_pixels / 1e6:g} million pixels"
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as header:  # decodes no pixel
            width, height = header.size
    except Image.DecompressionBombError:
        raise ValueError(f"that picture {most}") from None
    except Exception:  # a decoder may raise anything on a damaged file
        formats = ", ".join(FORMATS)
        raise ValueError(f"that file is no picture that this page reads ({formats})") from None
    if width * height > limits.max_pixels:
        raise ValueError(f"that picture of {width} x {height} pixels {most}")
    try:
        return load_picture(data, "that picture")
    except CorruptPicture:
        raise ValueError("that picture is damaged and cannot be read") from None


def megabytes(number: int) -> str:
    return f"{number / 2**20:g} MB"
