"""Stage 0's model: a KL autoencoder (LDM, arXiv 2112.10752), on whose latents FlexTok may work.

It is diffusers' AutoencoderKL and is saved in diffusers' own layout: both
`diffusers.AutoencoderKL.from_pretrained(folder)` and `vae: {name: kl, weights: folder}` load it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import flextok
from flextok.convert.autoencoder import OURS, to_diffusers
from flextok.hub import Pretrained
from flextok.places import DIFFUSERS_WEIGHTS
from flextok.schema import Depth, Size, to_mapping
from flextok.vae import make_kl


@dataclass
class AutoencoderConfig:
    """Keys of `model` beside `name: autoencoder`."""

    image_size: Size = 256
    channels: Size = 16  # of the latents
    block_channels: list[Size] = field(default_factory=lambda: [128, 256, 512, 512])
    layers_per_block: Depth = 2
    norm_groups: Size = 32  # small models want few: two channels a group lose an image's brightness
    scaling_factor: float = 1.0  # for diffusers, which multiplies latents by it
    latents_mean: list[float] | None = None  # by channel; `measure` sets both
    latents_std: list[float] | None = None


class Autoencoder(Pretrained):
    """A trainable KL autoencoder; `flextok.vae.KLVAE` is the frozen one inside of other models.

    >>> autoencoder = Autoencoder.from_pretrained("emoji-vae")
    >>> mean, logvar = autoencoder.posterior(images)    # (B, C, h, w) each
    >>> images = autoencoder.decode(mean)
    """

    model_type = "autoencoder"
    config_class = AutoencoderConfig
    config: AutoencoderConfig
    weights_file, layout = DIFFUSERS_WEIGHTS, "diffusers"
    stated = (
        ("channels", "decoder.conv_in.weight", 1),
        ("layers_per_block", "encoder.down_blocks.0.resnets.", None),
    )

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config = self.checked(config)
        vae = make_kl(
            config.channels,
            config.block_channels,
            config.layers_per_block,
            config.norm_groups,
            config.image_size,
        )
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_pre_hook(in_fp32)
        with torch.no_grad():  # a narrow posterior: noise of deviation 1 drowns the first latents
            self.quant_conv.bias[config.channels :].fill_(-4.0)

    @property
    def image_size(self) -> int:
        return self.config.image_size

    def sizes(self) -> tuple[int | None, int, int]:
        return self.image_size, 0, 0

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images: (B, 3, H, W) in [-1, 1]. Returns mean and log variance, (B, C, H/f, W/f) fp32
        each, f being 2 to the number of halvings; bf16 would be too coarse for the KL."""
        mean, logvar = self.quant_conv(self.encoder(images)).float().chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latents: Tensor) -> Tensor:
        """latents: (B, C, h, w), not standardised. Returns images (B, 3, H, W) fp32, about
        [-1, 1], with gradients."""
        return self.decoder(self.post_quant_conv(latents)).float()

    @torch.no_grad()
    def measure(self, batches: Iterable[Tensor]) -> None:
        """Set the latents' mean and deviation by channel, which are saved with the model. batches:
        of training images, (B, 3, H, W) in [-1, 1]."""
        mean, std = channel_statistics(self.posterior(images)[0] for images in batches)
        self.config = replace(self.config, latents_mean=mean.tolist(), latents_std=std.tolist())

    def document(self, folder: Path | None) -> dict[str, Any]:
        ours = {"flextok_version": flextok.__version__, "metadata": self.written_metadata(folder)}
        return {**to_diffusers(to_mapping(self.config)), OURS: ours}


AUTOENCODERS: dict[str, type[Pretrained]] = {"autoencoder": Autoencoder}


def channel_statistics(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """batches: (B, C, h, w). Returns mean and standard deviation by channel, (C,) float64."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        values = batch.cpu().double().transpose(0, 1).flatten(1)  # (C, B h w)
        count += values.shape[1]
        total, squares = total + values.sum(dim=1), squares + values.square().sum(dim=1)
    if not count:
        raise ValueError("no images to measure latents on")
    mean = total / count
    return mean, (squares / count - mean.square()).clamp_min(0).sqrt()


def in_fp32(norm: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """A group norm's input in fp32 under a CPU's autocast, which on a GPU sees to it itself: the
    backward pass takes three times as long in bf16."""
    (x,) = inputs
    return (x.float() if x.is_cpu and torch.is_autocast_enabled("cpu") else x,)
