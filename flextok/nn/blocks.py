"""Transformer blocks: pre-norm with optional cross-attention, and its adaLN-zero sibling (DiT)."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flextok.nn.attention import Attention, KVCache


class LayerNorm(nn.Module):
    """LayerNorm computed in fp32, with an optional learned scale and never a bias."""

    def __init__(self, dim: int, eps: float = 1e-5, affine: bool = False):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        return F.layer_norm(x.float(), (self.dim,), weight, eps=self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """fc2(silu(fc1 x) * fc3 x) without biases, hidden int(8 D / 3) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, dim: int):
        super().__init__()
        hidden = int(8 * dim / 3)
        self.fc1 = nn.Linear(dim, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)
        self.fc3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))


class Block(nn.Module):
    """Pre-norm attention and SwiGLU; with context, cross-attention stands between the two."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qk_norm: bool = False,
        eps: float = 1e-5,
        affine: bool = False,
        cross_attention: bool = False,
    ):
        super().__init__()
        self.norm1 = LayerNorm(dim, eps, affine)
        self.attn = Attention(dim, num_heads, qk_norm)
        self.cross_norm = LayerNorm(dim, eps, affine) if cross_attention else None
        self.cross_attn = Attention(dim, num_heads, qk_norm) if cross_attention else None
        self.norm2 = LayerNorm(dim, eps, affine)
        self.mlp = SwiGLU(dim)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
        cache: KVCache | None = None,
        context: Tensor | tuple[Tensor, Tensor] | None = None,
        context_mask: Tensor | None = None,
        prefix: int = 0,
        first: int = 0,
    ) -> Tensor:
        """x: (B, N, D); mask, prefix as in Attention; context: of the condition (B, L, D), or its
        keys and values, ready from `cross_attn.keys_values`; context_mask: (B, 1, 1, L) bool;
        first: only positions from here on are computed (mask has their rows), the others just
        seen. Returns (B, N - first, D)."""
        h = self.norm1(x)
        seen = self.attn.keys_values(h) if first else None
        x = x[:, first:] + self.attn(h[:, first:], mask, is_causal, cache, seen, prefix)
        if self.cross_attn is not None and self.cross_norm is not None:
            if isinstance(context, Tensor):
                context = self.cross_attn.keys_values(context)
            x = x + self.cross_attn(self.cross_norm(x), context_mask, keys_values=context)
        return x + self.mlp(self.norm2(x))


class SegmentModulation(nn.Module):
    """adaLN over a sequence of two segments (patches, registers), each with its own modulation.

    One Linear gives `chunks` vectors of width D for each segment, from a condition (B, D).
    """

    def __init__(self, dim: int, chunks: int, segments: int):
        super().__init__()
        self.dim, self.chunks, self.segments = dim, chunks, segments
        self.linear = nn.Linear(dim, segments * chunks * dim)

    def forward(self, condition: Tensor) -> list[Tensor]:
        """condition: (B, D). Returns `chunks` tensors (B, segments, D)."""
        out = self.linear(F.silu(condition))
        return list(out.view(-1, self.segments, self.chunks, self.dim).unbind(dim=2))


class AdaLNBlock(nn.Module):
    """adaLN-zero block (DiT) over [patches, registers], modulated apart (FlexTok, section 3.2)."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = True, eps: float = 1e-5):
        super().__init__()
        self.norm1 = LayerNorm(dim, eps)
        self.attn = Attention(dim, num_heads, qk_norm)
        self.norm2 = LayerNorm(dim, eps)
        self.mlp = SwiGLU(dim)
        self.modulation = SegmentModulation(dim, chunks=6, segments=2)

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        lengths: tuple[int, ...],
        mask: Tensor | None = None,
        patches_only: bool = False,
    ) -> Tensor:
        """x: (B, N+K, D); condition: (B, D); lengths: (N, K); mask as in
        Attention; patches_only: the registers are seen but not computed. Returns (B, N+K, D), or
        (B, N, D)."""
        # the published chunk order: gates first
        modulation = self.modulation(condition)
        gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = modulation
        h = modulate(self.norm1(x), shift_attn, scale_attn, lengths)
        seen = self.attn.keys_values(h) if patches_only else None
        if patches_only:
            lengths = lengths[:1]
            x, h = x[:, : lengths[0]], h[:, : lengths[0]]
        x = add_gated(x, gate_attn, self.attn(h, mask, keys_values=seen), lengths)
        h = modulate(self.norm2(x), shift_mlp, scale_mlp, lengths)
        return add_gated(x, gate_mlp, self.mlp(h), lengths)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """x (1 + scale) + shift. x: (B, sum(lengths), D); shift, scale: (B, segments, D), a vector
    for each segment of x."""
    parts = enumerate(x.split(lengths, dim=1))
    return torch.cat(
        [torch.addcmul(shift[:, i, None], part, 1 + scale[:, i, None]) for i, part in parts], dim=1
    )


def add_gated(x: Tensor, gate: Tensor, y: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """x + gate y. x, y: (B, sum(lengths), D); gate: (B, segments, D)."""
    parts = enumerate(zip(x.split(lengths, dim=1), y.split(lengths, dim=1), strict=True))
    return torch.cat([torch.addcmul(a, gate[:, i, None], b) for i, (a, b) in parts], dim=1)


def transformer_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The transformer blocks of a model: what its module lists named "blocks" hold."""
    for name, module in model.named_modules():
        if name.split(".")[-1] == "blocks" and isinstance(module, nn.ModuleList):
            yield from module


def recompute_blocks(model: nn.Module) -> None:
    """Recompute the activations of each transformer block in the backward pass: less memory for
    about a third more time."""
    for block in transformer_blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
