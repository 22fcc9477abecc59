"""What search over prefixes finds on emoji scenes, and for how many decodes.

    python benchmarks/tree_search.py --probes FOLDER [--search best-of-64 beam-16 ...]
        [--number 64] [--seeds 0 1] [--tokenizer emoji-one-step] [--shown emoji] [--json FILE]

Searches for the first scenes of held-out prompts with one probe for a verifier, and judges what it
finds with another one, of another width, trained on other scenes. FOLDER keeps both. The images of
the search come from --tokenizer; --shown decodes the indices found once more, as `flextok align`
does, and the same judge reads those. Figures are means over prompts and seeds.
"""

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from flextok.cli.options import write_json
from flextok.emoji.alignment import agreement, by_fact, derangement, scene_verifier
from flextok.emoji.probe import Probe, read_scenes, train_probe
from flextok.emoji.scenes import EmojiScenes
from flextok.generators import Generator
from flextok.pipeline import decode_prefixes, load, load_tokenizer_of
from flextok.tokenizers import Tokenizer
from flextok.tree_search import search

KNOWN = {"max_objects": 2, "vocabulary": "basic"}
ONE = {"budget": 1, "beams": 1}
# name -> options of search(); "uniform": without the generator
SEARCHES: dict[str, dict[str, Any]] = {
    "none": {"lengths": [64], **ONE},
    "best-of-4": {"lengths": [64], "budget": 4},
    "best-of-16": {"lengths": [64], "budget": 16},
    "best-of-64": {"lengths": [64], "budget": 64},
    "beam-16": {"lengths": [4, 16, 32, 64], "budget": 16, "beams": 1},
    "lookahead-16": {"lengths": [1, 4, 16, 64], "budget": 16, "beams": 1, "lookahead": 3},
    "uniform-none": {"lengths": [16], **ONE},
    "uniform-best-of-128": {"lengths": [16], "budget": 128},
    "uniform-best-of-512": {"lengths": [16], "budget": 512},
    "uniform-beam-32": {"lengths": [1, 2, 3, 4, 6, 8, 12, 16], "budget": 32, "beams": 1},
    "uniform-beam-128": {"lengths": [1, 2, 3, 4, 6, 8, 12, 16], "budget": 128, "beams": 2},
}


def measure(
    generator: Generator,
    tokenizer: Tokenizer,
    shown: Tokenizer,
    verifier: Probe,
    judge: Probe,
    scenes: EmojiScenes,
    searches: Mapping[str, Mapping[str, Any]],
    number: int,
    seeds: Sequence[int],
) -> dict[str, dict[str, Any]]:
    """A row for each search: its options, the verifier's mean score, the judge's scores of its
    images and of those that `shown` decodes, and the CPU seconds of a prompt."""
    _, facts, captions = read_scenes(scenes, tokenizer.image_size, number)
    score = scene_verifier(verifier, scenes)
    table = {}
    for name, options in searches.items():
        prior = None if name.startswith("uniform") else generator
        rows = []
        for seed in seeds:
            start = time.process_time()
            found = search(prior, tokenizer, captions, score, seed=seed, **options)
            seconds = (time.process_time() - start) / number
            k = found.indices.shape[1]
            again = torch.cat(
                [
                    decode_prefixes(shown, found.indices[some], [k], seed, rows=some.tolist())[k]
                    for some in torch.arange(number).split(64)
                ]
            )
            rows.append(
                {
                    "verifier": float(found.scores.mean()),
                    "error": float(found.scores.std() / number**0.5),
                    **judged(judge, found.images, facts, seed),
                    "shown": judged(judge, again, facts, seed),
                    "seconds_per_prompt": seconds,
                }
            )
            print(f"{name:20s} seed {seed}: {rows[-1]}", flush=True)
        table[name] = {"options": dict(options), "decodes": found.decodes, "seeds": rows}
    return table


def judged(judge: Probe, images: Tensor, facts: Tensor, seed: int) -> dict[str, Any]:
    """The part of the facts that the judge reads off the images, of other prompts', and by fact."""
    found = judge.read(images)
    agreed = agreement(found, facts)
    shuffled = agreement(found, facts[derangement(len(facts), seed)])
    return {
        "judge": float(agreed.nanmean(1).mean()),
        "shuffled": float(shuffled.nanmean(1).mean()),
        "by_fact": by_fact(agreed, judge),
    }


def format_table(table: Mapping[str, Mapping[str, Any]]) -> str:
    """Means over the seeds; of the judge's scores those of the shown images."""
    lines = [
        "| search | decodes | verifier | judge (shuffled) | first object | second | s a prompt |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in table.items():
        seeds = row["seeds"]
        shown = [one["shown"] for one in seeds]
        objects = (mean(one["by_fact"][f"object {i}"] for one in shown) for i in (1, 2))
        cells = [
            name,
            str(row["decodes"]),
            " / ".join(f"{one['verifier']:.3f}" for one in seeds),
            f"{mean(x['judge'] for x in shown):.3f} ({mean(x['shuffled'] for x in shown):.3f})",
            *(f"{value:.2f}" for value in objects),
            f"{mean(one['seconds_per_prompt'] for one in seeds):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def probes(folder: Path, image_size: int) -> tuple[Probe, Probe]:
    """The verifier, narrower and trained on other scenes, and the judge, which is `align`'s."""
    kept = folder / "verifier.safetensors", folder / "judge.safetensors"
    if not kept[0].is_file():
        scenes = EmojiScenes(seed=1, prompts="train", **KNOWN)
        train_probe(scenes, image_size, seed=1, width=24).save(kept[0])
    if not kept[1].is_file():
        train_probe(EmojiScenes(prompts="train", **KNOWN), image_size).save(kept[1])
    return Probe.load(kept[0]), Probe.load(kept[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--probes", type=Path, required=True)
    parser.add_argument("--search", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    parser.add_argument("--number", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--tokenizer", default="emoji-one-step")
    parser.add_argument("--shown", default="emoji")
    parser.add_argument("--json")
    options = parser.parse_args()
    generator = load("emoji-text")
    tokenizer, shown = (
        load_tokenizer_of(generator, override=name) for name in (options.tokenizer, options.shown)
    )
    verifier, judge = probes(options.probes, tokenizer.image_size)
    table = measure(
        generator,
        tokenizer,
        shown,
        verifier,
        judge,
        EmojiScenes(prompts="held_out", **KNOWN),
        {name: SEARCHES[name] for name in options.search},
        options.number,
        options.seeds,
    )
    print(format_table(table))
    if options.json:
        settings = {"tokenizer": options.tokenizer, "shown": options.shown}
        write_json(options.json, {**settings, "prompts": options.number, "rows": table})


if __name__ == "__main__":
    main()
