"""Representation alignment with a frozen vision backbone."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flextok.nn.frozen import Frozen


class RepresentationAlignment(nn.Module):
    """REPA (arXiv 2410.06940): pulls a block's patch features, through an MLP, towards those of a
    frozen timm ViT; 1 - cosine similarity. FlexTok uses DINOv2-L on the output of block 1.

    The backbone is no part of the state dict: it is frozen, and only training needs it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        dim: int,
        model: str = "vit_large_patch14_dinov2.lvd142m",
        pretrained: bool = True,
        weight: float = 1.0,
        hidden_dim: int = 2048,
    ):
        super().__init__()
        import timm  # slow to import, and only this loss needs it

        backbone: Any = timm.create_model(
            model, pretrained=pretrained, num_classes=0, dynamic_img_size=True
        )
        self.backbone = Frozen(backbone)
        self.weight = weight
        self.projector = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, backbone.num_features),
        )
        mean, std = (torch.tensor(backbone.default_cfg[k]) for k in ("mean", "std"))
        self.register_buffer("mean", mean.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", std.view(1, 3, 1, 1), persistent=False)

    @torch.no_grad()
    def targets(self, images: Tensor, grid: int) -> Tensor:
        """images: (B, 3, H, W) in [-1, 1]. Returns the backbone's patch features (B, grid^2, F)."""
        backbone = self.backbone.to(images.device)
        size = grid * backbone.patch_embed.patch_size[0]
        pixels = (images.float() + 1) / 2
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
        tokens = backbone.forward_features((pixels - self.mean) / self.std)
        return tokens[:, backbone.num_prefix_tokens :]

    def forward(self, features: Tensor, images: Tensor) -> Tensor:
        """features: (B, N, D) of a square grid of patches; images: (B, 3, H, W) in [-1, 1]."""
        grid = round(features.shape[1] ** 0.5)
        projected = self.projector(features.to(next(self.projector.parameters()).dtype))
        target = self.targets(images, grid)
        return 1 - F.cosine_similarity(projected.float(), target.float(), dim=-1).mean()
