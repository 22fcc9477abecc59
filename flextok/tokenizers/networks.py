"""FlexTok's two networks (arXiv 2502.13967, section 3): the encoder with registers, and the
decoder, a rectified-flow DiT over patches and registers. Time: t=1 is noise (flow/path.py)."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flextok.nn.attention import register_mask
from flextok.nn.blocks import AdaLNBlock, Block, LayerNorm, SegmentModulation, modulate
from flextok.nn.devices import to_device
from flextok.nn.embeddings import (
    TimeEmbedding,
    patch_positions,
    patchify,
    sincos_2d,
    unpatchify,
)


class Encoder(nn.Module):
    """Latents to K ordered register outputs; register i never sees register j > i.

    With a token_grid (rows, columns) it is the encoder of a 2D tokenizer, the baseline: there are
    no registers, and token (i, j) is the mean of the patches in its cell of the image."""

    def __init__(
        self,
        channels: int,
        grid: int,
        patch_size: int,
        position_temperature: float,
        dim: int,
        depth: int,
        num_heads: int,
        num_registers: int,
        out_dim: int,
        token_grid: Sequence[int] | None = None,
    ):
        super().__init__()
        if token_grid is not None:
            if len(token_grid) != 2 or any(n < 1 or grid % n for n in token_grid):
                raise ValueError(f"token_grid={token_grid} must be two divisors of {grid} patches")
            if (tokens := math.prod(token_grid)) != num_registers:
                raise ValueError(f"num_registers={num_registers} must be {tokens}, the token_grid")
        self.patch_size = patch_size
        self.token_grid: Any = token_grid and tuple(token_grid)
        self.patch_embed = nn.Linear(channels * patch_size**2, dim)
        positions = sincos_2d(dim, grid, grid, position_temperature)
        self.patch_pos = nn.Parameter(positions, requires_grad=False)
        self.registers = None
        if token_grid is None:
            self.registers = nn.Parameter(torch.empty(num_registers, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads, qk_norm=True) for _ in range(depth))
        self.norm = LayerNorm(dim)
        self.head = nn.Linear(dim, out_dim)

    def forward(self, latents: Tensor, length: int | None = None) -> Tensor:
        """latents: (B, C, h, w); length: only so many registers, the first ones, which see none
        of the others. Returns z (B, length or K, out_dim), before quantization."""
        return self.head(self.outputs(latents, length))

    def outputs(self, latents: Tensor, length: int | None = None) -> Tensor:
        """As forward, but returns what the head reads, (B, length or K, D)."""
        x = self.patch_embed(patchify(latents, self.patch_size))  # (B, N, D)
        rows, columns = (side // self.patch_size for side in latents.shape[-2:])
        x = x + patch_positions(self.patch_pos, rows, columns)
        if self.registers is None:
            for block in self.blocks:
                x = block(x)
            x = rearrange(x, "b (h w) d -> b d h w", h=rows)
            x = (
                F.adaptive_avg_pool2d(x, tuple(self.token_grid or ())).flatten(2).transpose(1, 2)
            )  # (B, K, D)
            return self.norm(x)
        registers = self.registers[:length]
        num_patches = x.shape[1]
        x = torch.cat([x, registers.expand(len(x), -1, -1).to(x.dtype)], dim=1)  # (B, N+K, D)
        mask = register_mask(num_patches, len(registers), x.device)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, mask, prefix=num_patches)
        x = last(x, mask, first=num_patches)  # nobody reads the patches after it
        return self.norm(x)


class DecoderOutput(NamedTuple):
    prediction: Tensor  # (B, C, h, w), like x_t
    features: Tensor  # (B, N, D), patches after `feature_block`, for representation alignment


class FlowDecoder(nn.Module):
    """Rectified-flow DiT: noisy patches and registers under full attention, adaLN-zero on time."""

    feature_block = 1

    def __init__(
        self,
        channels: int,
        grid: int,
        patch_size: int,
        position_temperature: float,
        dim: int,
        depth: int,
        num_heads: int,
        num_registers: int,
        code_dim: int,
        max_timestep: float = 1.0,
        drop_mode: Literal["mask", "truncate"] = "mask",
    ):
        super().__init__()
        self.patch_size, self.grid, self.drop_mode = patch_size, grid, drop_mode
        self.code_embed = nn.Linear(code_dim, dim)
        self.register_pos = nn.Parameter(torch.empty(num_registers, dim))
        self.mask_token = nn.Parameter(torch.empty(dim))  # stands for every dropped register
        self.null_token = nn.Parameter(torch.empty(dim))  # stands for all of them: no condition
        self.patch_embed = nn.Linear(channels * patch_size**2, dim)
        positions = sincos_2d(dim, grid, grid, position_temperature)
        self.patch_pos = nn.Parameter(positions, requires_grad=False)
        self.time_embed = TimeEmbedding(dim, max_timestep)
        self.blocks = nn.ModuleList(AdaLNBlock(dim, num_heads) for _ in range(depth))
        self.norm = LayerNorm(dim)
        self.modulation = SegmentModulation(dim, chunks=2, segments=1)
        self.head = nn.Linear(dim, channels * patch_size**2)

    def embed_codes(
        self, codes: Tensor, keep: Tensor | None = None, null: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """codes: (B, k, code_dim) with k <= K; keep: (B,) long, tokens kept of each (default k);
        null: (B,) bool, True = no condition. Both decide shapes, so they are best on the CPU: from
        elsewhere they are read back. Returns registers (B, K', D) and an additive attention bias
        (B, 1, 1, K') or None, on the device of codes; both serve every step of a solve.

        Mask mode: the sequence has K registers, a dropped one is the mask token without a position.
        Truncate mode: it has `keep`. The null token stands for all. Equal tokens stay equal
        from block to block, so outside training one stands for them: log(their number) on its
        attention logit stands for how many they are, and K' is the number of different tokens."""
        batch, k, _ = codes.shape
        total = self.register_pos.shape[0]
        device, none = codes.device, torch.zeros(batch, dtype=torch.bool, device="cpu")
        keep = torch.full((batch,), k, device="cpu") if keep is None else keep.cpu()
        null = none if null is None else null.cpu()
        truncates = self.drop_mode == "truncate"
        size = keep if truncates else torch.full_like(keep, total)  # registers of the sequence
        real = keep.masked_fill(null, 0)  # those that are codes
        length = longest = int(keep.max()) if truncates else total
        if not self.training:
            length = int((real + (real < size)).max())
        x = self.code_embed(codes[:, :length].to(self.code_embed.weight.dtype))
        x = x + self.register_pos[: x.shape[1]]  # float32 from here on, under autocast too
        x = F.pad(x, (0, 0, 0, length - x.shape[1]))
        filler = self.mask_token.to(x.dtype)
        if null is not none:
            is_null = to_device(null[:, None, None], device)
            filler = torch.where(is_null, self.null_token.to(x.dtype), filler)
        slots = torch.arange(length, device="cpu")
        is_code = slots < real[:, None]
        x = torch.where(to_device(is_code[..., None], device), x, filler)
        if length < longest:
            copies = torch.where(slots == real[:, None], (size - real)[:, None], 0)
            count = torch.where(is_code, 1, copies)  # (B, K')
        elif truncates:
            count = (slots < size[:, None]).long()
        else:
            return x, None
        if bool((count == 1).all()):
            return x, None
        bias = count.to(x.dtype).log()  # -inf: not there
        return x, to_device(bias[:, None, None], device)

    def forward(
        self, x_t: Tensor, t: Tensor, registers: Tensor, mask: Tensor | None = None
    ) -> DecoderOutput:
        """x_t: (B, C, h, w); t: (B,) or () in [0, 1]; registers, mask: from embed_codes."""
        x = self.patch_embed(patchify(x_t.to(self.patch_embed.weight.dtype), self.patch_size))
        rows, columns = (side // self.patch_size for side in x_t.shape[-2:])
        x = x + patch_positions(self.patch_pos, rows, columns)
        lengths = (x.shape[1], registers.shape[1])
        mask = None if mask is None else F.pad(mask, (lengths[0], 0))  # 0: patches are there
        condition = self.time_embed(to_device(t, x.device).expand(len(x)))  # (B, D)
        x = torch.cat([x, registers.to(x.dtype)], dim=1)  # (B, N+K', D)
        features = x
        for i, block in enumerate(self.blocks, start=1):
            last = i == len(self.blocks)  # nobody reads the registers after it
            x = block(x, condition, lengths, mask, last)
            if i == self.feature_block + 1:
                features = x
        shift, scale = self.modulation(condition)
        x = self.head(modulate(self.norm(x), shift, scale, lengths[:1]))
        prediction = unpatchify(x, self.patch_size, rows)
        return DecoderOutput(prediction, features[:, : lengths[0]])


@torch.no_grad()
def add_places(tokens: Tensor, positions: Tensor) -> None:
    """tokens: (K, D), changed in place; positions: (1, D, h, w). Adds the positions of K points, of
    which every first k cover the image evenly (Roberts' R2 sequence), interpolated."""
    if tokens.is_meta:  # nothing to fill, and sampling there imports the compiler of torch
        return
    wide: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}  # MPS has no float64
    steps = torch.arange(len(tokens), **wide)[:, None]
    golden = 1.32471795724474602596  # the real root of x^3 = x + 1
    points = (0.5 + steps * torch.tensor([1 / golden, 1 / golden**2], **wide)) % 1
    grid = (2 * points - 1).to(positions)[None, None]  # (1, 1, K, 2), in [-1, 1]
    values = F.grid_sample(positions, grid, padding_mode="border", align_corners=False)
    tokens += values[0, :, 0].T
