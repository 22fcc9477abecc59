"""Images of the page's answers: many decoded in a batch, as messages for the browser."""

import base64
import io
from collections.abc import Iterator, Mapping
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flextok.draws import NOISE, row_generators
from flextok.evaluation.metrics import psnr, sharpness
from flextok.evaluation.sweep import spread
from flextok.images import to_image
from flextok.pipeline import batches_of
from flextok.tokenizers.base import Tokenizer, decode_rows

MAX_SEED = 2**31 - 1
SEEDS = 6  # decodings or variations of the same tokens, side by side
MOST_SPREAD = 96.0  # of 255 levels: where the colours of the map of differences end
PIXELS_AT_ONCE = 2**17  # of the images that are decoded in one batch: 32 of 64 x 64


class Decoder:
    """Decodes prefixes of one image's tokens, many in a batch, into parts of an answer."""

    def __init__(self, tokenizer: Tokenizer, options: Mapping[str, Any], seed: int):
        self.tokenizer, self.seed = tokenizer, seed
        self.options = tokenizer.decode_options(options)
        self.most = max(1, PIXELS_AT_ONCE // tokenizer.image_size**2)
        self.made: dict[int, Tensor] = {}  # by number of tokens, (3, H, W) of the first seed

    def images(self, encoded: Tensor, lengths: list[int], seeds: list[int]) -> Tensor:
        """encoded: (1, K) or (n, K) indices or (1, K, C) codes. Returns one image for each of n
        lengths and seeds, (n, 3, H, W) in [-1, 1] on the CPU."""
        rows = encoded.expand(len(lengths), *encoded.shape[1:])
        draws = [row_generators(seed % (MAX_SEED + 1), NOISE, [0])[0] for seed in seeds]
        keep = torch.tensor(lengths) if self.tokenizer.ordered else None
        return decode_rows(self.tokenizer, rows, self.options, draws, keep).cpu()

    def prefixes(
        self, encoded: Tensor, lengths: list[int], original: Tensor | None = None
    ) -> Iterator[dict[str, Any]]:
        """The image of each number of tokens; beside an original, (1, 3, H, W), how good it is."""
        for part in batches_of(len(lengths), self.most):
            some = lengths[part.start : part.stop]
            images = self.images(encoded, some, [self.seed] * len(some))
            self.made.update(zip(some, images, strict=True))
            frames = list(map(frame, some, [self.seed] * len(some), images))
            if original is not None:
                edges, ratios = sharpness(original), sharpness(images)
                decibels = psnr(images, original.expand_as(images))
                for shown, ratio, value in zip(frames, ratios, decibels, strict=True):
                    shown["sharp"] = (ratio / edges).item() if edges else None
                    shown["psnr"] = value.item()
            yield {"frames": frames}

    def seeds(self, encoded: Tensor, lengths: list[int]) -> Iterator[dict[str, Any]]:
        """For each number of tokens, images of further seeds and a map of how far they differ."""
        others = [self.seed + number for number in range(1, SEEDS)]
        for k in lengths if self.tokenizer.stochastic else []:
            images = self.images(encoded, [k] * len(others), others)
            frames = list(map(frame, [k] * len(others), others, images))
            yield {"frames": frames, "map": spread_map(k, torch.stack([self.made[k], *images]))}


def frame(k: int, seed: int | str, image: Tensor) -> dict[str, Any]:
    """seed: what tells the images of k tokens apart."""
    return {"k": k, "seed": seed, "url": data_url(to_image(image))}


def spread_map(k: int, images: Tensor) -> dict[str, Any]:
    """images: (n, 3, H, W) in [-1, 1]. How far they differ, pixel by pixel, as an image."""
    levels = spread(images[None])[0]  # (H, W)
    colours = matplotlib.colormaps["inferno"]((levels / MOST_SPREAD).clamp(max=1).numpy())
    chart = Image.fromarray((colours[..., :3] * 255).astype(np.uint8))
    return {"k": k, "url": data_url(chart), "mean": levels.mean().item()}


def listed(encoded: Tensor) -> list[int]:
    """The indices of an image; none of a continuous tokenizer's codes."""
    return [] if encoded.is_floating_point() else encoded[0].tolist()


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
