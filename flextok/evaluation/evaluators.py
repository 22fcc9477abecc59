"""Evaluators: what can be measured of images, and the scores that follow from it.

An evaluator measures each image by itself, so that an evaluation can stream, be interrupted and be
shared among processes; its scores are computed from all images' rows. A new one is a class and a
line in EVALUATORS: it then runs from Python, from the command line and in training.

Scores answer two questions, which reports keep apart. Plausible: do the images look like the
data's, whichever they show? Faithful: does a reconstruction look like its original? Few tokens
leave much open, so the most faithful image of them is a blur, which is not plausible.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from flextok.evaluation.distances import (
    KID_SUBSET,
    MANIFOLD,
    Statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    mixed,
    precision_recall,
    statistics,
)
from flextok.evaluation.features import (
    CLIP,
    DINOv2,
    EfficientNetLite0,
    FeatureNetwork,
    Inception,
    load_lpips,
    vgg_file,
)
from flextok.evaluation.metrics import (
    cosine_distance,
    lpips,
    mse,
    psnr,
    sharpness,
    squared_distance,
    ssim,
    to_8_bit,
)
from flextok.evaluation.reference import MeasuredReference, Reference, few_images
from flextok.schema import unknown_key

PLAUSIBLE, FAITHFUL = "plausible", "faithful"


class Setting(NamedTuple):
    """What evaluators are made for."""

    device: torch.device
    dtype: torch.dtype
    vocab_size: int = 0  # of the tokenizer
    inception_weights: str | None = None  # a file; by default torch's hub cache
    weights: str | None = None  # of a network that is named with a place, such as dinov2:FOLDER
    download: bool = True  # whether weights may be, which a network that nobody named may not


@dataclass(frozen=True)
class Rows:
    """What was measured, by name: (n, ...) tensors with a row for each image."""

    made: Callable[[str], Tensor]  # of generated or reconstructed images
    real: Callable[[str], Tensor] | None  # of the real ones; None: there is a stored reference only
    paired: bool  # row i of `made` is the reconstruction of row i of `real`


class Evaluator:
    name: str
    # what measure() takes, (B, ...) each: "images", "originals" (of reconstructions), "indices",
    # and "captions" (texts, of prompts or of reconstructed images).
    # Where the originals are not needed, the real images are measured too.
    needs: ClassVar[tuple[str, ...]] = ("images",)
    measure: Callable[..., dict[str, Tensor]]  # -> the rows' columns by name
    group: ClassVar[str | None] = None  # PLAUSIBLE, FAITHFUL or neither: what its scores answer

    def group_of(self, score: str) -> str | None:
        """The group of a score, where they differ."""
        return self.group

    def scores(self, rows: Rows) -> dict[str, Any]:
        raise NotImplementedError

    def identity(self) -> dict[str, str]:
        """Weights and preprocessing, for the report."""
        return {}

    def warnings(self, rows: Rows) -> list[str]:
        """What a reader of the scores should be warned of."""
        return []


class Comparison(Evaluator):
    """The mean of a function that compares each reconstruction with its original."""

    needs, group = ("images", "originals"), FAITHFUL

    def __init__(
        self,
        name: str,
        compare: Callable[[Tensor, Tensor], Tensor],  # (B, 3, H, W) twice -> (B,)
        identity: Mapping[str, str] | None = None,
    ):
        self.name, self.compare, self.facts = name, compare, dict(identity or {})

    def measure(self, images: Tensor, originals: Tensor) -> dict[str, Tensor]:
        return {self.name: self.compare(images, originals)}

    def scores(self, rows: Rows) -> dict[str, float]:
        return {self.name: float(rows.made(self.name).double().mean())}

    def identity(self) -> dict[str, str]:
        return self.facts


class Sharpness(Evaluator):
    """The mean absolute gradient of grey values, over the real images'; below 1: blurred."""

    name, group = "sharpness", PLAUSIBLE

    def measure(self, images: Tensor) -> dict[str, Tensor]:
        return {"gradient": sharpness(images)}

    def scores(self, rows: Rows) -> dict[str, float]:
        real = 0.0 if rows.real is None else float(rows.real("gradient").double().mean())
        return {"sharpness": float(rows.made("gradient").double().mean()) / real} if real else {}


class FeatureDistances(Evaluator):
    """Distances between sets by the features of one network: Frechet and kernel distance, precision
    and recall, class scores. The same against a reference, if there is one beside the real images.
    And, of reconstructions, how far their features are from the original's: 1 - the cosine, and the
    squared Euclidean distance."""

    # what the scores are called when the features are Inception's own; others carry their network
    inception_names: ClassVar[dict[str, str]] = {
        "frechet_to_reference": "fid_to_reference",
        "kernel": "kid",
        "kernel_std": "kid_std",
        "kernel_to_reference": "kid_to_reference",
        "kernel_std_to_reference": "kid_std_to_reference",
        "precision_to_reference": "precision_to_reference",
        "recall_to_reference": "recall_to_reference",
        "class_score_10_shuffled": "inception_score_10_shuffled",  # torch-fidelity
        "class_score_10_shuffled_std": "inception_score_10_shuffled_std",
        "class_score_chunks_of_5000": "inception_score_chunks_of_5000",  # ADM
        "precision": "precision",
        "recall": "recall",
    }

    def __init__(self, network: FeatureNetwork):
        self.network, self.name = network, network.name
        # in place of the real images, or beside them
        self.reference: Reference | MeasuredReference | None = None

    def group_of(self, score: str) -> str:
        return FAITHFUL if score.startswith("feature_distance") else PLAUSIBLE

    def measure(self, images: Tensor) -> dict[str, Tensor]:
        features = self.network(to_8_bit(images))
        logits = {} if features.logits is None else {f"{self.name}/logits": features.logits}
        return {self.name: features.pooled, **logits}

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """a, b: (B, 3, H, W) in [-1, 1]. Returns 1 - the cosine of their features, (B,)."""
        return cosine_distance(*(self.network(to_8_bit(x)).pooled for x in (a, b)))

    def scores(self, rows: Rows) -> dict[str, float]:
        made = rows.made(self.name)
        real = None if rows.real is None else rows.real(self.name)
        ours, other = statistics(made), self.reference
        found: dict[str, float] = {}
        if real is not None:
            found = set_distances(made, ours, real, statistics(real))
            if rows.paired:
                found["feature_distance"] = float(cosine_distance(made, real).mean())
                found["feature_distance_squared"] = float(squared_distance(made, real).mean())
        if other is not None:
            apart = set_distances(made, ours, other.features, other.statistics)
            beside = "" if real is None else "_to_reference"
            found |= {f"{key}{beside}": value for key, value in apart.items()}
        assert found, "neither images nor a reference"
        if self.network.classifies:
            logits = rows.made(f"{self.name}/logits")
            shuffled = inception_score(logits, shuffle=True)
            found["class_score_10_shuffled"], found["class_score_10_shuffled_std"] = shuffled
            # ADM's images are in no order, where ours may be sorted by class
            found["class_score_chunks_of_5000"], _ = inception_score(mixed(logits), shuffle=False)
        names: dict[str, str] = {}
        if self.name.startswith("dinov2"):
            ends = ("", "_to_reference")
            names = {f"frechet{end}": f"fd_{self.name}{end}" for end in ends}
        if self.name == "inception":
            names = {"frechet": "rfid" if rows.paired else "gfid", **self.inception_names}
        return {names.get(k, f"{k}_{self.name}"): value for k, value in found.items()}

    def identity(self) -> dict[str, str]:
        return {"weights": self.network.weights, "preprocessing": self.network.preprocessing}

    def warnings(self, rows: Rows) -> list[str]:
        sets = {"evaluated set": rows.made(self.name)}
        if rows.real is not None:
            sets["real images"] = rows.real(self.name)
        found = [few_images(name, *features.shape) for name, features in sets.items()]
        if (least := min(map(len, sets.values()))) < KID_SUBSET:
            subset = f"fewer than a subset of {KID_SUBSET}"
            found.append(f"kernel distance over {least} images a side: {subset}")
        if max(map(len, sets.values())) > MANIFOLD:
            found.append(f"precision and recall by {MANIFOLD} images a side, drawn evenly")
        if self.name.startswith("inception_"):
            found.append(f"{self.name}: not the weights that FID is defined on")
        return [*filter(None, found), *(self.reference.warnings if self.reference else [])]


def set_distances(
    made: Tensor, ours: Statistics, other: Tensor | None, theirs: Statistics
) -> dict[str, float]:
    """made, other: features of two sets, (n, D) and (m, D), None where only their statistics are
    known."""
    found = {"frechet": frechet_distance(ours, theirs)}
    if other is not None:
        found["kernel"], found["kernel_std"] = kernel_distance(made, other)
        found["precision"], found["recall"] = precision_recall(made, other)
    return found


class CLIPScore(Evaluator):
    """100 times the mean cosine, at least 0 each, between an image and its caption in CLIP's
    embedding (CLIPScore, arXiv 2104.08718, with 100 in place of 2.5, as it is usually reported): of
    a generated image and its prompt, or of a reconstruction and the original's caption. Images
    without a caption do not count."""

    needs = ("images", "captions")

    def __init__(self, network: CLIP):
        self.network, self.name = network, network.name.replace("clip", "clip_score", 1)

    def measure(self, images: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        cosine = self.network(to_8_bit(images), captions).clamp_min(0)
        known = torch.tensor([bool(caption) for caption in captions], device=cosine.device)
        return {self.name: cosine.masked_fill(~known, math.nan)}

    def scores(self, rows: Rows) -> dict[str, float]:
        return {self.name: 100 * float(rows.made(self.name).double().nanmean())}

    def identity(self) -> dict[str, str]:
        return {"weights": self.network.weights, "preprocessing": self.network.preprocessing}


class CodeUse(Evaluator):
    """What the codes themselves carry: the share of the vocabulary that occurs, over all positions
    and at each, and the entropy at each position in bits; with n images none exceeds log2(n)."""

    name, needs = "codes", ("indices",)

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def measure(self, indices: Tensor) -> dict[str, Tensor]:
        return {"indices": indices.int()}

    def scores(self, rows: Rows) -> dict[str, Any]:
        indices = rows.made("indices")
        counts = count_codes(indices, self.vocab_size)
        total, bits = counts.sum(dim=0), entropy(counts)
        return {
            "vocab_size": self.vocab_size,
            "usage": float((total > 0).double().mean()),
            "perplexity": float(2 ** entropy(total)),
            "entropy_bits": float(bits.sum()),
            "largest_entropy_bits_measurable": math.log2(min(len(indices), self.vocab_size)),
            "usage_per_position": (counts > 0).double().mean(dim=1).tolist(),
            "entropy_bits_per_position": bits.tolist(),
        }


def count_codes(indices: Tensor, vocab_size: int) -> Tensor:
    """indices: (n, K). Returns how often each code stands at each position, (K, V) long."""
    num_tokens = indices.shape[1]
    places = indices.long() + torch.arange(num_tokens) * vocab_size
    return places.flatten().bincount(minlength=num_tokens * vocab_size).view(num_tokens, vocab_size)


def entropy(counts: Tensor) -> Tensor:
    """counts: (..., V). Returns the entropy of each distribution in bits, (...)."""
    p = counts.double() / counts.sum(dim=-1, keepdim=True)
    return -torch.xlogy(p, p).sum(dim=-1) / math.log(2)


def perceptual(setting: Setting) -> Comparison:
    if not setting.download and not vgg_file().is_file():
        raise ValueError(f"there is no {vgg_file()} (--networks lpips downloads it)")
    network = load_lpips(setting.device, setting.dtype)
    facts = {"weights": "VGG-16, LPIPS 0.1", "preprocessing": "none: own size"}
    return Comparison("lpips", partial(lpips, network), facts)


# name -> what makes it; None: there is nothing for it to measure
EVALUATORS: dict[str, Callable[[Setting], Evaluator | None]] = {
    "psnr": lambda setting: Comparison("psnr", psnr),
    "mse": lambda setting: Comparison("mse", mse),
    "ssim": lambda setting: Comparison("ssim", ssim),
    "sharpness": lambda setting: Sharpness(),
    "codes": lambda s: CodeUse(s.vocab_size) if s.vocab_size else None,
    "inception": lambda s: FeatureDistances(
        Inception(s.weights or s.inception_weights, s.device, s.dtype)
    ),
    "dinov2": lambda s: FeatureDistances(DINOv2(s.weights, s.device, s.dtype)),
    "clip": lambda s: CLIPScore(CLIP(s.weights, s.device, s.dtype)),
    "efficientnet_lite0": lambda s: FeatureDistances(EfficientNetLite0(s.device, s.dtype)),
    "efficientnet_lite0_native": lambda s: FeatureDistances(
        EfficientNetLite0(s.device, s.dtype, native=True)
    ),
    "lpips": perceptual,
}
# these need weights, so they are asked for
PLACED = ("inception", "dinov2", "clip")  # these may be named with a place, dinov2:FOLDER
NETWORKS = (*PLACED, "efficientnet_lite0", "efficientnet_lite0_native", "lpips")


def load_evaluators(
    networks: Sequence[str] | None, setting: Setting
) -> tuple[list[Evaluator], list[str]]:
    """All evaluators that need no weights, and the named ones; None takes those that papers report
    (Inception, LPIPS) or what is on this machine. Also returns a sentence for each that is left
    out. Raises ValueError for an unknown name and for a named one whose weights are not here."""
    always = [name for name in EVALUATORS if name not in NETWORKS]
    found = []
    for asked in dict.fromkeys([*always, *(networks or [])]):
        name, _, place = asked.partition(":")
        if name not in EVALUATORS:
            raise unknown_key("network", name, list(NETWORKS))
        if place and name not in PLACED:
            raise ValueError(f"network {asked!r} takes no place: only {', '.join(PLACED)} do")
        found.append(EVALUATORS[name](setting._replace(weights=place or None)))
    left_out: list[str] = []
    wanted = [] if networks is not None else ["inception", "lpips"]
    for name in wanted:
        try:
            found.append(EVALUATORS[name](setting._replace(download=False)))
        except ValueError as error:
            if name == "inception" and setting.inception_weights is not None:
                raise  # the file was named, so it must be there
            left_out.append(f"{name} is left out: {error}")
            if name == "inception":
                wanted.append("efficientnet_lite0_native")
    return [evaluator for evaluator in found if evaluator is not None], left_out
