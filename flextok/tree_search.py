"""Search for the indices whose image a verifier scores best, over prefixes of ordered tokens.

A prefix of ordered tokens decodes to an image, so that a verifier can score candidates before they
are complete ("(1D) Ordered Tokens Enable Efficient Test-Time Search", arXiv 2604.15453). One tree
covers the three methods: each level lengthens the best candidates of the level above to its number
of tokens, decodes and scores them. Best-of-N is the tree of one level, beam search has several, and
lookahead search scores a candidate by the image of its continuation.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from flextok.draws import NOISE, SEARCH, derived_generator, row_generators, uniforms
from flextok.generators import GPT, Generator
from flextok.generators.base import Asked, as_batch
from flextok.generators.text import Text, check_vocabulary, refuse_code, transformers_snapshot
from flextok.images import to_image
from flextok.nn.attention import KVCache
from flextok.nn.devices import Device, to_device
from flextok.pipeline import Options, batches_of
from flextok.places import is_path
from flextok.schema import check_number
from flextok.storage import CheckpointError
from flextok.tokenizers import Tokenizer
from flextok.tokenizers.base import Callback, decode_rows

GROWTH = 4  # of the number of tokens from one level to the next, without a generator


class Verifier(Protocol):
    """What scores candidates: any function of these arguments, such as those below."""

    def __call__(self, images: Tensor, cond: Any, indices: Tensor) -> Tensor:
        """images: (n, 3, H, W) float in [-1, 1]; cond: the condition of each as the search was
        given it, an (n,) tensor or a list of n; indices: (n, k) long, which the images were decoded
        from. Returns (n,) finite scores, of which a higher one is better."""
        ...


class Level(NamedTuple):
    """The candidates of one number of tokens, for B conditions."""

    num_tokens: int
    parents: Tensor  # (B, n) long, numbers in the level above; -1 in the first level
    indices: Tensor  # (B, n, k) long; k is above num_tokens where the search looks ahead
    images: Tensor  # (B, n, 3, H, W) in [-1, 1], decoded from the k indices
    scores: Tensor  # (B, n)


class Found(NamedTuple):
    """The best of all candidates that were decoded at full length, for each condition."""

    images: Tensor  # (B, 3, H, W) in [-1, 1]
    indices: Tensor  # (B, K) long
    scores: Tensor  # (B,)
    paths: list[list[int]]  # of each: the numbers of the candidates that lead there, by level
    decodes: int  # for each condition
    tree: list[Level]


def search(
    generator: Generator | None,
    tokenizer: Tokenizer,
    cond: Asked,
    verifier: Verifier,
    *,
    lengths: Sequence[int] | None = None,
    budget: int = 16,
    beams: int = 2,
    lookahead: int = 0,
    seed: int = 0,
    sampling: Options = None,
    decoding: Options = None,
    batch_size: int = 64,
    callback: Callback | None = None,
) -> Found:
    """Find the indices whose image the verifier scores best, for each of B conditions.

    generator: None draws every index with equal probability, a search without a generator. cond: as
    of generate(), or without a generator whatever the verifier reads, a list or a tensor of B.
    lengths: the numbers of tokens at which candidates are scored, rising; the last one is that of
    the result. One length makes it best-of-N with N = budget. Default: all tokens, best-of-N, which
    scored best with the package's generators; without a generator 1, 4, 16, ... and all. budget:
    decodes for each condition, spread evenly over the lengths. beams: how many candidates of a
    level are continued. lookahead: a candidate is scored by the image of its continuation to the
    length so many levels further on.

    Candidates of a condition are decoded from the same noise. They depend on seed and on the
    condition's number, not on batch_size, which is how many candidates are generated and decoded
    at once; those of one condition that others may continue are generated together. sampling,
    decoding: options of generate() and decode() by name. callback(n, images) is called after each
    batch of decodes, of which n were done. Raises ValueError, before the work, for arguments that
    do not fit."""
    trees: dict[int, list[Level]] = {}
    done = 0
    for first, tree, images in grow_trees(
        *(generator, tokenizer, cond, verifier, lengths, budget, beams, lookahead, seed),
        *(sampling, decoding, batch_size),
    ):
        trees[first] = tree
        done += len(images)
        if callback is not None:
            callback(done, images)
    levels = [joined(parts, dim=0) for parts in zip(*trees.values(), strict=True)]
    paths = [best_path(levels, row) for row in range(len(levels[0].scores))]
    ends = [(levels[len(path) - 1], row, path[-1]) for row, path in enumerate(paths)]
    images = torch.stack([level.images[row, number] for level, row, number in ends])
    indices = torch.stack([level.indices[row, number] for level, row, number in ends])
    scores = torch.stack([level.scores[row, number] for level, row, number in ends])
    return Found(images, indices, scores, paths, budget, levels)


def grow_trees(
    generator: Generator | None,
    tokenizer: Tokenizer,
    cond: Asked,
    verifier: Verifier,
    lengths: Sequence[int] | None = None,
    budget: int = 16,
    beams: int = 2,
    lookahead: int = 0,
    seed: int = 0,
    sampling: Options = None,
    decoding: Options = None,
    batch_size: int = 64,
) -> Iterator[tuple[int, list[Level], Tensor]]:
    """The work of search(), with its arguments and errors. Yields after each batch of decodes the
    number of its first condition, the tree of its conditions so far, whose last level may still
    lack candidates, and the images (n, 3, H, W) of the batch."""
    rows = as_batch(cond)
    lengths = check_lengths(lengths, generator, tokenizer)
    counts = check_budget(budget, beams, lookahead, len(lengths))
    check_number("batch_size", batch_size, 1, 2**31, whole=True)
    if not callable(verifier):
        raise ValueError(f"verifier={verifier!r} must be a function of images, cond and indices")
    if isinstance(rows, Text):
        raise ValueError("give prompts as texts: the verifier reads them")
    if len(rows) == 0:
        raise ValueError("there is no condition to search for: give at least one")
    decode_options = tokenizer.decode_options(decoding or {})
    generate_options = None
    if generator is not None:
        generate_options = generator.generate_options(sampling or {})
        generator.prepare(rows)  # raises for conditions that the generator does not take
    elif sampling:
        raise ValueError(f"sampling={sampling!r} needs a generator: leave it out, or give one")

    for some in batches_of(len(rows), max(1, batch_size // max(counts))):
        above: list[Level] = []
        caches: list[KVCache] | None = None
        for number, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            total = lengths[min(number + lookahead, len(lengths) - 1)]
            parents = ranked(above, len(some), count, beams)
            is_last = number == len(lengths) - 1  # no other level reads its caches
            made: list[Level] = []
            for part in batches_of(count, max(1, batch_size // len(some)) if is_last else count):
                mine = parents[:, part.start : part.stop]
                asked = repeated(rows[some.start : some.stop], len(part))
                draws = [derived_generator(seed, SEARCH, r, number, j) for r in some for j in part]
                new = None
                if isinstance(generator, GPT):
                    new = grown(generator, caches, above, mine, total, generate_options)
                prefix = to_device(prefixes(above, mine), tokenizer.device)
                indices = candidates(
                    *(generator, tokenizer, asked, prefix, total, generate_options, draws, new)
                )
                noise = row_generators(seed, NOISE, [r for r in some for _ in part])
                decoded, scored = [], []
                for few in batches_of(len(indices), batch_size):
                    now = slice(few.start, few.stop)
                    x = decode_rows(tokenizer, indices[now], decode_options, noise[now])
                    decoded.append(x)
                    scored.append(check_scores(verifier(x, asked[now], indices[now]), len(x)))
                images, scores = torch.cat(decoded), torch.cat(scored)
                columns = (x.cpu().unflatten(0, mine.shape) for x in (indices, images, scores))
                made = [joined([*made, Level(length, mine, *columns)], dim=1)]
                yield some.start, [*above, *made], images
            above, caches = [*above, *made], new


def check_lengths(
    lengths: Sequence[int] | None, generator: Generator | None, tokenizer: Tokenizer
) -> list[int]:
    """The numbers of tokens of the levels. Raises ValueError where they do not fit the models."""
    tokenizer.check_discrete()
    most = tokenizer.num_tokens
    in_parts = tokenizer.ordered
    if generator is not None:
        if generator.vocab_size != tokenizer.vocab_size:
            raise ValueError(
                f"the generator's vocabulary has {generator.vocab_size} indices, the tokenizer's "
                f"{tokenizer.vocab_size}: give the tokenizer that the generator was trained on"
            )
        most = min(most, generator.num_tokens)
        in_parts = in_parts and generator.streams
    if lengths is None:
        powers = [GROWTH**i for i in range(most.bit_length()) if GROWTH**i < most]
        return [*(powers if in_parts and generator is None else ()), most]
    for length in lengths:
        check_number("lengths", length, 1, most, whole=True)
    if not lengths or any(b <= a for a, b in itertools.pairwise(lengths)):
        raise ValueError(f"lengths={list(lengths)} must rise, with at least one of them")
    if not in_parts and list(lengths) != [most]:
        raise ValueError(
            f"lengths={list(lengths)} must be [{most}]: this generator or tokenizer does not work "
            "with prefixes, which leaves best-of-N"
        )
    return [int(length) for length in lengths]


def check_budget(budget: int, beams: int, lookahead: int, levels: int) -> list[int]:
    """How many candidates each level decodes, `budget` in all. Raises ValueError."""
    check_number("budget", budget, levels, 2**31, whole=True, hint=f", for {levels} lengths")
    counts = [(budget + level) // levels for level in range(levels)]
    hint = ": no more than the candidates of a level, which are budget / number of lengths"
    check_number("beams", beams, 1, counts[0] if levels > 1 else 2**31, whole=True, hint=hint)
    check_number("lookahead", lookahead, 0, levels - 1, whole=True, hint=f", for {levels} lengths")
    return counts


def check_scores(scores: Tensor, number: int) -> Tensor:
    """A verifier's scores as (n,) float64 on the CPU. Raises ValueError where they are none."""
    if not isinstance(scores, Tensor) or scores.shape != (number,):
        found = tuple(scores.shape) if isinstance(scores, Tensor) else scores
        raise ValueError(
            f"the verifier returned {found!r}, expected a ({number},) tensor of scores"
        )
    scores = scores.detach().cpu().double()
    if not scores.isfinite().all():
        raise ValueError(f"the verifier's scores are not finite: {scores.tolist()}")
    return scores


def repeated(cond: Any, count: int) -> Any:
    """Each condition `count` times, one after the other."""
    if isinstance(cond, Tensor):
        return cond.repeat_interleave(count, dim=0)
    return [one for one in cond for _ in range(count)]


def ranked(tree: list[Level], batch: int, count: int, beams: int) -> Tensor:
    """The numbers (batch, count) of the candidates that the next level continues: the best `beams`
    of the last level take turns."""
    if not tree:
        return torch.full((batch, count), -1)
    best = tree[-1].scores.argsort(dim=1, descending=True, stable=True)[:, :beams]
    return best[:, torch.arange(count) % beams]


def prefixes(tree: list[Level], parents: Tensor) -> Tensor:
    """The indices of these candidates of the last level, one after the other, (n, p) long."""
    if not tree:
        return torch.empty(parents.numel(), 0, dtype=torch.long)
    last = tree[-1]
    return last.indices.flatten(0, 1)[rows_of(parents, last), : last.num_tokens]


def rows_of(parents: Tensor, level: Level) -> Tensor:
    """parents: (B, n). Their rows where the level's candidates lie one after the other."""
    batch, count = level.scores.shape
    return (parents + count * torch.arange(batch)[:, None]).flatten()


def grown(
    generator: GPT,
    caches: list[KVCache] | None,
    tree: list[Level],
    parents: Tensor,
    total: int,
    options: Any,
) -> list[KVCache]:
    """The caches with which the next level is generated. Keys and values of a beam were computed
    once, for all candidates that continue it."""
    if caches is None:
        return generator.new_caches(parents.numel(), total, generator.is_guided(options))
    last = tree[-1]
    rows = to_device(rows_of(parents, last), generator.device)
    return generator.take_caches(caches, last.scores.numel(), rows, last.num_tokens, total)


def candidates(
    generator: Generator | None,
    tokenizer: Tokenizer,
    cond: Any,
    prefix: Tensor,
    total: int,
    options: Any,
    draws: list[torch.Generator],
    caches: list[KVCache] | None,
) -> Tensor:
    """Indices (n, total) that begin with prefix (n, p)."""
    if generator is None:
        shape = (len(prefix), total - prefix.shape[1])
        drawn = uniforms(shape, draws, tokenizer.device) * tokenizer.vocab_size
        return torch.cat([prefix, drawn.long()], dim=1)
    how: dict[str, Any] = {"num_tokens": total, "options": options, "generator": draws}
    if generator.streams:
        how["prefix"] = prefix
    if isinstance(generator, GPT):
        how["caches"] = caches
    return generator.generate(cond, **how)


def joined(parts: Sequence[Level], dim: int) -> Level:
    """One level from those of several batches of conditions (dim 0) or of candidates (dim 1)."""
    columns = zip(*(part[1:] for part in parts), strict=True)
    return Level(parts[0].num_tokens, *(torch.cat(column, dim) for column in columns))


def best_path(tree: list[Level], row: int) -> list[int]:
    """Which candidates of a condition, level by level, lead to the best of all that were decoded at
    full length: those of the last level, and where the search looks ahead those of others."""
    total = tree[-1].num_tokens
    full = [i for i, level in enumerate(tree) if level.indices.shape[2] == total]
    last = max(full, key=lambda i: float(tree[i].scores[row].max()))
    path = [int(tree[last].scores[row].argmax())]
    for level in tree[last:0:-1]:
        path.insert(0, int(level.parents[row, path[0]]))
    return path


# --- verifiers ----------------------------------------------------------------------------------


def likelihood(generator: GPT) -> Verifier:
    """Scores indices by the logarithm of their probability given the condition, in nats, without
    guidance."""

    @torch.no_grad()
    def score(images: Tensor, cond: Any, indices: Tensor) -> Tensor:
        logits = generator(indices[:, :-1], generator.prepare(cond))  # (n, k, V)
        return -F.cross_entropy(logits.mT.float(), indices, reduction="none").sum(dim=1)

    return score


def classifier(network: nn.Module, image_size: int | None = None) -> Verifier:
    """Scores images by the log-probability of their class. network: (n, 3, H, W) in [-1, 1] to
    logits (n, classes), in eval mode; image_size: the side that it reads, that of the images by
    default. Conditions are labels."""

    @torch.no_grad()
    def score(images: Tensor, cond: Any, indices: Tensor) -> Tensor:
        labels = torch.as_tensor(cond, device=images.device)
        if image_size is not None:
            images = F.interpolate(images, (image_size,) * 2, mode="bicubic", antialias=True)
        return network(images).log_softmax(dim=1).gather(1, labels[:, None])[:, 0]

    return score


def image_text(path: str, device: Device = "cpu") -> Verifier:
    """Scores images by the cosine of their features and those of their prompts. path: folder or hub
    id of a model of transformers with features of both (CLIP, SigLIP) and of its processor. Raises
    ValueError where there is none, for one that lacks weights, and for one with code of its own."""
    model, processor = load_image_text(path)
    model = model.eval().to(device)

    @torch.no_grad()
    def score(images: Tensor, cond: Any, indices: Tensor) -> Tensor:
        prompts = list(dict.fromkeys(cond))  # each different one once
        pictures = [to_image(image) for image in images]
        # SigLIP was trained with prompts of its full length; CLIP masks what is padded
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        found = model(**processor(text=prompts, images=pictures, **options).to(device))
        texts = F.normalize(found.text_embeds, dim=1)[[prompts.index(one) for one in cond]]
        return (F.normalize(found.image_embeds, dim=1) * texts).sum(dim=1)

    black: Any = torch.zeros(1, 3, 16, 16)
    try:
        score(black.to(device), ["a"], torch.zeros(1, 1))
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} does not score images by prompts ({reason}): it must hold a model "
            "with features of images and of texts, such as CLIP, and its processor"
        ) from error
    return score


def load_image_text(path: str) -> tuple[Any, Any]:
    """A model of transformers and its processor. Raises CheckpointError."""
    from transformers import AutoModel, AutoProcessor

    folder = Path(path).expanduser()
    if not folder.is_dir():
        if is_path(path):
            raise CheckpointError(f"there is no folder {path!r}: name one, or a hub id")
        folder = transformers_snapshot(path)
    refuse_code(folder)
    how: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        model, found = AutoModel.from_pretrained(folder, output_loading_info=True, **how)
        processor = AutoProcessor.from_pretrained(folder, **how)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{folder} gives no model of images and texts: {reason}. It must hold config, "
            "weights and processor as transformers saves them"
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(f"{folder} lacks weights of its model: {missing[0]!r} for one")
    if tokenizer := getattr(processor, "tokenizer", None):
        check_vocabulary(tokenizer, folder)
    return model, processor
