"""Search for tokens whose image looks like a given one: best-of-N beside beams.

    python experiments/similar_search.py GENERATOR CLASSIFIER --root data [--json FILE]
        [--search best-of-64 beam-64 ...] [--number 16] [--seeds 0 1]

GENERATOR is an unconditional GPT of Fashion-MNIST over a FlexTok of 32 tokens, CLASSIFIER the
classifier.safetensors of the same study: paper.py trains both. The verifier knows the
given images, test images, by the classifier's features alone: a candidate's score is the negative
squared distance of its features. Figures are means over the given images.
"""

import argparse
import os
import time
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from classifier import Classifier, tensors
from safetensors.torch import load_file
from study import write_json
from torch import Tensor

from flextok import viz
from flextok.data.fashion_mnist import FashionMNIST
from flextok.evaluation.features import Features
from flextok.pipeline import load, load_tokenizer_of
from flextok.tree_search import Verifier, search

SEARCHES: dict[str, dict[str, Any]] = {
    "none": {"lengths": [32], "budget": 1, "beams": 1},
    "best-of-16": {"lengths": [32], "budget": 16},
    "best-of-64": {"lengths": [32], "budget": 64},
    "best-of-256": {"lengths": [32], "budget": 256},
    "best-of-1024": {"lengths": [32], "budget": 1024},
    "beam-64": {"lengths": [1, 4, 32], "budget": 64, "beams": 2},
    "beam-256": {"lengths": [1, 2, 4, 8, 16, 32], "budget": 256, "beams": 4},
}


def read(classifier: Classifier, images: Tensor) -> Features:
    """What the classifier finds in decoded images (n, 3, H, W), about [-1, 1]."""
    return classifier(images.clamp(-1, 1).mean(dim=1, keepdim=True))


def likeness(classifier: Classifier, images: Tensor) -> Verifier:
    """A verifier whose condition is the number of one of `images` (n, 1, H, W) in [-1, 1]."""
    wanted = classifier(images).pooled

    def score(images: Tensor, cond: Tensor, indices: Tensor) -> Tensor:
        return -(read(classifier, images).pooled - wanted[cond]).square().sum(dim=1)

    return score


def format_table(table: dict[str, dict[str, Any]]) -> str:
    lines = ["| search | decodes | verifier | same class | s an image |", "|---|---|---|---|---|"]
    for name, row in table.items():
        seeds = row["seeds"]
        cells = [
            name,
            str(row["decodes"]),
            " / ".join(f"{one['verifier']:.1f}" for one in seeds),
            f"{mean(one['same_class'] for one in seeds):.2f}",
            f"{mean(one['seconds'] for one in seeds):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("generator")
    parser.add_argument("classifier", type=Path)
    parser.add_argument("--root", default="data", help="folder of Fashion-MNIST")
    parser.add_argument("--search", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    parser.add_argument("--number", type=int, default=16, help="of given images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=6, help="of the decoder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, help="the given images above what was found")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator, classifier = load(options.generator), Classifier().eval()
    classifier.load_state_dict(load_file(options.classifier))
    tokenizer = load_tokenizer_of(generator)
    given, _ = tensors(FashionMNIST(options.root, "test", options.number))
    verifier, classes = likeness(classifier, given), classifier(given).logits.argmax(1)
    numbers, decoding = torch.arange(len(given)), {"num_steps": options.steps}
    table, rows = {}, [given.expand(-1, 3, -1, -1)]
    for name in options.search:
        seeds: list[dict[str, float]] = []
        for seed in options.seeds:
            start = time.process_time()
            found = search(
                *(generator, tokenizer, numbers, verifier),
                seed=seed,
                decoding=decoding,
                **SEARCHES[name],
            )
            seconds = (time.process_time() - start) / len(given)
            kept = float(
                (read(classifier, found.images).logits.argmax(1) == classes).float().mean()
            )
            score = float(found.scores.mean())
            seeds.append({"verifier": score, "same_class": kept, "seconds": seconds})
            print(f"{name:20s} seed {seed}: {seeds[-1]}", flush=True)
        rows.append(found.images)
        table[name] = {"options": SEARCHES[name], "decodes": found.decodes, "seeds": seeds}
    print(format_table(table))
    if options.json:
        write_json({"images": options.number, "steps": options.steps, "rows": table}, options.json)
    if options.picture:
        names = ["given", *options.search]
        viz.save(viz.grid([row[:12] for row in rows], row_labels=names, scale=3), options.picture)


if __name__ == "__main__":
    main()
