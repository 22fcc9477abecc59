"""What images of the page come from, and what may be asked of it."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch

from flextok.demo.decoder import MAX_SEED, SEEDS
from flextok.emoji.captions import noun_phrase
from flextok.emoji.datasets import select_records
from flextok.emoji.scenes import COLORS
from flextok.generators import GPT
from flextok.generators.base import Generator
from flextok.generators.conditioning import TextConditioner
from flextok.pipeline import decodable_lengths
from flextok.places import list_models
from flextok.schema import Bounds, check_number, unknown_key
from flextok.tokenizers.base import Tokenizer

MAX_PROMPT, MAX_BUDGET = 500, 64
FIELDS: dict[str, tuple[str, float, float]] = {  # options that a client may set, and their range
    "num_steps": ("steps", 1, 100),
    "guidance_scale": ("guidance", 0, 10),
}
CLASSES = ["heart", "face-smiling", "food-fruit", "plant-flower", "transport-ground", "tool"]
PROMPTS = ["a red heart", "a fish", "a guitar", "a strawberry on a cream background"]
PROMPTS.append("a banana above an evergreen tree on a light blue background")


@dataclass
class Asked:
    """One request. source: the number of a source; value: its picture as a data URL or the name of
    an example, its class or its prompt; kept: the picture to edit, whose first tokens are kept and
    the others come from the source; budget, method: of a search; decoding, sampling: options by
    name, of FIELDS."""

    source: Annotated[int, Bounds(0, 1000)]
    value: str
    task: Literal["look", "edit", "search"] = "look"
    kept: str = ""
    budget: Annotated[int, Bounds(2, MAX_BUDGET)] = 16
    method: Literal["best", "beam"] = "best"
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

    @property
    def tasks(self) -> list[str]:
        """What can be done with it: some tokenizers have no prefixes, or no indices, and a search
        asks a GPT how well its tokens fit a condition."""
        possible = ["look"]
        if self.tokenizer.ordered and self.tokenizer.vocab_size:
            possible += ["edit"] if self.generator is None or self.generator.streams else []
            possible += (
                ["search"] if isinstance(self.generator, GPT) and self.kind != "none" else []
            )
        return possible

    def condition(self, value: str) -> Any:
        """What its generator takes for one image. Raises ValueError."""
        if len(value) > MAX_PROMPT and self.kind == "prompt":
            raise ValueError(f"a prompt has at most {MAX_PROMPT} characters")
        condition = torch.zeros(1) if self.kind == "none" else [value]
        if self.generator is not None:
            self.generator.prepare(condition)  # raises for what it does not take
        return condition

    def notes(self, value: str) -> Iterator[dict[str, Any]]:
        """What to know of an image that it generates."""
        if self.kind == "prompt" and self.is_own and (unknown := unknown_words(value)):
            words = ", ".join(unknown)
            yield {"note": f"The model was not trained on: {words}. It draws something else."}

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
            "tasks": self.tasks,
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
