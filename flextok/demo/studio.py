"""What the page can do, without the page: models loaded once, images in and out. Numbers that a
client chooses arrive in the ranges of the page's fields; the models check them again."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from flextok.evaluation import adaptive
from flextok.evaluation.metrics import psnr, sharpness, ssim
from flextok.generators.base import Generator
from flextok.generators.conditioning import NULL_CLASS, ClassConditioner, TextConditioner
from flextok.images import center_crop, to_image, to_tensor
from flextok.pipeline import (
    decodable_lengths,
    grow_images,
    load_token_model,
    load_tokenizer_of,
    reconstruct_prefixes,
)
from flextok.tokenizers.base import Tokenizer

MAX_SEED, MAX_PROMPT = 2**31 - 1, 500


class Quality(NamedTuple):
    """How plausible a reconstruction is, as far as one image shows it, and how faithful."""

    sharpness: float | None  # over the original's; None where that has no edges
    psnr: float  # dB
    ssim: float

    @classmethod
    def of(cls, made: Tensor, original: Tensor) -> "Quality":
        """made, original: (1, 3, H, W) in [-1, 1]."""
        edges = sharpness(original).item()
        ratio = sharpness(made).item() / edges if edges else None
        return cls(ratio, psnr(made, original).item(), ssim(made, original).item())

    def caption(self, long: bool = False) -> str:
        """Two lines, of how plausible and how faithful it is."""
        ratio = "-" if self.sharpness is None else f"{self.sharpness:.2f}"
        if long:
            faithful = f"faithful: {self.psnr:.1f} dB, SSIM {self.ssim:.2f}"
            return f"plausible: sharpness {ratio}\n{faithful}"
        return f"sharp {ratio}\n{self.psnr:.1f} dB"


@dataclass
class Pair:
    """A generator with the tokenizer that decodes its indices."""

    name: str
    generator: Generator
    tokenizer: Tokenizer

    @property
    def reads_text(self) -> bool:
        return isinstance(self.generator.conditioner, TextConditioner)

    @property
    def lengths(self) -> list[int]:
        return decodable_lengths(self.tokenizer, self.generator.num_tokens)

    @property
    def classes(self) -> list[tuple[str, int]]:
        """(name, label) of the classes that it knows, and of none."""
        names: list[str] = []
        if isinstance(self.generator.conditioner, ClassConditioner):
            known = self.generator.metadata.get("class_names", [])
            names = known or [str(i) for i in range(self.generator.conditioner.num_classes)]
        return [*((name, label) for label, name in enumerate(names)), ("any", NULL_CLASS)]

    def grow(
        self,
        condition: str | int,
        tokens: int,
        every_token: bool = False,
        seed: int = 0,
        scale: float | None = None,
        num_steps: int | None = None,
        decoder_steps: int | None = None,
    ) -> Iterator[tuple[int, Image.Image]]:
        """(number of tokens, image) of the first tokens, then of more, up to `tokens`. condition: a
        prompt, or a class's label; num_steps: of the generator."""
        if self.reads_text and (not isinstance(condition, str) or len(condition) > MAX_PROMPT):
            raise ValueError(f"a prompt is a text of at most {MAX_PROMPT} characters")
        lengths = [*(k for k in self.lengths if k < tokens), int(tokens)]
        if every_token and len(self.lengths) > 1:
            lengths = list(range(1, int(tokens) + 1))
        frames = grow_images(
            self.generator,
            self.tokenizer,
            [str(condition)] if self.reads_text else torch.tensor([condition]),
            lengths,
            int(seed),
            {"guidance_scale": scale, "num_steps": num_steps},
            {"num_steps": decoder_steps} if self.tokenizer.stochastic else {},
        )
        for k, images in frames:
            yield k, to_image(images[0])


class Studio:
    """A tokenizer that reconstructs a user's picture, and generators that make new images."""

    def __init__(self, names: list[str], device: str = "cpu"):
        """names: folders or hub ids. The first tokenizer among them reconstructs, else the first
        generator's."""
        self.pairs: list[Pair] = []
        tokenizers: list[Tokenizer] = []
        for name in names:
            model = load_token_model(name, device)
            if isinstance(model, Tokenizer):
                tokenizers.append(model)
            else:
                self.pairs.append(Pair(name, model, load_tokenizer_of(model, name, device=device)))
        self.tokenizer = [*tokenizers, *(pair.tokenizer for pair in self.pairs)][0]
        self.lengths = decodable_lengths(self.tokenizer)

    def crop(self, picture: Image.Image) -> Image.Image:
        """The square that the tokenizer encodes."""
        return center_crop(picture, *self.tokenizer.shapes[0])

    def reconstruct(
        self,
        image: Image.Image,
        tokens: int,
        seed: int = 0,
        steps: int | None = None,
        scale: float | None = None,
    ) -> tuple[Image.Image, Quality]:
        """image: as crop() returns it; steps, scale: None = the model's own. Returns the
        reconstruction and how good it is."""
        k, images = int(tokens), to_tensor(image)[None]
        decoding = self.decoding(steps, scale)
        made = reconstruct_prefixes(self.tokenizer, images, [k], int(seed), decoding)[k].cpu()
        return to_image(made[0]), Quality.of(made, images)

    def filmstrip(
        self, image: Image.Image, *asked: Any
    ) -> Iterator[tuple[int, Image.Image, Quality]]:
        """(tokens, reconstruction, quality) for 1, 2, 4, ... tokens; asked: as of reconstruct."""
        for k in self.lengths:
            yield (k, *self.reconstruct(image, k, *asked))

    def seeds(
        self, image: Image.Image, tokens: int, seed: int = 0, *asked: Any
    ) -> Iterator[tuple[int, Image.Image]]:
        """(seed, reconstruction) for four seeds from `seed` on: what the tokens leave open
        differs."""
        for number in range(int(seed), int(seed) + 4):
            yield number, self.reconstruct(image, tokens, number % (MAX_SEED + 1), *asked)[0]

    def need(
        self,
        image: Image.Image,
        target: float,
        seed: int = 0,
        steps: int | None = None,
        scale: float | None = None,
    ) -> str:
        """How many tokens the image needs for a PSNR of `target` dB, in a sentence."""
        if len(self.lengths) == 1 or not self.tokenizer.vocab_size:
            raise ValueError("this tokenizer always needs all of its tokens")
        found = adaptive.encode(
            self.tokenizer,
            to_tensor(image)[None],
            adaptive.Target("psnr", target),
            seed=int(seed),
            decoding=self.decoding(steps, scale),
        )
        if not found.met[0]:
            return f"{target:g} dB is out of reach: {found.reason[0]}"
        enough = f"{int(found.keep[0])} of {self.tokenizer.num_tokens} tokens are enough"
        return f"{enough} for {target:g} dB: {found.reason[0]}"

    def decoding(self, steps: int | None, scale: float | None) -> dict[str, Any]:
        """Only a decoder that draws has steps and guidance."""
        return {"num_steps": steps, "guidance_scale": scale} if self.tokenizer.stochastic else {}
