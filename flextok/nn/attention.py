"""Multi-head attention with optional qk-norm and a key-value cache, and its masks.

qk-norm is FlexTok's: a LayerNorm without affine over each head (arXiv 2502.13967, appendix).
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def register_mask(num_patches: int, num_registers: int, device: torch.device) -> Tensor:
    """(K, N+K) bool, True = attend: register i sees all patches and registers <= i. The patches'
    own rows are not there: patches see patches (FlexTok, section 3.1)."""
    n = num_patches + num_registers
    return torch.ones(num_registers, n, dtype=torch.bool, device=device).tril(num_patches)


SHORT = 128  # positions, up to which a CPU is faster so; from 256 on it is not


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """torch's scaled_dot_product_attention. q: (B, heads, N, head_dim); k, v: (B, heads, M,
    head_dim); mask: see Attention. Where a CPU trains short sequences in bf16 it is computed in
    fp32: of some dozens of positions the gradient takes 2 to 5 times as long in bf16."""
    dtype, fused = q.dtype, F.scaled_dot_product_attention
    learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
    if q.is_cpu and dtype is torch.bfloat16 and learns and k.shape[2] <= SHORT:
        q, k, v = q.float(), k.float(), v.float()
        mask = mask if mask is None or mask.dtype is torch.bool else mask.float()
        with torch.autocast("cpu", enabled=False):
            return fused(q, k, v, mask, dropout, is_causal, scale=scale).to(dtype)
    return fused(q, k, v, mask, dropout, is_causal, scale=scale)


class KVCache:
    """Keys and values of the positions already generated, in one preallocated buffer a layer."""

    def __init__(self, batch: int, num_heads: int, length: int, head_dim: int, like: Tensor):
        self.k = like.new_empty(batch, num_heads, length, head_dim)
        self.v = like.new_empty(batch, num_heads, length, head_dim)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v: (B, heads, n, head_dim), the next n positions. Returns all keys and values."""
        end = self.length + k.shape[2]
        assert end <= self.k.shape[2], f"KV cache of length {self.k.shape[2]} is full"
        self.k[:, :, self.length : end], self.v[:, :, self.length : end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def take(self, rows: Tensor, length: int, room: int) -> "KVCache":
        """A copy for the batch whose row j continues row rows[j] of this one, (n,) long: the first
        `length` positions, and room for `room` in all."""
        _, heads, _, dim = self.k.shape
        taken = KVCache(len(rows), heads, room, dim, like=self.k)
        taken.append(self.k[rows, :, :length], self.v[rows, :, :length])
        return taken


class Attention(nn.Module):
    """Self- or cross-attention without biases; num_heads * head_dim = dim."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False, context_dim: int = 0):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        self.num_heads, self.head_dim, self.qk_norm = num_heads, dim // num_heads, qk_norm
        # FlexTok writes its scale as 8 / head_dim; at its head_dim of 64 both are 1/8
        self.scale = 8.0 / self.head_dim if qk_norm else self.head_dim**-0.5
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(context_dim or dim, dim, bias=False)
        self.wv = nn.Linear(context_dim or dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def split_heads(self, x: Tensor, norm: bool) -> Tensor:
        x = rearrange(x, "b n (h d) -> b h n d", h=self.num_heads)
        if norm:  # fp32 island: the norm of a head is sensitive to rounding
            x = F.layer_norm(x.float(), (self.head_dim,)).to(x.dtype)
        return x

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context: (B, L, context_dim). Returns keys and values, (B, heads, L, head_dim) each."""
        k = self.split_heads(self.wk(context), self.qk_norm)
        return k, self.split_heads(self.wv(context), False)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
        cache: KVCache | None = None,
        keys_values: tuple[Tensor, Tensor] | None = None,
        prefix: int = 0,
    ) -> Tensor:
        """x: (B, N, D); mask: broadcastable to (B, heads, N, M), bool (True = attend) or an
        additive bias; is_causal: without a mask, positions see none behind them; cache:
        self-attention continues after the cached positions; keys_values: ready ones of another
        sequence (cross-attention); prefix: the first so many positions see just one another, and
        mask has the rows of the rest. Returns (B, N, D)."""
        q = self.split_heads(self.wq(x), self.qk_norm)
        k, v = keys_values if keys_values is not None else self.keys_values(x)
        causal = is_causal and mask is None and q.shape[2] > 1
        if cache is not None:
            start = cache.length
            k, v = cache.append(k, v)
            if causal and start:  # SDPA's own causal flag aligns top-left
                causal = False
                mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device)
                mask = mask.tril(start)
        y = attend(q[:, :, prefix:], k, v, mask, causal, self.scale)
        if prefix:
            inside = attend(q[:, :, :prefix], k[:, :, :prefix], v[:, :, :prefix], scale=self.scale)
            y = torch.cat([inside, y], dim=2)
        return self.proj(rearrange(y, "b h n d -> b n (h d)"))
