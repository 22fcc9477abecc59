"""Alignment with a frozen vision network: of the decoder's features, and of the prefixes."""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flextok.nn.efficientnet import efficientnet_lite0
from flextok.nn.frozen import Frozen
from flextok.schema import Weight


class ViTFeatures(nn.Module):
    """The patch features of a timm ViT, on images resized so that it sees the same grid."""

    network: Any
    mean: Tensor
    std: Tensor

    def __init__(self, model: str, pretrained: bool):
        super().__init__()
        import timm  # slow to import, and only this loss needs it

        if ":" not in model and not timm.is_model(model):  # hf-hub:owner/name is a place
            raise ValueError(
                f"alignment: model={model!r} is no model of timm: see timm.list_models()"
            )
        network: Any = timm.create_model(
            model, pretrained=pretrained, num_classes=0, dynamic_img_size=True
        )
        self.network, self.dim = network, network.num_features
        self.pooled_dim = self.dim
        mean, std = (torch.tensor(network.default_cfg[k]) for k in ("mean", "std"))
        self.register_buffer("mean", mean.view(1, 3, 1, 1))
        self.register_buffer("std", std.view(1, 3, 1, 1))

    def forward(self, images: Tensor, rows: int, columns: int) -> Tensor:
        """images: (B, 3, H, W) in [-1, 1]. Returns (B, rows * columns, dim)."""
        size = self.network.patch_embed.patch_size[0]
        pixels = (resize(images, rows * size, columns * size) + 1) / 2
        tokens = self.network.forward_features((pixels - self.mean) / self.std)
        return tokens[:, self.network.num_prefix_tokens :]

    def pooled(self, images: Tensor, size: int) -> Tensor:
        """Features of the whole image, seen at about size x size pixels: (B, pooled_dim)."""
        grid = max(1, round(size / self.network.patch_embed.patch_size[0]))
        return self(images, grid, grid).mean(1)


class EfficientNetFeatures(nn.Module):
    """EfficientNet-Lite0's 112 channels at stride 16, whose weights need no download, on images
    resized so that a cell of the map is a patch of ours. The last stage (stride 32) would be more
    semantic; what alignment wants is the layout (iREPA, arXiv 2512.10794)."""

    dim, stride, stage, pooled_dim = 112, 16, 3, 1280

    def __init__(self, pretrained: bool):
        super().__init__()
        self.network = efficientnet_lite0(pretrained)

    def forward(self, images: Tensor, rows: int, columns: int) -> Tensor:
        """images: (B, 3, H, W) in [-1, 1]. Returns (B, rows * columns, dim)."""
        (features,) = self.network.forward_intermediates(
            self.resized(images, rows * self.stride, columns * self.stride),
            indices=[self.stage],
            stop_early=True,
            intermediates_only=True,
        )
        return features.flatten(2).transpose(1, 2)

    def pooled(self, images: Tensor, size: int) -> Tensor:
        """Features of the whole image, seen at size x size pixels: (B, pooled_dim)."""
        return self.network.forward_features(self.resized(images, size, size)).mean((2, 3))

    def resized(self, images: Tensor, height: int, width: int) -> Tensor:
        """For a CPU in channels_last, where convolutions take two thirds of the time in bf16."""
        layout = torch.channels_last if images.is_cpu else torch.contiguous_format
        return resize(images, height, width).contiguous(memory_format=layout)


def backbone_of(model: str, pretrained: bool) -> ViTFeatures | EfficientNetFeatures:
    """model: a timm ViT by name, or "efficientnet_lite0", which needs no network connection."""
    return (
        EfficientNetFeatures(pretrained)
        if model == "efficientnet_lite0"
        else ViTFeatures(model, pretrained)
    )


class PrefixAlignment(nn.Module):
    """Semantics first: from the first 1, 2, 4, ... tokens of an image, an MLP predicts a frozen
    network's features of the whole image; the mean squared error. A prefix of k tokens counts
    k^-fade as much as the first token, so that the first tokens determine what the image shows and
    the later ones are free for its details (the aim of ReTok, arXiv 2601.01535, and of CaTok,
    2603.06449; the loss is ours). It needs no decoder, so every step trains all prefixes.

    model: see backbone_of; it sees the images at `size` pixels, and it is no part of the state
    dict: it is frozen, and only training needs it.
    """

    def __init__(
        self,
        num_tokens: int,
        code_dim: int,
        model: str = "efficientnet_lite0",
        pretrained: bool = True,
        weight: Weight = 0.1,
        fade: float = 1.0,
        size: int = 224,
        hidden_dim: int = 512,
    ):
        super().__init__()
        self.backbone = Frozen(backbone_of(model, pretrained))
        self.weight, self.fade, self.size = weight, fade, size
        self.embed = nn.Linear(code_dim, hidden_dim)
        self.positions = nn.Parameter(0.5 * torch.randn(num_tokens, hidden_dim))
        self.head = nn.Sequential(
            nn.Linear(hidden_dim, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, self.backbone.network.pooled_dim),
        )

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W) in [-1, 1]. Returns the network's features, (B, F) float32."""
        return self.backbone.to(images.device).pooled(images.float(), self.size).float()

    def forward(self, codes: Tensor, targets: Tensor) -> Tensor:
        """codes: (B, k, D), the first k tokens' codes; targets: (B, F). Returns the error of each
        image, (B,), over the prefixes within these k tokens."""
        lengths = [2**i for i in range(codes.shape[1].bit_length())]
        embedded = self.embed(codes.to(self.positions.dtype)) + self.positions[: codes.shape[1]]
        sums = F.silu(embedded).cumsum(1)
        kept = torch.stack([sums[:, length - 1] / length**0.5 for length in lengths], dim=1)
        errors = (self.head(kept).float() - targets[:, None]).square().mean(-1).unbind(1)
        terms = [x / length**self.fade for x, length in zip(errors, lengths, strict=True)]
        return torch.stack(terms).sum(0)


class RepresentationAlignment(nn.Module):
    """REPA (arXiv 2410.06940): pulls a block's patch features, through an MLP, towards those of a
    frozen network; 1 - cosine similarity. FlexTok uses DINOv2-L on the output of block 1.

    model: see backbone_of. spatial: as in iREPA (arXiv 2512.10794), a 3x3 convolution in place of
    the MLP, and the target's channels standardised over each image's positions, so that what all
    patches share does not count.

    The network is no part of the state dict: it is frozen, and only training needs it.
    """

    def __init__(
        self,
        dim: int,
        model: str = "vit_large_patch14_dinov2.lvd142m",
        pretrained: bool = True,
        weight: Weight = 1.0,
        hidden_dim: int = 2048,
        spatial: bool = False,
    ):
        super().__init__()
        backbone = backbone_of(model, pretrained)
        self.backbone = Frozen(backbone)
        self.weight, self.spatial = weight, spatial
        self.projector: nn.Module
        if spatial:
            self.projector = nn.Conv2d(dim, backbone.dim, kernel_size=3, padding=1)
        else:
            self.projector = nn.Sequential(
                nn.Linear(dim, hidden_dim),
                nn.SiLU(),
                nn.Linear(hidden_dim, hidden_dim),
                nn.SiLU(),
                nn.Linear(hidden_dim, backbone.dim),
            )

    @torch.no_grad()
    def targets(self, images: Tensor, rows: int, columns: int) -> Tensor:
        """images: (B, 3, H, W) in [-1, 1]. Returns the network's patch features, (B, N, F)."""
        target = self.backbone.to(images.device)(images.float(), rows, columns).float()
        if self.spatial:
            std, mean = torch.std_mean(target, dim=1, keepdim=True)
            target = (target - mean) / (std + 1e-6)
        return target

    def forward(self, features: Tensor, images: Tensor) -> Tensor:
        """features: (B, N, D) of square patches of images (B, 3, H, W) in [-1, 1]."""
        height, width = images.shape[-2:]
        rows = round((features.shape[1] * height / width) ** 0.5)
        columns = features.shape[1] // rows
        features = features.to(next(self.projector.parameters()).dtype)
        if self.spatial:
            maps = self.projector(rearrange(features, "b (h w) d -> b d h w", h=rows))
            projected = maps.flatten(2).transpose(1, 2)
        else:
            projected = self.projector(features)
        targets = self.targets(images, rows, columns)
        return 1 - F.cosine_similarity(projected.float(), targets, dim=-1).mean()


def resize(images: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True)
