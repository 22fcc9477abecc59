"""How training changes a picture before the model sees it; without augmentation, as images.py."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flextok.data.augmentation import Augmentation
from flextok.images import (
    Picture,
    as_picture,
    center_crop,
    covering_size,
    image_tensor,
    resized_crop,
    to_tensor,
)
from flextok.schema import from_mapping, whole_number


def random_crop(
    image: Image.Image, height: int, width: int, generator: torch.Generator
) -> Image.Image:
    """Resize the picture until it just covers height x width, then crop anywhere along the side
    that is too long."""
    across, down = covering_size(image, height, width)
    left = int(torch.randint(across - width + 1, (), generator=generator))
    top = int(torch.randint(down - height + 1, (), generator=generator))
    return resized_crop(image, height, width, left, top)


def random_shift(image: Image.Image, generator: torch.Generator, fraction: float) -> Image.Image:
    """Shift by up to `fraction` of the size each way; the border is white."""
    reach = round(fraction * image.width)
    dx, dy = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, (dx, dy))
    return canvas


def random_affine(
    image: Image.Image, generator: torch.Generator, degrees: float, fraction: float
) -> Image.Image:
    """Rotate by up to `degrees` each way and scale by a factor in [1 - fraction, 1 + fraction],
    both about the centre; the border is white."""
    turn, stretch = (2 * torch.rand(2, generator=generator) - 1).tolist()
    angle, factor = math.radians(turn * degrees), 1 + stretch * fraction
    cos, sin = math.cos(angle) / factor, math.sin(angle) / factor
    x, y = image.width / 2, image.height / 2
    matrix = (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)
    affine = Image.Transform.AFFINE
    return image.transform(image.size, affine, matrix, Image.Resampling.BICUBIC, fillcolor="white")


def random_hue(image: Image.Image, generator: torch.Generator, fraction: float) -> Image.Image:
    """Turn every hue by the same angle, up to `fraction` of the colour circle each way. Greys stay
    as they are."""
    turn = round(255 * fraction * float(2 * torch.rand((), generator=generator) - 1))
    hue, saturation, value = image.convert("HSV").split()
    turned = hue.point([(level + turn) % 256 for level in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


class ImageTransform:
    """A picture, as as_picture takes it -> (3, H, W) float in [-1, 1]. With a generator it
    augments; without, it is the deterministic evaluation transform (bicubic, center crop)."""

    def __init__(
        self, size: int | tuple[int, int], augmentation: Augmentation | None = None
    ) -> None:
        """size: of a square, or (H, W). augmentation: or options that include one, such as
        FitOptions. Raises ConfigError."""
        asked = vars(augmentation or Augmentation())
        mine = {field.name: asked[field.name] for field in fields(Augmentation)}
        self.size = size if isinstance(size, tuple) else (size, size)
        self.augmentation = from_mapping(Augmentation, mine)

    def __call__(
        self,
        picture: Picture,
        generator: torch.Generator | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """size: (H, W) in place of the transform's own."""
        size = size or self.size
        if generator is None:
            return image_tensor(picture, *size)
        image, ask = as_picture(picture), self.augmentation
        if ask.crop == "random":
            image = random_crop(image, *size, generator)
        else:
            image = center_crop(image, *size)
        if ask.flip and torch.rand((), generator=generator) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if ask.rotate or ask.scale:
            image = random_affine(image, generator, ask.rotate, ask.scale)
        if ask.shift:
            image = random_shift(image, generator, ask.shift)
        if ask.hue:
            image = random_hue(image, generator, ask.hue)
        return to_tensor(image)

    def prepare(
        self, item: Mapping[str, Any], generator: torch.Generator | None = None
    ) -> dict[str, Any]:
        """An image set's item as training reads it: the image transformed, to "size" where a bucket
        has set one, and the label, 0 for what is no whole number. An item of a latent cache is
        ready."""
        if "latents" in item:
            return dict(item)
        image = self(item["image"], generator, item.get("size"))
        return {"image": image, "label": whole_number(item.get("label")) or 0}
