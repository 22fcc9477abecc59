"""Picture metrics, on pictures rounded to 8 bits as a viewer gets them. Each compares (B, 3, H, W)
with (B, 3, H, W) in [-1, 1] and returns (B,); a new one is a function and a line in METRICS."""

from collections.abc import Callable

import torch
from torch import Tensor

from flextok.nn.devices import widest
from flextok.tokenizers.base import check_finite


def to_8_bit(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> whole numbers in 0..255, float64 (float32 on MPS)."""
    return ((images.to(widest(images.device)).clamp(-1, 1) + 1) * 127.5).round()


def mse(a: Tensor, b: Tensor) -> Tensor:
    """a, b: (B, 3, H, W) in [-1, 1]. Returns (B,), in units of the 0..255 range squared."""
    error = (to_8_bit(a) - to_8_bit(b)).square().mean(dim=(1, 2, 3))
    return check_finite(error, "the images compared")


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """a, b: (B, 3, H, W) in [-1, 1]. Returns (B,) in dB, peak 255; equal pictures give inf."""
    return 10 * torch.log10(255.0**2 / mse(a, b))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """a, b: (B, 3, H, W) in [-1, 1]. Returns (B,): structural similarity (Wang et al. 2004) with
    its Gaussian window of 11 pixels and sigma 1.5, the channels averaged."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    scores = structural_similarity_index_measure(
        to_8_bit(a), to_8_bit(b), data_range=255.0, reduction="none"
    )
    assert isinstance(scores, Tensor)
    return scores.reshape(len(a))


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "mse": mse, "ssim": ssim}
