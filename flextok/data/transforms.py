"""Pictures to tensors and back. Inside the package images are (3, H, W) float in [-1, 1]; at its
edges they are uint8."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flextok.images import (
    PictureSource,
    center_crop,
    load_picture,
    resized_crop,
    resized_size,
    to_tensor,
)
from flextok.tokenizers.base import check_finite


def to_uint8(images: Tensor) -> np.ndarray:
    """(..., 3, H, W) float in [-1, 1] -> (..., H, W, 3) uint8, clamped and rounded. Raises
    NotFinite."""
    check_finite(images, "the images")
    pixels = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.movedim(-3, -1).cpu().numpy()


def to_image(image: Tensor) -> Image.Image:
    """(3, H, W) float in [-1, 1], or uint8 -> RGB picture."""
    if image.dtype == torch.uint8:
        return Image.fromarray(image.movedim(0, -1).cpu().numpy())
    return Image.fromarray(to_uint8(image))


def random_crop(image: Image.Image, size: int, generator: torch.Generator) -> Image.Image:
    """Resize the shorter side to size, then crop anywhere along the longer one."""
    width, height = resized_size(image, size)
    left = int(torch.randint(width - size + 1, (), generator=generator))
    top = int(torch.randint(height - size + 1, (), generator=generator))
    return resized_crop(image, size, left, top)


def random_shift(image: Image.Image, generator: torch.Generator, fraction: float) -> Image.Image:
    """Shift by up to `fraction` of the size each way; the border is white."""
    reach = round(fraction * image.width)
    dx, dy = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, (dx, dy))
    return canvas


class ImageTransform:
    """A picture, as load_picture takes it, or a tensor (3, H, W), uint8 or float in [-1, 1] ->
    (3, size, size) in [-1, 1]. With a generator it augments; without, it is the deterministic
    evaluation transform (bicubic, center crop)."""

    def __init__(self, size: int, flip: bool = False, crop: str = "center", shift: float = 0.0):
        if crop not in ("center", "random"):
            raise ValueError(f"crop={crop!r} must be 'center' or 'random'")
        if not 0 <= shift < 0.5:
            raise ValueError(f"shift={shift} must be in [0, 0.5), a fraction of the picture")
        self.size, self.flip, self.crop, self.shift = size, flip, crop, shift

    def __call__(
        self, picture: PictureSource | Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        image = to_image(picture) if isinstance(picture, Tensor) else load_picture(picture)
        if generator is None:
            return to_tensor(center_crop(image, self.size))
        if self.crop == "random":
            image = random_crop(image, self.size, generator)
        else:
            image = center_crop(image, self.size)
        if self.flip and torch.rand((), generator=generator) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.shift:
            image = random_shift(image, generator, self.shift)
        return to_tensor(image)

    def prepare(
        self, item: Mapping[str, Any], generator: torch.Generator | None = None
    ) -> dict[str, Any]:
        """An image set's item as training reads it: the image transformed, and the label."""
        return {"image": self(item["image"], generator), "label": item["label"]}
