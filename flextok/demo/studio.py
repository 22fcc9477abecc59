"""What the page can do, without the page: models loaded once, one request in, images out."""

import base64
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flextok.demo.upload import Limits, megabytes, read_picture
from flextok.draws import NOISE, row_generators
from flextok.emoji.captions import noun_phrase
from flextok.emoji.datasets import Emoji, select_records
from flextok.emoji.scenes import COLORS
from flextok.evaluation.metrics import psnr, sharpness
from flextok.evaluation.sweep import spread
from flextok.generators.base import Generator
from flextok.generators.conditioning import TextConditioner
from flextok.images import center_crop, to_image, to_tensor
from flextok.pipeline import decodable_lengths, grow_indices, load_token_model, load_tokenizer_of
from flextok.places import list_models
from flextok.schema import Bounds, check_number, unknown_key
from flextok.tokenizers.base import Tokenizer, decode_rows, encode_rows, same_codes

MAX_SEED, MAX_PROMPT = 2**31 - 1, 500
SEEDS = 6  # decodings of the same tokens, side by side
MOST_SPREAD = 96.0  # of 255 levels: where the colours of the map of differences end
PIXELS_AT_ONCE = 2**17  # of the images that are decoded in one batch: 32 of 64 x 64
FIELDS: dict[str, tuple[str, float, float]] = {  # options that a client may set, and their range
    "num_steps": ("steps", 1, 100),
    "guidance_scale": ("guidance", 0, 10),
}
EXAMPLES = [  # emoji that the package's models were not trained on
    *("desert island", "tangerine", "magnet", "T-Rex", "slightly smiling face", "hibiscus"),
    *("gem stone", "motorcycle", "hot beverage", "game die", "classical building", "penguin"),
]
CLASSES = ["heart", "face-smiling", "food-fruit", "plant-flower", "transport-ground", "tool"]
PROMPTS = ["a red heart", "a fish", "a guitar", "a strawberry on a cream background"]
PROMPTS.append("a banana above an evergreen tree on a light blue background")


@dataclass
class Asked:
    """One request. source: the number of a source; value: its picture as a data URL or the name of
    an example, its class or its prompt; decoding, sampling: options by name, of FIELDS."""

    source: Annotated[int, Bounds(0, 1000)]
    value: str
    seed: Annotated[int, Bounds(0, MAX_SEED)] = 0
    decoding: dict[str, int | float] = field(default_factory=dict)
    sampling: dict[str, int | float] = field(default_factory=dict)


@dataclass
class Source:
    """What images come from: a picture, or a generator. The tokenizer decodes its tokens."""

    name: str
    tokenizer: Tokenizer
    generator: Generator | None = None

    @property
    def kind(self) -> str:
        if self.generator is None:
            return "picture"
        if isinstance(self.generator.conditioner, TextConditioner):
            return "prompt"
        return "class" if self.generator.conditioner.num_classes else "none"

    @property
    def num_tokens(self) -> int:
        return (self.generator or self.tokenizer).num_tokens

    @property
    def is_own(self) -> bool:
        """Whether the model comes with the package, and was trained on emoji."""
        return self.name in list_models()

    def lengths(self) -> list[int]:
        """The numbers of tokens to decode: 1 to 16, then eight in each doubling."""
        lengths, k = [], 1
        while k < self.num_tokens and self.tokenizer.ordered:
            lengths.append(k)
            k += max(1, (1 << k.bit_length()) >> 4)
        return [*lengths, self.num_tokens]

    def describe(self) -> dict[str, Any]:
        """What the page needs to know."""
        own = {"class": CLASSES, "prompt": PROMPTS}.get(self.kind, [])
        generating = self.generator.generate_defaults if self.generator else None
        classes = self.generator.class_names if self.generator and self.kind == "class" else []
        return {
            "name": self.name,
            "kind": self.kind,
            "own": self.is_own,
            "size": self.tokenizer.image_size,
            "vocabulary": self.tokenizer.vocab_size,
            "bits": math.ceil(math.log2(self.tokenizer.vocab_size or 1)),
            "lengths": self.lengths(),
            "film": decodable_lengths(self.tokenizer, self.num_tokens),
            "seeds": SEEDS if self.tokenizer.stochastic else 1,
            "classes": classes,
            "examples": own if self.is_own else [],
            "fields": {
                "decoding": fields(self.tokenizer.decode_defaults),
                "sampling": fields(generating),
            },
        }


class Studio:
    """A tokenizer that reconstructs a user's picture, and generators that make new images."""

    def __init__(self, names: list[str], device: str = "cpu"):
        """names: names, folders or hub ids. The first tokenizer among them reconstructs, else the
        first generator's. A generator's indices are decoded by the first tokenizer of its codes."""
        models = [(name, load_token_model(name, device)) for name in names]
        tokenizers = [(name, model) for name, model in models if isinstance(model, Tokenizer)]
        self.sources: list[Source] = []
        for name, model in models:
            if isinstance(model, Generator):
                of_codes = [own for _, own in tokenizers if same_codes(model.metadata, own)]
                if not of_codes:
                    of_codes = [load_tokenizer_of(model, name, device=device)]
                    tokenizers.append((str(model.metadata.get("tokenizer", name)), of_codes[0]))
                self.sources.append(Source(name, of_codes[0], model))
        self.sources.insert(0, Source(*tokenizers[0]))
        emoji = Emoji("validation")
        by_name = {record.name: number for number, record in enumerate(emoji.records)}
        self.examples = {name: emoji[by_name[name]]["image"] for name in EXAMPLES}

    def describe(self, limits: Limits) -> dict[str, Any]:
        """What the page shows before anything is asked."""
        return {
            "sources": [source.describe() for source in self.sources],
            "examples": {name: data_url(image) for name, image in self.examples.items()},
            "max_bytes": limits.max_bytes,
            "max_name": megabytes(limits.max_bytes),
        }

    def draw(self, asked: Asked, limits: Limits) -> Iterator[dict[str, Any]]:
        """The answer to a request in parts, as soon as each is there. Raises ValueError for what
        the client did wrong, with the first part."""
        if asked.source >= len(self.sources):
            raise ValueError(f"source={asked.source} must be below {len(self.sources)}")
        source = self.sources[asked.source]
        decoder = Decoder(source.tokenizer, checked("decoding", asked.decoding), asked.seed)
        if source.generator is None:
            yield from self.reconstruct(source, decoder, asked, limits)
        else:
            yield from generate(source.generator, source, decoder, asked)

    def reconstruct(
        self, source: Source, decoder: "Decoder", asked: Asked, limits: Limits
    ) -> Iterator[dict[str, Any]]:
        picture = self.examples.get(asked.value) or read_picture(asked.value, limits)
        crop = center_crop(picture, *source.tokenizer.shapes[0])
        original = to_tensor(crop)[None]
        encoded = encode_rows(source.tokenizer, original, asked.seed, [0])
        yield {"original": data_url(crop), "indices": listed(encoded)}
        film = decodable_lengths(source.tokenizer)
        yield from decoder.prefixes(encoded, film, original)
        rest = [k for k in source.lengths() if k not in film]
        yield from decoder.prefixes(encoded, rest, original)
        yield from decoder.seeds(encoded, film)


def generate(
    generator: Generator, source: Source, decoder: "Decoder", asked: Asked
) -> Iterator[dict[str, Any]]:
    condition: Any = [asked.value]
    if source.kind == "none":
        condition = torch.zeros(1)
    if source.kind == "prompt":
        if len(asked.value) > MAX_PROMPT:
            raise ValueError(f"a prompt has at most {MAX_PROMPT} characters")
        if source.is_own and (unknown := unknown_words(asked.value)):
            words = ", ".join(unknown)
            yield {"note": f"The model was not trained on: {words}. It draws something else."}
    lengths, sampling = source.lengths(), checked("sampling", asked.sampling)
    for indices in grow_indices(generator, condition, lengths, asked.seed, sampling):
        yield {"indices": listed(indices)}
        yield from decoder.prefixes(indices, [indices.shape[1]])
    if not generator.streams:
        yield from decoder.prefixes(indices, lengths[:-1])
    yield from decoder.seeds(indices, decodable_lengths(source.tokenizer, source.num_tokens))


class Decoder:
    """Decodes prefixes of one image's tokens, many in a batch, into parts of an answer."""

    def __init__(self, tokenizer: Tokenizer, options: Mapping[str, Any], seed: int):
        self.tokenizer, self.seed = tokenizer, seed
        self.options = tokenizer.decode_options(options)
        self.most = max(1, PIXELS_AT_ONCE // tokenizer.image_size**2)
        self.made: dict[int, Tensor] = {}  # by number of tokens, (3, H, W) of the first seed

    def images(self, encoded: Tensor, lengths: list[int], seeds: list[int]) -> Tensor:
        """encoded: (1, K) indices or (1, K, C) codes. Returns one image for each length and seed,
        (n, 3, H, W) in [-1, 1] on the CPU."""
        rows = encoded.expand(len(lengths), *encoded.shape[1:])
        draws = [row_generators(seed % (MAX_SEED + 1), NOISE, [0])[0] for seed in seeds]
        keep = torch.tensor(lengths) if self.tokenizer.ordered else None
        return decode_rows(self.tokenizer, rows, self.options, draws, keep).cpu()

    def prefixes(
        self, encoded: Tensor, lengths: list[int], original: Tensor | None = None
    ) -> Iterator[dict[str, Any]]:
        """The image of each number of tokens; beside an original, (1, 3, H, W), how good it is."""
        for start in range(0, len(lengths), self.most):
            some = lengths[start : start + self.most]
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
            levels = spread(torch.stack([self.made[k], *images])[None])[0]  # (H, W)
            colours = matplotlib.colormaps["inferno"]((levels / MOST_SPREAD).clamp(max=1).numpy())
            chart = Image.fromarray((colours[..., :3] * 255).astype(np.uint8))
            yield {
                "frames": list(map(frame, [k] * len(others), others, images)),
                "map": {"k": k, "url": data_url(chart), "mean": levels.mean().item()},
            }


def frame(k: int, seed: int, image: Tensor) -> dict[str, Any]:
    return {"k": k, "seed": seed, "url": data_url(to_image(image))}


def listed(encoded: Tensor) -> list[int]:
    """The indices of an image; none of a continuous tokenizer's codes."""
    return [] if encoded.is_floating_point() else encoded[0].tolist()


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def fields(defaults: object) -> list[dict[str, Any]]:
    """The options among FIELDS that a model has, for a form. A model that works without guidance
    has not been made for it."""
    own = {} if defaults is None else vars(defaults)
    return [
        {"name": name, "label": label, "low": low, "high": high, "value": own[name]}
        for name, (label, low, high) in FIELDS.items()
        if name in own and not (name == "guidance_scale" and own[name] == 1)
    ]


def checked(what: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
    """Options that a client set. Raises ConfigError for others than FIELDS and out of range."""
    for name, value in asked.items():
        if name not in FIELDS:
            raise unknown_key(f"{what} option", name, list(FIELDS))
        check_number(f"{what} {FIELDS[name][0]}", value, *FIELDS[name][1:], name == "num_steps")
    return asked


def unknown_words(prompt: str) -> list[str]:
    """Words of a prompt that emoji-text never saw: in no name of an emoji that it was trained on
    and in no caption of a scene."""
    texts = [noun_phrase(record.name) for record in select_records("train")]
    known = words([*texts, *COLORS, "a an on left of above background gradient from to"])
    return [word for word in words([prompt]) if not {word, word.removesuffix("s")} & known.keys()]


def words(texts: Iterable[str]) -> dict[str, None]:
    """In the order of their first use."""
    return dict.fromkeys(word for text in texts for word in re.findall(r"\w+", text.casefold()))
