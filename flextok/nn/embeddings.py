"""Patches, positions and time: how images and scalars enter a transformer."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """x: (B, C, H, W). Returns (B, N, p*p*C), channels last within a patch, row-major patches."""
    return rearrange(x, "b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=patch_size, p2=patch_size)


def unpatchify(x: Tensor, patch_size: int, height: int) -> Tensor:
    """x: (B, N, p*p*C); height: rows of patches. Returns (B, C, H, W), the inverse of patchify."""
    p = patch_size
    return rearrange(x, "b (h w) (p1 p2 c) -> b c (h p1) (w p2)", h=height, p1=p, p2=p)


def sincos_2d(dim: int, height: int, width: int, temperature: float = 10_000.0) -> Tensor:
    """Fixed 2D positions, (1, dim, height, width): the first dim/2 channels encode the row, the
    rest the column; each half is [sin, cos] over dim/4 frequencies. It is made on the CPU
    and moved to the default device: MPS has no float64, and an arange or a cat on the meta device
    imports torch's compiler, which takes a second."""
    if dim % 4:
        raise ValueError(f"dim={dim} must be a multiple of 4 for 2D sin-cos positions")
    wide: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    omega = 1.0 / temperature ** (torch.arange(dim // 4, **wide) / (dim // 4))

    def axis(length: int) -> Tensor:
        angles = torch.outer(torch.arange(length, **wide), omega)
        table = torch.cat([angles.sin(), angles.cos()], dim=1).T.float()  # (dim/2, length)
        return table.to(torch.get_default_device())

    table = torch.empty(1, dim, height, width)
    table[0, : dim // 2] = axis(height)[:, :, None]
    table[0, dim // 2 :] = axis(width)[:, None, :]
    return table


def patch_positions(table: Tensor, height: int, width: int) -> Tensor:
    """table: (1, D, h, w), the positions of a grid of patches. Returns those of height x width
    patches, (1, N, D): of another grid by bicubic interpolation, so that the first and the last
    row and column keep their places at the image's edges."""
    if table.shape[-2:] != (height, width):
        table = F.interpolate(table.float(), (height, width), mode="bicubic").to(table.dtype)
    return table.flatten(2).transpose(1, 2)


class TimeEmbedding(nn.Module):
    """Sinusoidal features of a time in [0, 1], then an MLP (DiT, arXiv 2212.09748).

    max_timestep: of t in [0, 1], 1 spreads the features over all times. FlexTok's published class
    default is 1000, with which they hardly change between t = 0 and 1; whether the released weights
    use 1000 or 1 could not be settled, so converting them decides by their file.
    """

    def __init__(
        self, dim: int, max_timestep: float = 1.0, features: int = 256, max_period: float = 256.0
    ):
        super().__init__()
        self.scale, self.features, self.max_period = 1000.0 / max_timestep, features, max_period
        self.fc1 = nn.Linear(features, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        """t: (B,) float in [0, 1]. Returns (B, D)."""
        half = self.features // 2
        exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
        frequencies = self.scale * torch.exp(-math.log(self.max_period) * exponent)
        angles = t.float()[:, None] * frequencies
        x = torch.cat([angles.cos(), angles.sin()], dim=-1)  # cos comes first in FlexTok
        return self.fc2(nn.functional.silu(self.fc1(x.to(self.fc1.weight.dtype))))
