"""Measures of images, (B, 3, H, W) in [-1, 1] rounded to 8 bits as a viewer gets them. Each returns
(B,) float64."""

import hashlib
import logging

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from flextok.losses.perceptual import LPIPS
from flextok.nn.devices import check_finite, widest

log = logging.getLogger(__name__)
MAX_PSNR = 100.0  # dB, of an image that comes back without any error; 8 bits cannot come near it


def to_8_bit(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> whole numbers in 0..255, float64 (float32 on MPS)."""
    return ((images.to(widest(images.device)).clamp(-1, 1) + 1) * 127.5).round()


def mse(a: Tensor, b: Tensor) -> Tensor:
    """In units of the 0..255 range squared."""
    error = (to_8_bit(a) - to_8_bit(b)).square().mean(dim=(1, 2, 3))
    return check_finite(error, "the images compared")


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """In dB, peak 255; MAX_PSNR for equal images."""
    return (10 * torch.log10(255.0**2 / mse(a, b))).clamp_max(MAX_PSNR)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) with its Gaussian window of 11 pixels and sigma 1.5,
    the channels averaged; as torchmetrics does it since 1.5, also of windows that reach over the
    border, where the image is reflected: of small images it is higher than that of whole ones."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    scores = structural_similarity_index_measure(
        to_8_bit(a), to_8_bit(b), data_range=255.0, reduction="none"
    )
    assert isinstance(scores, Tensor)
    return scores.reshape(len(a))


def lpips(network: LPIPS, a: Tensor, b: Tensor) -> Tensor:
    dtype = network.shift.dtype
    ours, theirs = ((to_8_bit(x) / 127.5 - 1).to(dtype) for x in (a, b))
    with torch.no_grad():
        return network.distances(ours, theirs).cpu().double()


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """a, b: (B, D) features. Returns 1 - their cosines."""
    return 1 - cosine_similarity(a.cpu().double(), b.cpu().double(), dim=-1)


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """a, b: (B, D) features. Returns their squared Euclidean distances."""
    return (a.cpu().double() - b.cpu().double()).square().sum(dim=-1)


def sharpness(images: Tensor) -> Tensor:
    """The mean absolute gradient of grey values, in units of the 0..255 range a pixel."""
    grey = to_8_bit(images).mean(dim=1)
    gradients = grey.diff(dim=1).abs().mean(dim=(1, 2)) + grey.diff(dim=2).abs().mean(dim=(1, 2))
    return gradients / 2


def image_hashes(images: Tensor) -> Tensor:
    """A number for each image's 8-bit pixels, (B,) long."""
    pixels = to_8_bit(images).byte().cpu().numpy()
    digests = [hashlib.sha256(image.tobytes()).digest()[:8] for image in pixels]
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests])


def warn_of_shared(training: Tensor, test: Tensor, consequence: str) -> None:
    """Warn where images are trained on and tested on: (n,) and (m,) hashes of them."""
    if shared := int(torch.isin(test, training).sum()):
        told = "%d of the %d test images are training images, too: %s"
        log.warning(told, shared, len(test), consequence)
