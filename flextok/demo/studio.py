"""What the page can do, without the page: models loaded once, one request in, images out."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from flextok.demo.decoder import SEEDS, Decoder, data_url, frame, listed, spread_map
from flextok.demo.source import Asked, Source, checked
from flextok.demo.upload import Limits, megabytes, read_picture
from flextok.editing import interpolate, mix, vary
from flextok.emoji.alignment import caption_facts, scene_verifier
from flextok.emoji.datasets import Emoji
from flextok.emoji.probe import packaged_probe
from flextok.emoji.scenes import EmojiScenes
from flextok.generators import GPT
from flextok.generators.base import Generator
from flextok.images import center_crop, to_image, to_tensor
from flextok.pipeline import (
    batches_of,
    decodable_lengths,
    grow_indices,
    load_token_model,
    load_tokenizer_of,
)
from flextok.tokenizers.base import Tokenizer, encode_rows, same_codes
from flextok.tree_search import Verifier, best_path, check_budget, grow_trees, likelihood

EXAMPLES = [  # emoji that the package's models were not trained on
    *("desert island", "tangerine", "magnet", "T-Rex", "slightly smiling face", "hibiscus"),
    *("gem stone", "motorcycle", "hot beverage", "game die", "classical building", "penguin"),
]
WEIGHTS = [i / (SEEDS - 1) for i in range(SEEDS)]  # of the second picture, from none to all
AT_ONCE = 8  # candidates of a search, after which another request has its turn
BEAMS = 2


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
        if asked.task not in source.tasks:
            known = ", ".join(source.tasks)
            raise ValueError(f"task={asked.task!r} is not for {source.name}, which has: {known}")
        decoder = Decoder(source.tokenizer, checked("decoding", asked.decoding), asked.seed)

        def encode(value: str) -> tuple[Tensor, Tensor]:
            """value: a picture, as of Asked. Returns it as the model gets it, (1, 3, H, W) in
            [-1, 1], and its indices (1, K), or codes."""
            picture = self.examples.get(value) or read_picture(value, limits)
            image = to_tensor(center_crop(picture, *source.tokenizer.shapes[0]))[None]
            return image, encode_rows(source.tokenizer, image, asked.seed, [0])

        if asked.task == "edit":
            image, kept = encode(asked.kept)
            shown = {"original": data_url(to_image(image[0])), "indices": listed(kept)}
            if source.generator is None:
                other, second = encode(asked.value)
                row = [f"{weight:.0%}" for weight in WEIGHTS]
                yield {**shown, "other": data_url(to_image(other[0])), "row": row}
                yield from blend(source, decoder, kept, second)
            else:
                condition = source.condition(asked.value)
                sampling = checked("sampling", asked.sampling)
                yield shown
                yield from source.notes(asked.value)
                generator = source.generator
                yield from vary_picture(generator, source, decoder, condition, sampling, kept)
        elif source.generator is None:
            yield from reconstruct(source, decoder, *encode(asked.value))
        elif asked.task == "search":
            yield from search(source.generator, source, decoder, asked)
        else:
            yield from generate(source.generator, source, decoder, asked)


def reconstruct(
    source: Source, decoder: Decoder, original: Tensor, encoded: Tensor
) -> Iterator[dict[str, Any]]:
    yield {"original": data_url(to_image(original[0])), "indices": listed(encoded)}
    yield from show_prefixes(source, decoder, encoded, original)


def show_prefixes(
    source: Source, decoder: Decoder, encoded: Tensor, original: Tensor | None = None
) -> Iterator[dict[str, Any]]:
    """The images of an image's tokens, those of the filmstrip first, then those of other seeds."""
    film = decodable_lengths(source.tokenizer, source.num_tokens)
    yield from decoder.prefixes(encoded, film, original)
    rest = [k for k in source.lengths() if k not in film]
    yield from decoder.prefixes(encoded, rest, original)
    yield from decoder.seeds(encoded, film)


def generate(
    generator: Generator, source: Source, decoder: Decoder, asked: Asked
) -> Iterator[dict[str, Any]]:
    condition, sampling = source.condition(asked.value), checked("sampling", asked.sampling)
    yield from source.notes(asked.value)
    lengths = source.lengths()
    for indices in grow_indices(generator, condition, lengths, asked.seed, sampling):
        yield {"indices": listed(indices)}
        yield from decoder.prefixes(indices, [indices.shape[1]])
    if not generator.streams:
        yield from decoder.prefixes(indices, lengths[:-1])
    yield from decoder.seeds(indices, decodable_lengths(source.tokenizer, source.num_tokens))


def search(
    generator: Generator, source: Source, decoder: Decoder, asked: Asked
) -> Iterator[dict[str, Any]]:
    """The candidates as they come, then the best of them as generate() shows an image."""
    assert isinstance(generator, GPT), "Source.tasks has search for no other"
    condition, total = source.condition(asked.value), generator.num_tokens
    verifier, name = make_verifier(generator, source, asked.value)
    levels = [total] if asked.method == "best" else sorted({-(-total // 16), -(-total // 4), total})
    beams = min(BEAMS, max(1, asked.budget // len(levels)))
    check_budget(asked.budget, beams, 0, len(levels))
    sampling = checked("sampling", asked.sampling)
    yield from source.notes(asked.value)
    yield {"verifier": name}
    done = 0
    for _, tree, images in grow_trees(
        generator,
        source.tokenizer,
        condition,
        verifier,
        lengths=levels,
        budget=asked.budget,
        beams=beams,
        seed=asked.seed,
        sampling=sampling,
        decoding=asked.decoding,
        batch_size=min(AT_ONCE, decoder.most),
    ):
        level = tree[-1]
        done += len(images)
        found = [
            {
                "parent": int(level.parents[0, i]),
                "score": float(level.scores[0, i]),
                "url": data_url(to_image(level.images[0, i])),
            }
            for i in range(level.scores.shape[1] - len(images), level.scores.shape[1])
        ]
        shown = {"number": len(tree) - 1, "k": level.num_tokens, "found": found}
        yield {"level": shown, "done": done, "budget": asked.budget}
    path = best_path(tree, 0)
    indices = tree[-1].indices[:, path[-1]]  # (1, K)
    yield {"path": path, "indices": listed(indices)}
    yield from show_prefixes(source, decoder, indices)


def make_verifier(generator: GPT, source: Source, value: str) -> tuple[Verifier, str]:
    """What scores candidates, and its name: the classifier of scenes, for prompts of the package's
    model that name what it was trained on, else the generator itself."""
    probe, size = packaged_probe(), source.tokenizer.image_size
    if source.is_own and source.kind == "prompt" and probe.image_size == size:
        scenes = EmojiScenes(max_objects=2, vocabulary="basic")
        with contextlib.suppress(ValueError):  # of a prompt that does not describe such a scene
            caption_facts(value, scenes)
            return scene_verifier(probe, scenes), "scenes"
    return likelihood(generator), "likelihood"


def blend(
    source: Source, decoder: Decoder, first: Tensor, second: Tensor
) -> Iterator[dict[str, Any]]:
    """The first k tokens of one picture with the others of another, (1, K) indices each, for every
    k; then for some k images between both, from averages of the codes of their first k tokens."""
    lengths, total = source.lengths(), source.num_tokens
    for part in batches_of(len(lengths), decoder.most):
        some = lengths[part.start : part.stop]
        mixed = torch.cat([mix(first, second, k) for k in some])
        images = decoder.images(mixed, [total] * len(some), [decoder.seed] * len(some))
        yield {"frames": list(map(frame, some, [decoder.seed] * len(some), images))}
    for k in decodable_lengths(source.tokenizer):
        between = interpolate(source.tokenizer, first[:, :k], second[:, :k], WEIGHTS)
        images = decoder.images(between, [k] * SEEDS, [decoder.seed] * SEEDS)
        yield {"frames": [frame(k, f"{w:.0%}", x) for w, x in zip(WEIGHTS, images, strict=True)]}


def vary_picture(
    generator: Generator,
    source: Source,
    decoder: Decoder,
    condition: Any,
    sampling: Mapping[str, Any],
    kept: Tensor,
) -> Iterator[dict[str, Any]]:
    """For some k, images whose first k tokens are those of a picture, (1, K) indices, and whose
    others are generated. All are decoded from the same noise, so that only the tokens differ."""
    seed, film = decoder.seed, decodable_lengths(source.tokenizer, source.num_tokens)
    lengths = film[:-1] or film
    yield {"lengths": lengths, "row": [seed + i for i in range(SEEDS)]}
    for k in lengths:
        rows = vary(generator, condition, kept[:, :k], SEEDS, seed=seed, sampling=sampling)
        images = decoder.images(rows, [source.num_tokens] * SEEDS, [seed] * SEEDS)
        frames = [frame(k, seed + i, image) for i, image in enumerate(images)]
        yield {"frames": frames, "map": spread_map(k, images)}
