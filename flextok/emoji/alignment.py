"""How well generated scenes show what was asked for, against the number of tokens.

The score of an image is the part of its prompt's facts that the probe reads off it; of a class
generator, whose classes are numbers of objects, the count alone. The control scores the same
images against the prompts of other images: what agreement by chance looks like. A probe is a
verifier for flextok.tree_search, too.
"""

import functools
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flextok.emoji.captions import noun_phrase
from flextok.emoji.probe import GRIDS, UNKNOWN, Probe, fact_sizes, read_scenes
from flextok.emoji.scenes import COLORS, LAYOUTS, EmojiScenes
from flextok.generators.base import Generator
from flextok.generators.conditioning import ClassConditioner, TextConditioner
from flextok.pipeline import generate_images, reconstruct_prefixes
from flextok.tokenizers.base import Tokenizer
from flextok.tree_search import Verifier


@dataclass
class Alignment:
    """Means over `count` images at one prefix length; each score is in [0, 1]."""

    num_tokens: int
    score: float  # of the images against their own prompts
    error: float  # standard error of score
    shuffled: float  # against other prompts
    reconstructed: float  # of real scenes, encoded and decoded at this length
    by_count: dict[int, float] = field(default_factory=dict)  # score, by number of objects
    shuffled_by_count: dict[int, float] = field(default_factory=dict)
    by_fact: dict[str, float] = field(default_factory=dict)
    shuffled_by_fact: dict[str, float] = field(default_factory=dict)


@dataclass
class AlignmentReport:
    count: int
    real: float  # score of the real scenes: the best that the probe can reach
    results: list[Alignment]


def alignment(
    generator: Generator,
    tokenizer: Tokenizer,
    probe: Probe,
    scenes: EmojiScenes,
    lengths: list[int],
    number: int = 256,
    seed: int = 0,
    sampling: dict[str, Any] | None = None,
    decoding: dict[str, Any] | None = None,
) -> AlignmentReport:
    """Generate from the first `number` captions (or classes) of `scenes`, decode each length with
    the same noise, score. Raises ValueError when generator, probe and scenes do not fit."""
    check_scenes(number)
    check_generator(generator, scenes)
    check_probe(probe, scenes, tokenizer.image_size)
    images, facts, captions = read_scenes(scenes, tokenizer.image_size, number)
    count = facts[:, 0] + 1
    cond: Tensor | list[str] = captions
    if isinstance(generator.conditioner, ClassConditioner):
        cond = facts[:, 0].to(generator.device)
        facts = facts.clone()
        facts[:, 1:] = UNKNOWN  # a class is a number of objects, nothing else
    generated = generate_images(generator, tokenizer, cond, lengths, seed, sampling, decoding)
    others = derangement(number, seed)
    rebuilt = reconstruct_prefixes(tokenizer, images, lengths, seed, decoding)
    results = []
    for k in lengths:
        found = probe.read(generated[k])
        right, wrong = agreement(found, facts), agreement(found, facts[others])
        results.append(
            Alignment(
                num_tokens=k,
                score=right.nanmean(1).mean().item(),
                error=(right.nanmean(1).std() / number**0.5).item(),
                shuffled=wrong.nanmean(1).mean().item(),
                reconstructed=agreement(probe.read(rebuilt[k]), facts).nanmean(1).mean().item(),
                by_count=by_level(right, count),
                shuffled_by_count=by_level(wrong, count[others]),
                by_fact=by_fact(right, probe),
                shuffled_by_fact=by_fact(wrong, probe),
            )
        )
    real = agreement(probe.read(images), facts).nanmean(1).mean().item()
    return AlignmentReport(number, real, results)


def check_generator(generator: Generator, scenes: EmojiScenes) -> None:
    """Raises ValueError for a generator that is asked for nothing that scenes have."""
    if isinstance(generator.conditioner, ClassConditioner):
        known = generator.metadata.get("class_names")
        if known != scenes.class_names:
            raise ValueError(
                f"this generator's classes ({', '.join((known or ['?'])[:3])}, ...) are not the "
                f"numbers of objects of the scenes ({', '.join(scenes.class_names)})"
            )
    elif not isinstance(generator.conditioner, TextConditioner):
        raise ValueError("an unconditional generator has nothing to be aligned with")


def check_scenes(number: int) -> None:
    """Raises ValueError for too few scenes to have a control and an error."""
    if number < 2:
        raise ValueError(f"{number} scene has no other one's prompt as control: take 2 at least")


def check_probe(probe: Probe, scenes: EmojiScenes, image_size: int) -> None:
    """Raises ValueError for a probe of other scenes, or of images of another size."""
    if probe.sizes != fact_sizes(scenes) or probe.image_size != image_size:
        raise ValueError(
            "the probe was trained for other scenes or another image size: delete its file"
        )


def agreement(found: Tensor, facts: Tensor) -> Tensor:
    """found, facts: (B, F) long. Returns (B, F) of 1 or 0, NaN where there is nothing to know."""
    return torch.where(facts == UNKNOWN, torch.nan, (found == facts).float())


def scene_verifier(probe: Probe, scenes: EmojiScenes) -> Verifier:
    """Scores images by the mean log-probability that the probe gives to the facts of their
    captions. Raises ValueError for a probe of other scenes."""
    check_probe(probe, scenes, probe.image_size)
    facts_of = functools.cache(lambda caption: caption_facts(caption, scenes))

    @torch.no_grad()
    def score(images: Tensor, cond: list[str], indices: Tensor) -> Tensor:
        facts = torch.stack([facts_of(caption) for caption in cond])
        found = torch.stack(
            [
                logits.cpu().log_softmax(dim=1).gather(1, facts[:, i, None].clamp_min(0))[:, 0]
                for i, logits in enumerate(probe(images.to(probe.head.weight.device)))
            ],
            dim=1,
        )
        return found.masked_fill(facts == UNKNOWN, torch.nan).nanmean(dim=1)

    return score


def caption_facts(caption: str, scenes: EmojiScenes) -> Tensor:
    """The facts (F,) long of a scene's caption, or of a prompt that is worded like one, in the
    order of fact_sizes; UNKNOWN is what it does not mention. Raises ValueError for a prompt that
    names none of the scenes' emoji, or too many."""
    phrases = {noun_phrase(r.name): scenes.kind_of(r) for r in scenes.records}
    longest_first = sorted(phrases, key=len, reverse=True)
    pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)"
    found = re.fullmatch(r"(.*) on an? (.* background|gradient from .*)", caption)
    things, background = found.groups() if found else (caption, "")
    kinds = [scenes.kinds.index(phrases[phrase]) for phrase in re.findall(pattern, things)]
    if not 1 <= len(kinds) <= scenes.max_objects:
        raise ValueError(
            f"prompt {caption!r} names {len(kinds)} of the scenes' emoji, expected 1 to "
            f"{scenes.max_objects}, in words such as {longest_first[-1]!r}"
        )
    colors = background.removesuffix(" background").removeprefix("gradient from ").split(" to ")
    if background and (wrong := [color for color in colors if color not in COLORS]):
        raise ValueError(f"unknown background {wrong[0]!r}; known: {', '.join(COLORS)}")
    tall = " above " in things or " middle row" in things
    grids = LAYOUTS[len(kinds)][0]
    grid = max(grids, key=lambda g: g[1]) if tall else min(grids, key=lambda g: g[1])
    missing = [UNKNOWN] * (scenes.max_objects - len(kinds))
    parts = (
        [list(COLORS).index(c) for c in (colors[0], colors[-1])] if background else [UNKNOWN] * 2
    )
    return torch.tensor([len(kinds) - 1, GRIDS.index(grid), *parts, *kinds, *missing])


def by_level(agreed: Tensor, count: Tensor) -> dict[int, float]:
    levels = sorted(set(count.tolist()))
    return {n: agreed[count == n].nanmean(1).mean().item() for n in levels}


def by_fact(agreed: Tensor, probe: Probe) -> dict[str, float]:
    known = (~agreed.isnan()).any(0).tolist()
    means = agreed.nanmean(0).tolist()
    return {name: m for name, m, k in zip(probe.sizes, means, known, strict=True) if k}


def derangement(number: int, seed: int) -> Tensor:
    """(n,) long, a random permutation that leaves nothing in place."""
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
    others = torch.empty_like(order)
    others[order] = order.roll(1)
    return others


def format_report(report: AlignmentReport) -> str:
    """A table: each length's score, the control's in brackets, of all images and by complexity."""
    levels = list(report.results[0].by_count)
    names = [f"{n} object{'s' * (n > 1)}" for n in levels]
    lines = ["score (shuffled prompts), of the facts of a prompt"]
    lines.append(f"tokens  {'all':>20}  " + "  ".join(f"{n:>13}" for n in names) + "  rebuilt")
    for r in report.results:
        cells = [f"{r.by_count[n]:.2f} ({r.shuffled_by_count[n]:.2f})" for n in levels]
        score = f"{r.score:.3f} ±{r.error:.3f} ({r.shuffled:.3f})"
        columns = "  ".join(f"{cell:>13}" for cell in cells)
        lines.append(f"{r.num_tokens:6d}  {score:>20}  {columns}  {r.reconstructed:7.2f}")
    last = report.results[-1]
    facts = (f"{k} {v:.2f} ({last.shuffled_by_fact[k]:.2f})" for k, v in last.by_fact.items())
    lines.append(f"at {last.num_tokens} tokens: {', '.join(facts)}")
    lines.append(f"{report.count} prompts; the probe reads {report.real:.2f} off the real scenes")
    return "\n".join(lines)
