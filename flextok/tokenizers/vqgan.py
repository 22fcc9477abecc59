"""MaskGIT-VQGAN (arXiv 2202.04200, after 2012.09841): a purely convolutional VQ tokenizer.

TiTok needs it twice: its indices are the proxy codes of TiTok's first training stage, and its
decoder turns TiTok's soft codes into pixels. The networks work on [0, 1]; the package's [-1, 1] is
converted in the two methods that meet images.
"""

from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flextok.nn.devices import to_device
from flextok.quantizers import QUANTIZERS
from flextok.schema import ConfigError, Depth, Size, build
from flextok.tokenizers.base import (
    Tokenizer,
)


@dataclass
class VQGANConfig:
    """Keys of `model` beside `name`."""

    image_size: Size = 256
    dim: Size = 128  # channels at full resolution
    multipliers: list[Size] = field(default_factory=lambda: [1, 1, 2, 2, 4])  # one a resolution
    num_blocks: Depth = 2  # residual blocks a resolution
    # of every GroupNorm; with one channel a group each loses its mean over the image, so narrow
    # models want fewer
    norm_groups: Size = 32
    quantizer: dict[str, Any] = field(
        default_factory=lambda: {
            "name": "vq",
            "codebook_size": 1024,
            "dim": 256,
            "l2_norm": False,
        }
    )

    def __post_init__(self) -> None:
        if not 1 <= len(self.multipliers) <= 12:
            raise ConfigError(f"multipliers={self.multipliers} must be 1 to 12, one a resolution")


class ResBlock(nn.Module):
    """Two 3x3 convolutions in front of a residual sum."""

    def __init__(self, channels: int, out_channels: int, norm_groups: int):
        super().__init__()
        self.norm1 = group_norm(norm_groups, channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = group_norm(norm_groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = None
        if channels != out_channels:
            self.shortcut = nn.Conv2d(out_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, channels, h, w). Returns (B, out_channels, h, w)."""
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        # the published network feeds the branch, not x, to its shortcut, and weights depend on it
        return y + (x if self.shortcut is None else self.shortcut(y))


class ConvEncoder(nn.Module):
    """Images to a grid of vectors, halved between resolutions."""

    def __init__(
        self, dim: int, multipliers: list[int], num_blocks: int, out_dim: int, norm_groups: int
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(3, dim, 3, padding=1, bias=False)
        self.down = nn.ModuleList()
        width = dim
        for multiplier in multipliers:
            self.down.append(res_blocks(width, dim * multiplier, num_blocks, norm_groups))
            width = dim * multiplier
        self.mid = res_blocks(width, width, num_blocks, norm_groups)
        self.norm_out = group_norm(norm_groups, width)
        self.conv_out = nn.Conv2d(width, out_dim, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: (B, 3, H, W) in [0, 1]. Returns (B, out_dim, H/f, W/f)."""
        x = self.conv_in(pixels)
        for i, blocks in enumerate(self.down):
            x = blocks(x if i == 0 else F.avg_pool2d(x, 2))
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class ConvDecoder(nn.Module):
    """A grid of vectors to images, doubled between resolutions."""

    def __init__(
        self, dim: int, multipliers: list[int], num_blocks: int, in_dim: int, norm_groups: int
    ):
        super().__init__()
        width = dim * multipliers[-1]
        self.conv_in = nn.Conv2d(in_dim, width, 3, padding=1)
        self.mid = res_blocks(width, width, num_blocks, norm_groups)
        self.up = nn.ModuleList()  # coarse to fine, as forward runs them
        self.upsample_conv = nn.ModuleList()
        for multiplier in reversed(multipliers):
            self.up.append(res_blocks(width, dim * multiplier, num_blocks, norm_groups))
            width = dim * multiplier
            if len(self.up) < len(multipliers):
                self.upsample_conv.append(nn.Conv2d(width, width, 3, padding=1))
        self.norm_out = group_norm(norm_groups, width)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_dim, h, w). Returns (B, 3, h f, w f), about [0, 1]."""
        x = self.up[0](self.mid(self.conv_in(x)))
        for conv, blocks in zip(self.upsample_conv, list(self.up)[1:], strict=True):
            x = blocks(conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))
        return self.conv_out(F.silu(self.norm_out(x)))


class MaskGITVQGAN(Tokenizer):
    """The 16x-downsampling VQ tokenizer: an image of 256 px is 256 of 1024 indices, row by row."""

    model_type = "maskgit_vqgan"
    config_class = VQGANConfig
    ordered = False
    codes_weights = ("encoder.", "quantizer.")
    codes_keys = ("image_size", "multipliers", "norm_groups")
    stated = (
        ("dim", "decoder.norm_out.weight", 0),
        ("num_blocks", "decoder.up.0.", None),
    )

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.config = config = self.checked(config)
        if config.quantizer["name"] == "kl":
            raise ConfigError(f"quantizer={config.quantizer}: a VQGAN has indices, take vq")
        self.downsample = 2 ** (len(config.multipliers) - 1)
        if config.image_size % self.downsample:
            raise ValueError(
                f"image_size={config.image_size} must be a multiple of {self.downsample}"
            )
        self.quantizer = build(QUANTIZERS, config.quantizer, "quantizer")
        shape = (config.dim, config.multipliers, config.num_blocks, self.quantizer.dim)
        self.encoder = ConvEncoder(*shape, config.norm_groups)
        self.decoder = ConvDecoder(*shape, config.norm_groups)

    @property
    def grid(self) -> int:
        return self.config.image_size // self.downsample

    @property
    def num_tokens(self) -> int:
        return self.grid**2

    def decode_codes(self, codes: Tensor, keep: Tensor | int | None = None) -> Tensor:
        self.check_keep(keep, codes)
        codes = to_device(codes, self.device)
        x = rearrange(codes, "b (h w) c -> b c h w", h=self.grid)
        return from_unit(self.decoder(x.to(self.decoder.conv_in.weight.dtype)))

    def features(self, images: Tensor) -> Tensor:
        z = self.encoder(to_unit(images).to(self.encoder.conv_in.weight.dtype))
        return rearrange(z, "b c h w -> b (h w) c")


def res_blocks(channels: int, out_channels: int, number: int, norm_groups: int) -> nn.Sequential:
    widths = [channels] + [out_channels] * (number - 1)
    return nn.Sequential(*(ResBlock(width, out_channels, norm_groups) for width in widths))


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


def to_unit(images: Tensor) -> Tensor:
    """[-1, 1] to [0, 1]."""
    return (images + 1) / 2


def from_unit(pixels: Tensor) -> Tensor:
    """[0, 1] to [-1, 1]."""
    return pixels * 2 - 1
