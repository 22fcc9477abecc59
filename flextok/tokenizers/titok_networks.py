"""TiTok's networks: the encoder of patches and latent tokens, the decoder from mask tokens, and the
head that makes pixels. They take and give pixels in [0, 1]."""

import torch
from torch import Tensor, nn

from flextok.nn.devices import to_device
from flextok.nn.embeddings import patchify, unpatchify
from flextok.nn.vit import ViTBlock


class TiTokEncoder(nn.Module):
    """Images to K vectors, before quantization."""

    def __init__(
        self,
        grid: int,
        patch_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        num_tokens: int,
        out_dim: int,
        legacy: bool,
    ):
        super().__init__()
        self.patch_size, self.legacy = patch_size, legacy
        self.patch_embed = nn.Linear(3 * patch_size**2, dim)
        self.class_token = nn.Parameter(torch.empty(1, dim))
        self.patch_pos = nn.Parameter(torch.empty(1 + grid**2, dim))
        self.latent_tokens = nn.Parameter(torch.empty(num_tokens, dim))
        self.latent_pos = nn.Parameter(torch.empty(num_tokens, dim))
        self.norm_pre = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(ViTBlock(dim, num_heads) for _ in range(depth))
        self.norm_post = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, out_dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: (B, 3, H, W) in [0, 1]. Returns z (B, K, out_dim)."""
        batch = len(pixels)
        x = self.patch_embed(patchify(pixels, self.patch_size))  # (B, N, D)
        patches = torch.cat([self.class_token.expand(batch, -1, -1).to(x.dtype), x], dim=1)
        patches = patches + self.patch_pos
        latents = (self.latent_tokens + self.latent_pos).expand(batch, -1, -1)
        x = self.norm_pre(torch.cat([patches, latents.to(x.dtype)], dim=1))  # (B, 1+N+K, D)
        for block in self.blocks:
            x = block(x)
        x = self.norm_post(x[:, patches.shape[1] :])  # (B, K, D)
        if self.legacy:
            # read as (D, K) without a transposition: each output mixes features of all latents.
            # Official l32, b64 and s128 weights depend on it.
            x = x.reshape(batch, x.shape[2], x.shape[1]).transpose(1, 2)
        return self.head(x)


class TiTokDecoder(nn.Module):
    """Codes beside mask tokens, one for each patch, to the outputs of `head` at those patches."""

    def __init__(
        self,
        grid: int,
        dim: int,
        depth: int,
        num_heads: int,
        num_tokens: int,
        code_dim: int,
        text_length: int,
        text_dim: int,
        head: nn.Module,
    ):
        super().__init__()
        self.grid = grid
        self.code_embed = nn.Linear(code_dim, dim)
        self.class_token = nn.Parameter(torch.empty(1, dim))
        self.mask_token = nn.Parameter(torch.empty(1, dim))
        self.patch_pos = nn.Parameter(torch.empty(1 + grid**2, dim))
        self.latent_pos = nn.Parameter(torch.empty(num_tokens, dim))
        self.text_embed, self.text_pos = None, None
        if text_length:
            self.text_embed = nn.Linear(text_dim, dim)
            self.text_pos = nn.Parameter(torch.empty(text_length, dim))
        self.norm_pre = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(ViTBlock(dim, num_heads) for _ in range(depth))
        self.norm_post = nn.LayerNorm(dim)
        self.head = head

    def forward(
        self, codes: Tensor, keep: Tensor | None = None, text: Tensor | None = None
    ) -> Tensor:
        """codes: (B, k, code_dim), k <= K; keep: (B,) long, codes in use of each (all if None);
        text: (B, L, text_dim) float. Returns what the head makes of (B, N, D)."""
        batch, k, _ = codes.shape
        x = self.code_embed(codes.to(self.code_embed.weight.dtype))
        latents = x + self.latent_pos[:k]
        patches = torch.cat([self.class_token, self.mask_token.expand(self.grid**2, -1)])
        patches = (patches + self.patch_pos).expand(batch, -1, -1)
        parts = [patches.to(x.dtype), latents]
        if self.text_embed is not None and self.text_pos is not None:
            expected = (batch, len(self.text_pos), self.text_embed.in_features)
            if text is None or tuple(text.shape) != expected:
                got = None if text is None else tuple(text.shape)
                raise ValueError(f"text must be features {expected}, got {got}")
            parts.append(self.text_embed(text.to(x.dtype)) + self.text_pos)
        elif text is not None:
            raise ValueError("this TiTok has no text input (text_length is 0)")
        x = self.norm_pre(torch.cat(parts, dim=1))  # (B, 1+N+k+L, D)
        mask = None
        if keep is not None:
            seen = torch.ones(batch, x.shape[1], dtype=torch.bool, device=x.device)
            first = patches.shape[1]
            kept = to_device(keep, x.device)[:, None]
            seen[:, first : first + k] = torch.arange(k, device=x.device) < kept
            mask = seen[:, None, None]
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm_post(x[:, 1 : patches.shape[1]]))


class PixelHead(nn.Module):
    """Each patch's pixels, smoothed over patch borders by a 3x3 convolution."""

    def __init__(self, dim: int, patch_size: int, grid: int):
        super().__init__()
        self.patch_size, self.grid = patch_size, grid
        self.linear = nn.Linear(dim, 3 * patch_size**2)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D). Returns (B, 3, H, W), about [0, 1]."""
        return self.conv(unpatchify(self.linear(x), self.patch_size, self.grid))
