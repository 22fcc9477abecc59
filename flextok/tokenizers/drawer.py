"""The drawer: images sampled around a decoder's mean image, in the latents of a KL autoencoder.

A decoder that was trained near the noise and takes one step returns the mean of all images that fit
its tokens. This draft holds what the tokens determine, and is blurred where they determine nothing.
The drawer is a rectified-flow DiT of latents (x_t = (1 - t) x_0 + t noise) that reads the draft
patch by patch, at the place of the patch that it draws; so it need not learn where which token
points, and its sequence has the length of the grid, whatever the number of tokens. PMRF (arXiv
2410.00418) draws around the posterior mean as well, but begins its flow there.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from flextok.nn.attention import Attention
from flextok.nn.blocks import LayerNorm, SwiGLU
from flextok.nn.devices import to_device
from flextok.nn.embeddings import (
    TimeEmbedding,
    patch_positions,
    patchify,
    sincos_2d,
    unpatchify,
)
from flextok.schema import Bounds, ConfigError, Depth, Size, build
from flextok.tokenizers.decoding import Conditions, DecodeOptions
from flextok.vae import VAES


def one_step() -> DecodeOptions:
    return DecodeOptions(1, guidance={"name": "cfg"}, guidance_scale=1.0)


@dataclass
class DrawerConfig:
    """Keys of `model.drawer`."""

    vae: dict[str, Any] = field(default_factory=lambda: {"name": "kl"})  # of the drawn latents
    patch_size: Size = 2  # in latents
    dim: Size = 256
    depth: Depth = 8
    head_dim: Size = 64
    # neighbouring patches of a small grid look alike at FlexTok's 10000
    position_temperature: Annotated[float, Bounds(1, 1e9)] = 100.0
    draft: DecodeOptions = field(default_factory=one_step)  # how the first decoder solves


class DrawerBlock(nn.Module):
    """Pre-norm attention and SwiGLU, modulated by the time: one modulation for all blocks and a
    table of each (PixArt-alpha, arXiv 2310.00426, section 2.3), a tenth of adaLN-zero's weights."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(dim), LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qk_norm=True)
        self.mlp = SwiGLU(dim)
        self.modulation = nn.Parameter(torch.zeros(6, dim))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x: (B, N, D); modulation: (B, 6, D). Returns (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + self.modulation).chunk(
            6, dim=1
        )
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Drawer(nn.Module):
    """Predicts the velocity of latents from noisy latents, the time and a draft in pixels."""

    def __init__(self, config: DrawerConfig, image_size: int):
        super().__init__()
        self.vae = build(VAES, config.vae, "vae")
        stride, dim = self.vae.downsample * config.patch_size, config.dim
        if image_size % stride:
            raise ConfigError(f"drawer: image_size={image_size} must be a multiple of {stride}")
        if dim % config.head_dim:
            raise ConfigError(f"drawer: dim={dim} must be a multiple of head_dim={config.head_dim}")
        grid = image_size // stride
        self.dim = dim
        self.grid, self.patch_size, self.draft_patch_size = grid, config.patch_size, stride
        channels = self.vae.channels * config.patch_size**2
        self.patch_embed = nn.Linear(channels, dim)
        self.draft_embed = nn.Linear(3 * stride**2, dim)
        self.null_draft = nn.Parameter(torch.empty(dim))  # in place of the draft: no condition
        positions = (
            sincos_2d(dim, grid, grid, config.position_temperature).flatten(2).transpose(1, 2)
        )
        # FSDP2 refuses other strides
        self.patch_pos = nn.Parameter(positions.contiguous(), requires_grad=False)
        self.time_embed = TimeEmbedding(dim)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(
            DrawerBlock(dim, dim // config.head_dim) for _ in range(config.depth)
        )
        self.norm = LayerNorm(dim)
        self.head_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.head = nn.Linear(dim, channels)
        self.init_weights()

    def init_weights(self) -> None:
        """Linear: Xavier, no bias. Zero: the modulations, so that every block starts as the
        identity, and the head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.null_draft, std=0.02)
        for part in (self.modulation, self.head_modulation, self.head):
            for parameter in part.parameters():
                nn.init.zeros_(parameter)

    def features(
        self, x_t: Tensor, t: Tensor, draft: Tensor, null: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As forward. Yields each block's output (B, N, D), and the time's embedding (B, D)."""
        x_t, draft = (x.to(self.patch_embed.weight.dtype) for x in (x_t, draft))
        condition = self.draft_embed(patchify(draft, self.draft_patch_size))  # (B, N, D)
        if null is not None:
            condition = torch.where(
                to_device(null[:, None, None], x_t.device), self.null_draft, condition
            )
        rows, columns = (side // self.patch_size for side in x_t.shape[-2:])
        table = self.patch_pos.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        x = self.patch_embed(patchify(x_t, self.patch_size)) + condition
        x = x + patch_positions(table, rows, columns)
        time = self.time_embed(to_device(t, x.device).expand(len(x)))  # (B, D)
        modulation = self.modulation(time).unflatten(1, (6, -1))
        for block in self.blocks:
            x = block(x, modulation)
            yield x, time

    def forward(self, x_t: Tensor, t: Tensor, draft: Tensor, null: Tensor | None = None) -> Tensor:
        """x_t: (B, C, h, w); t: (B,) or () in [0, 1]; draft: (B, 3, H, W) in [-1, 1]; null: (B,)
        bool, True = without the draft. Returns the velocity (B, C, h, w)."""
        x, time = deque(self.features(x_t, t, draft, null), maxlen=1).pop()  # the last block's
        shift, scale = self.head_modulation(time)[:, None].chunk(2, dim=-1)
        x = self.head(self.norm(x) * (1 + scale) + shift)
        return unpatchify(x, self.patch_size, x_t.shape[-2] // self.patch_size)

    def conditions(self, draft: Tensor) -> Conditions:
        """draft: (B, 3, H, W) in [-1, 1]. Returns the velocities around it, and around nothing."""
        nothing = torch.ones(len(draft), dtype=torch.bool, device="cpu")
        return Conditions(lambda x, t: self(x, t, draft), lambda x, t: self(x, t, draft, nothing))
