"""Pictures to tensors and back. Inside the package images are (3, H, W) float in [-1, 1]; at its
edges they are uint8."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

BICUBIC = Image.Resampling.BICUBIC  # PIL's resize is antialiased


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.uint8))
    return pixels.permute(2, 0, 1).contiguous().float() / 127.5 - 1


def to_uint8(images: Tensor) -> np.ndarray:
    """(..., 3, H, W) float in [-1, 1] -> (..., H, W, 3) uint8, clamped and rounded."""
    pixels = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.movedim(-3, -1).cpu().numpy()


def to_image(image: Tensor) -> Image.Image:
    """(3, H, W) float in [-1, 1] -> RGB picture."""
    return Image.fromarray(to_uint8(image))


def resize_shorter_side(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    scale = size / min(width, height)
    target = (max(size, round(width * scale)), max(size, round(height * scale)))
    return image if target == image.size else image.resize(target, BICUBIC)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to size, then crop the middle: the evaluation transform."""
    image = resize_shorter_side(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, generator: torch.Generator) -> Image.Image:
    """Resize the shorter side to size, then crop anywhere along the longer one."""
    image = resize_shorter_side(image, size)
    left = int(torch.randint(image.width - size + 1, (), generator=generator))
    top = int(torch.randint(image.height - size + 1, (), generator=generator))
    return image.crop((left, top, left + size, top + size))


def random_shift(image: Image.Image, generator: torch.Generator, fraction: float) -> Image.Image:
    """Shift by up to `fraction` of the size each way; the border is white."""
    reach = round(fraction * image.width)
    dx, dy = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, (dx, dy))
    return canvas


class ImageTransform:
    """PIL picture -> (3, size, size) in [-1, 1]. With a generator it augments; without it is the
    deterministic evaluation transform (bicubic, center crop)."""

    def __init__(self, size: int, flip: bool = False, crop: str = "center", shift: float = 0.0):
        if crop not in ("center", "random"):
            raise ValueError(f"crop={crop!r} must be 'center' or 'random'")
        if not 0 <= shift < 0.5:
            raise ValueError(f"shift={shift} must be in [0, 0.5), a fraction of the picture")
        self.size, self.flip, self.crop, self.shift = size, flip, crop, shift

    def __call__(self, image: Image.Image, generator: torch.Generator | None = None) -> Tensor:
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
