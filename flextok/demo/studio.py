"""What the page can do, without the page: models loaded once, pictures in and out."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from flextok.data.transforms import center_crop, to_image, to_tensor
from flextok.evaluation import adaptive
from flextok.evaluation.metrics import psnr
from flextok.evaluation.report import MAX_PSNR
from flextok.generators.conditioning import NULL_CLASS, ClassConditioner, TextConditioner
from flextok.pipeline import (
    decodable_lengths,
    grow_images,
    is_generator,
    load_model,
    load_tokenizer_of,
    reconstruct_prefixes,
)

MAX_STEPS, MAX_GUIDANCE, MAX_SEED, MAX_PROMPT = 100, 30, 2**31 - 1, 500
NO_CLASS = "any"


@dataclass(frozen=True)
class Settings:
    """A client's wishes; None = the model's own. Raises ValueError out of range, whatever their
    type."""

    seed: Any = 0
    steps: Any = None
    guidance: Any = None

    def __post_init__(self) -> None:
        check_number("seed", self.seed, 0, MAX_SEED)
        if self.steps is not None:
            check_number("steps", self.steps, 1, MAX_STEPS)
        if self.guidance is not None:
            check_number("guidance", self.guidance, 0, MAX_GUIDANCE, whole=False)


@dataclass
class Voice:
    """A generator with the tokenizer that it speaks."""

    name: str
    generator: Any
    tokenizer: Any
    classes: list[str] = field(default_factory=list)  # empty: it reads prompts, or nothing

    @property
    def reads_text(self) -> bool:
        return isinstance(self.generator.conditioner, TextConditioner)

    @property
    def lengths(self) -> list[int]:
        return decodable_lengths(self.tokenizer, self.generator.num_tokens)

    def condition(self, wish: object) -> Any:
        """A class name or prompt as the generator takes it. Raises ValueError."""
        if self.reads_text:
            if not isinstance(wish, str) or len(wish) > MAX_PROMPT:
                raise ValueError(f"a prompt is a text of at most {MAX_PROMPT} characters")
            return [wish]
        if wish not in (*self.classes, NO_CLASS):
            raise ValueError("no such class: choose one of the list")
        label = self.classes.index(str(wish)) if wish in self.classes else NULL_CLASS
        return torch.tensor([label])

    def grow(
        self, wish: object, settings: Settings, tokens: Any, steps: Any, every_token: bool = False
    ) -> Iterator[tuple[int, Image.Image]]:
        """(number of tokens, picture) of the first tokens, then of more, up to `tokens`. settings:
        of the generator; steps: of the decoder."""
        decoding = Settings(steps=steps)
        most = self.generator.num_tokens
        tokens = int(check_number("tokens", tokens, 1, most))
        lengths = [k for k in self.lengths if k < tokens] + [tokens]
        if every_token and len(self.lengths) > 1:
            lengths = list(range(1, tokens + 1))
        sampling = {"guidance_scale": settings.guidance, "num_steps": settings.steps}
        frames = grow_images(
            self.generator,
            self.tokenizer,
            self.condition(wish),
            lengths,
            int(settings.seed),
            sampling,
            {"num_steps": decoding.steps},
        )
        for k, pictures in frames:
            yield k, to_image(pictures[0])


class Studio:
    """A tokenizer to take pictures apart, and generators that make new ones."""

    def __init__(self, names: list[str], device: str = "cpu"):
        """names: folders or hub ids. The first tokenizer among them is the one to reconstruct with,
        else the first generator's."""
        self.voices: list[Voice] = []
        self.tokenizer: Any = None
        for name in names:
            model = load_model(name, device)
            if not is_generator(model):
                self.tokenizer = self.tokenizer or model
                continue
            tokenizer = load_tokenizer_of(model, name, device=device)
            self.voices.append(Voice(name, model, tokenizer, class_names(model)))
        self.tokenizer = self.tokenizer or self.voices[0].tokenizer

    @property
    def lengths(self) -> list[int]:
        return decodable_lengths(self.tokenizer)

    @property
    def draws(self) -> bool:
        """Whether decoding draws: a flow decoder has seeds, steps and guidance; others have not."""
        return hasattr(self.tokenizer, "noise_shape")

    def crop(self, picture: Image.Image) -> Image.Image:
        """The square that the tokenizer sees."""
        return center_crop(picture, self.tokenizer.image_size)

    def reconstruct(
        self, image: Image.Image, tokens: Any, settings: Settings
    ) -> tuple[Image.Image, float]:
        """image: as crop() returns it. Returns its reconstruction and the PSNR in dB."""
        tokens = int(check_number("tokens", tokens, 1, self.tokenizer.num_tokens))
        images = to_tensor(image)[None]
        made = reconstruct_prefixes(
            self.tokenizer, images, [tokens], int(settings.seed), self.decoding(settings)
        )[tokens].cpu()
        return to_image(made[0]), min(MAX_PSNR, psnr(made, images).item())

    def filmstrip(
        self, image: Image.Image, settings: Settings
    ) -> Iterator[tuple[int, Image.Image, float]]:
        """(tokens, reconstruction, PSNR) for 1, 2, 4, ... tokens."""
        for k in self.lengths:
            yield (k, *self.reconstruct(image, k, settings))

    def seeds(
        self, image: Image.Image, tokens: Any, settings: Settings, number: int = 4
    ) -> Iterator[tuple[int, Image.Image]]:
        """(seed, reconstruction) for several seeds from settings.seed on: what the tokens leave
        open differs."""
        for seed in range(int(settings.seed), int(settings.seed) + number):
            draw = Settings(seed % (MAX_SEED + 1), settings.steps, settings.guidance)
            yield seed, self.reconstruct(image, tokens, draw)[0]

    def need(self, image: Image.Image, target: Any, settings: Settings) -> str:
        """How many tokens the picture needs for a PSNR of `target` dB, in a sentence."""
        if len(self.lengths) == 1 or not self.tokenizer.vocab_size:
            raise ValueError("this tokenizer always needs all of its tokens")
        value = check_number("the PSNR asked for", target, 0, MAX_PSNR, whole=False)
        found = adaptive.encode(
            self.tokenizer,
            to_tensor(image)[None],
            adaptive.Target("psnr", value),
            seed=int(settings.seed),
            decoding=self.decoding(settings),
        )
        keep, total = int(found.keep[0]), self.tokenizer.num_tokens
        if not found.met[0]:
            return f"{value:g} dB is out of reach: {found.reason[0]}"
        return f"{keep} of {total} tokens are enough for {value:g} dB: {found.reason[0]}"

    def decoding(self, settings: Settings) -> dict[str, Any]:
        wishes = {"num_steps": settings.steps, "guidance_scale": settings.guidance}
        return {k: v for k, v in wishes.items() if v is not None} if self.draws else {}


def class_names(generator: Any) -> list[str]:
    """Those in its metadata, else numbers; none for a generator that knows no classes."""
    if not isinstance(generator.conditioner, ClassConditioner):
        return []
    known = generator.metadata.get("class_names", [])
    return list(known) or [str(i) for i in range(generator.conditioner.num_classes)]


def check_number(what: str, value: Any, low: float, high: float, whole: bool = True) -> Any:
    """The value. Raises ValueError unless it is a number in [low, high]."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{what} must be {kind} from {low:g} to {high:g}")
    return value
