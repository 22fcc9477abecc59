"""The classic transformer block, with biases and an exact GELU: ViT and CLIP (pre-norm), BERT
(post-norm) and U-ViT (pre-norm, a long skip entering in front) are settings of one class."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flextok.nn.attention import attend


class WideLayerNorm(nn.LayerNorm):
    """Takes float32 with weights in half precision, too, as sharded blocks gather them: a CPU's
    layer_norm refuses these."""

    def forward(self, input: Tensor) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, input.dtype)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class BiasedAttention(nn.Module):
    """Multi-head self-attention with a fused qkv projection and biases."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, dropout: float = 0.0):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (B, N, D); mask: broadcastable to (B, heads, N, N) bool, True = attend.
        Returns (B, N, D)."""
        q, k, v = rearrange(self.qkv(x), "b n (s h d) -> s b h n d", s=3, h=self.num_heads)
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k, v, mask, dropout=dropout)
        return self.proj(rearrange(y, "b h n d -> b n (h d)"))


class ViTBlock(nn.Module):
    """Attention and a GELU MLP, each with a residual and a LayerNorm.

    post_norm: the norms follow the residual sums (BERT) in place of opening the branches (ViT).
    skip: forward takes a second sequence, joined to x by a Linear in front (U-ViT, 2209.12152).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        eps: float = 1e-5,
        qkv_bias: bool = True,
        post_norm: bool = False,
        skip: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        hidden = round(dim * mlp_ratio)
        self.post_norm = post_norm
        self.skip = nn.Linear(2 * dim, dim) if skip else None
        self.norm1 = WideLayerNorm(dim, eps)
        self.attn = BiasedAttention(dim, num_heads, qkv_bias, dropout)
        self.norm2 = WideLayerNorm(dim, eps)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        """x: (B, N, D); mask as in BiasedAttention; skip: (B, N, D). Returns (B, N, D)."""
        if self.skip is not None and skip is not None:
            x = self.skip(torch.cat([x, skip], dim=-1)).to(x.dtype)  # float32 under autocast
        if self.post_norm:
            x = self.norm1(x + self.dropout(self.attn(x, mask)))
            return self.norm2(x + self.dropout(self.mlp(x)))
        x = x + self.dropout(self.attn(self.norm1(x), mask))
        return x + self.dropout(self.mlp(self.norm2(x)))

    def mlp(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))
