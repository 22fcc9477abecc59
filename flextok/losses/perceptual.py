"""Perceptual losses: distances between images in the features of a frozen, pretrained network.

TiTok's second stage uses 0.1 x "convnext_s"; its single-stage models use 1.0 x "lpips" + 0.1 x
"convnext_s". "efficientnet_lite0" needs no network connection. Missing weights are an error:
nothing else ever stands in for them.
"""

import importlib.util
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flextok.nn.efficientnet import PACKAGE, efficientnet_lite0
from flextok.nn.frozen import Frozen
from flextok.schema import unknown_key

log = logging.getLogger(__name__)


class LPIPS(nn.Module):
    """LPIPS with VGG-16 (arXiv 1801.03924, version 0.1): weighted squared differences of
    unit-length features after five ReLUs. Backbone from torchvision, heads from torchmetrics."""

    source = "torchvision vgg16 IMAGENET1K_V1, heads from torchmetrics"
    shift: Tensor
    scale: Tensor
    layers = (3, 8, 15, 22, 29)  # relu1_2, 2_2, 3_3, 4_3, 5_3 in torchvision's vgg16.features

    def __init__(self, pretrained: bool = True):
        super().__init__()
        from torchvision.models import vgg16  # slow to import, and only this loss needs it

        self.features = vgg16(weights="IMAGENET1K_V1" if pretrained else None).features
        heads = torch.load(lpips_heads(), map_location="cpu", weights_only=True)
        for i in range(len(self.layers)):
            head = heads[f"lin{i}.model.1.weight"].to(torch.get_default_device())
            self.register_buffer(f"head{i}", head)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """images, targets: (B, 3, H, W) in [-1, 1]. Returns the mean distance, a scalar."""
        return self.distances(images, targets).mean()

    def distances(self, images: Tensor, targets: Tensor) -> Tensor:
        """images, targets: (B, 3, H, W) in [-1, 1]. Returns each pair's distance, (B,)."""
        x = (torch.cat([images, targets]) - self.shift) / self.scale
        total = x.new_zeros(len(images))
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.layers:
                ours, theirs = unit_length(x).chunk(2)
                head = getattr(self, f"head{self.layers.index(i)}")
                total = total + F.conv2d((ours - theirs).square(), head).mean(dim=(1, 2, 3))
            if i == self.layers[-1]:
                break
        return total


class ConvNeXtLogits(nn.Module):
    """Mean squared difference of an ImageNet ConvNeXt-S's logits at 224 px (TiTok)."""

    source = "torchvision convnext_small IMAGENET1K_V1"
    mean: Tensor
    std: Tensor

    def __init__(self, pretrained: bool = True):
        super().__init__()
        from torchvision.models import convnext_small

        self.network = convnext_small(weights="IMAGENET1K_V1" if pretrained else None)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """images, targets: (B, 3, H, W) in [-1, 1]. Returns a scalar."""
        x = (torch.cat([images, targets]) + 1) / 2
        x = F.interpolate(x, (224, 224), mode="bilinear", antialias=True)
        ours, theirs = self.network((x - self.mean) / self.std).chunk(2)
        return F.mse_loss(ours, theirs)


class EfficientNetFeatures(nn.Module):
    """LPIPS's distance without learned heads, in EfficientNet-Lite0: mean squared differences of
    unit-length features after each of five resolutions. Images below 64 px are enlarged to it."""

    source = f"PyPI {PACKAGE}"

    def __init__(self, pretrained: bool = True):
        super().__init__()
        self.network = efficientnet_lite0(pretrained)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """images, targets: (B, 3, H, W) in [-1, 1]. Returns a scalar."""
        x = torch.cat([images, targets])
        if min(x.shape[-2:]) < 64:
            x = F.interpolate(x, (64, 64), mode="bilinear")
        total = x.new_zeros(())
        for features in self.network.forward_intermediates(x, intermediates_only=True):
            ours, theirs = unit_length(features).chunk(2)
            total = total + (ours - theirs).square().sum(dim=1).mean()
        return total


def unit_length(features: Tensor) -> Tensor:
    """features: (B, C, h, w). Returns them divided by their length over C."""
    return features / torch.sqrt(1e-8 + features.square().sum(dim=1, keepdim=True))


PERCEPTUAL: dict[str, Callable[[bool], nn.Module]] = {
    "lpips": LPIPS,
    "convnext_s": ConvNeXtLogits,
    "efficientnet_lite0": EfficientNetFeatures,
}


class PerceptualLoss:
    """A weighted sum of perceptual losses by name: {"lpips": 1.0, "convnext_s": 0.1}.

    No nn.Module on purpose: its frozen networks belong to no state dict. Empty weights cost
    nothing and give zero.
    """

    def __init__(self, weights: Mapping[str, float]):
        for name in weights:
            if name not in PERCEPTUAL:
                raise unknown_key("perceptual loss", name, list(PERCEPTUAL))
        self.weights = dict(weights)
        self.networks: dict[str, Frozen] = {}

    def load(self, pretrained: bool = True) -> dict[str, str]:
        """Build the networks and load their weights, once; a call does it too. Returns, by name,
        what is used and where it came from, which is logged as well."""
        used = {}
        for name, weight in self.weights.items():
            is_new = name not in self.networks
            if is_new:
                self.networks[name] = Frozen(load_network(name, pretrained))
            used[name] = f"weight {weight:g}, from {self.networks[name].network.source}"
            if is_new:
                log.info("perceptual loss %s: %s", name, used[name])
        return used

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """images, targets: (B, 3, H, W) in [-1, 1]; gradients reach both. Returns a scalar."""
        self.load()
        total = images.new_zeros((), dtype=torch.float32)
        for name, weight in self.weights.items():
            network = self.networks[name].to(images.device)
            total = total + weight * network(images, targets).float()
        return total


def load_network(name: str, pretrained: bool = True) -> nn.Module:
    """A perceptual network by name. Raises ValueError without its weights."""
    try:
        return PERCEPTUAL[name](pretrained)
    except (OSError, RuntimeError) as error:  # no network, no file, or a damaged one
        remedy = ""
        if name != "efficientnet_lite0":
            remedy = (
                f". Put them into torch's hub cache ({torch.hub.get_dir()}/checkpoints), or name "
                "another one in objective.perceptual: efficientnet_lite0 needs no connection"
            )
        raise ValueError(
            f"perceptual loss {name!r} needs pretrained weights that are not here ({error}){remedy}"
        ) from error


def lpips_heads() -> Path:
    """The file of LPIPS's linear heads for VGG-16, shipped in torchmetrics."""
    spec = importlib.util.find_spec("torchmetrics")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("torchmetrics, which ships the heads of LPIPS, is not installed")
    return Path(spec.origin).parent / "functional" / "image" / "lpips_models" / "vgg.pth"
