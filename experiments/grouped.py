"""Generators that predict groups of indices, beside the one that predicts one index a step.

    python experiments/grouped.py TOKENIZER CLASSIFIER --root data --seeds 0 1

TOKENIZER is a FlexTok of Fashion-MNIST with 32 tokens, CLASSIFIER the classifier.safetensors of the
same study; paper.py trains both. The GPT of its recipe gpt_class is trained without groups at a
constant learning rate. From these weights each schedule of groups, and the model without groups,
goes on for as many steps on the same batches while the learning rate falls; --seeds are those of
these steps and of the samples. Images of all classes are compared with the test set. What is done
is kept in the folder --output. All times are CPU seconds of one process, measured for all schedules
one after another at the end.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from classifier import Classifier, tensors
from safetensors.torch import load_file, save_file
from study import write_json
from torch import Tensor

from flextok.config import OptimConfig
from flextok.cpu import accelerate
from flextok.data.fashion_mnist import FashionMNIST
from flextok.evaluation.distances import Statistics, frechet_distance, statistics
from flextok.generators import GPT, GPTConfig
from flextok.objectives import NextTokenConfig, NextTokenObjective
from flextok.pipeline import generate_images, load
from flextok.tokenizers import Tokenizer
from flextok.training.optim import make_optimizer, warmup_cosine

SCHEDULES: dict[str, list[int] | None] = {
    "one index a step": None,
    "8 single, 8, 16": [1] * 8 + [8, 16],
    "doubled": [1, 1, 2, 4, 8, 16],
}
OPTIM = OptimConfig(name="muon", lr=1.5e-3, weight_decay=0.05, warmup_steps=40)
Batch = dict[str, Tensor]


@torch.no_grad()
def encoded(tokenizer: Tokenizer, root: str, split: str, number: int, folder: Path) -> Batch:
    """The indices (n, 32) and labels (n,) of the first images of a split."""
    path = folder / f"{split}.safetensors"
    if not path.exists():
        images, labels = tensors(FashionMNIST(root, split, number))
        indices = [tokenizer.encode(some.expand(-1, 3, -1, -1)) for some in images.split(250)]
        save_file({"indices": torch.cat(indices), "label": labels}, path)
    return load_file(path)


def train(
    objective: NextTokenObjective, data: Batch, steps: int, batch_size: int, seed: int, falls: bool
) -> None:
    """falls: the learning rate does, to its hundredth; else it rises and stays."""
    optimizer = make_optimizer(accelerate(objective), OPTIM)
    warmup = 0 if falls else OPTIM.warmup_steps
    rate = warmup_cosine(warmup, steps, 0.01 if falls else 1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    rng = torch.Generator().manual_seed(seed)
    start = time.process_time()
    for step in range(steps):
        rows = torch.randint(len(data["label"]), (batch_size,), generator=rng)
        batch = {key: value[rows] for key, value in data.items()}
        loss = objective.train()(batch, rng)["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), OPTIM.grad_clip)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            seconds = (time.process_time() - start) / (step + 1)
            print(f"  step {step + 1}: loss {loss.item():.3f}, {seconds:.3f} s", flush=True)
    objective.eval()


def first_weights(config: GPTConfig, data: Batch, steps: int, batch_size: int, to: Path) -> GPT:
    """The model without groups, from which all go on."""
    if not to.exists():
        print("before the groups", flush=True)
        torch.manual_seed(0)  # of the first weights
        model = GPT(config)
        objective = NextTokenObjective(model, NextTokenConfig(context_noise=0.1))
        train(objective, data, steps, batch_size, seed=0, falls=False)
        model.save_pretrained(to)
    return GPT.from_pretrained(to)


@torch.no_grad()
def scores(
    model: GPT,
    tokenizer: Tokenizer,
    classifier: Classifier,
    real: Statistics,
    held_out: Batch,
    images: int,
    seed: int,
    guidance: Sequence[float],
    decode_steps: int,
) -> dict[str, float]:
    """The loss on the test set in nats an index, and for each guidance the Fréchet distance."""
    parts = zip(*(value.split(250) for value in held_out.values()), strict=True)
    objective = NextTokenObjective(model).eval()
    losses = [objective({"indices": i, "label": label})["loss"] for i, label in parts]
    found = {"loss": float(torch.stack(losses).mean())}
    labels = torch.arange(images) % 10
    decoding = {"num_steps": decode_steps}
    for scale in guidance:
        sampling = {"guidance_scale": scale}
        made = generate_images(model, tokenizer, labels, None, seed, sampling, decoding)
        grey = made[model.num_tokens].mean(dim=1, keepdim=True).clamp(-1, 1)
        found[f"gFréchet, guidance {scale:g}"] = frechet_distance(
            statistics(features(classifier, grey)), real
        )
    return found


@torch.no_grad()
def features(classifier: Classifier, images: Tensor) -> Tensor:
    return torch.cat([classifier(some).pooled for some in images.split(250)])


def costs(model: GPT, repeats: int) -> dict[str, float]:
    """Steps of a generation, and its CPU seconds for one image with guidance and for each of 64:
    the least of several tries, since other processes disturb them."""
    found: dict[str, float] = {}
    for batch in (1, 64):
        tries = []
        for _ in range(repeats):
            start = time.process_time()
            steps = list(model.stream(torch.arange(batch) % 10, guidance_scale=1.5))
            tries.append((time.process_time() - start) / batch)
        found |= {"steps": len(steps), f"seconds, batch {batch}": min(tries)}
    return found


def format_table(runs: dict[str, dict[str, Any]], schedules: dict[str, Any]) -> str:
    """Means over the seeds; ratios to the first schedule."""
    first = next(iter(runs.values()))
    columns = list(next(iter(first.values())))
    lines = [
        "| groups | steps | ms an image, alone / of 64 | " + " | ".join(columns) + " |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for name, row in runs.items():
        cost, cells = schedules[name], []
        for column in columns:
            value, base = (mean(one[column] for one in r.values()) for r in (row, first))
            each = ", ".join(f"{one[column]:.2f}" for one in row.values())
            cells.append(f"{value:.2f} ({value / base - 1:+.1%}; {each})")
        times = " / ".join(f"{1e3 * cost[f'seconds, batch {n}']:.1f}" for n in (1, 64))
        lines.append(f"| {name} | {cost['steps']} | {times} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tokenizer")
    parser.add_argument("classifier", type=Path)
    parser.add_argument("--root", default="data", help="folder of Fashion-MNIST")
    parser.add_argument("--only", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--before", type=int, default=1000, help="steps without groups")
    parser.add_argument("--steps", type=int, default=400, help="steps of each schedule, after them")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--limit", type=int, default=20_000, help="of the training images")
    parser.add_argument("--images", type=int, default=2000, help="to generate")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0])
    parser.add_argument("--decode-steps", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("outputs/grouped"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer, classifier = load(options.tokenizer), Classifier().eval()
    classifier.load_state_dict(load_file(options.classifier))
    config = GPTConfig(
        vocab_size=tokenizer.vocab_size,
        num_tokens=tokenizer.num_tokens,
        depth=5,
        dim=128,
        num_heads=4,
        conditioner={"name": "class", "num_classes": 10},
    )
    options.output.mkdir(parents=True, exist_ok=True)
    results = options.output / "results.json"
    settings = {
        key: value
        for key, value in vars(options).items()
        if isinstance(value, int | float) or key == "guidance"
    }
    settings |= {"codes_id": tokenizer.codes_id, "classifier": str(options.classifier)}
    found: dict[str, Any] = {"settings": settings, "runs": {}}
    if results.exists():
        found = json.loads(results.read_text("utf-8"))
        if found["settings"] != settings:
            parser.error(f"{results} has other settings: {found['settings']}")
    write_json(found, results)
    data = encoded(tokenizer, options.root, "train", options.limit, options.output)
    held_out = encoded(tokenizer, options.root, "test", 1000, options.output)
    test, _ = tensors(FashionMNIST(options.root, "test"))
    real = statistics(features(classifier, test))
    size = options.batch_size
    first = first_weights(config, data, options.before, size, options.output / "before")
    for seed in options.seeds:
        for name in options.only:
            row = found["runs"].setdefault(name, {})
            if str(seed) in row:
                continue
            print(f"{name}, seed {seed}", flush=True)
            model = GPT(replace(config, groups=SCHEDULES[name]))
            how = NextTokenConfig(context_noise=0.1)
            objective = NextTokenObjective(model, how, weights=first)
            train(objective, data, options.steps, size, seed + 1000, falls=True)
            sides = (tokenizer, classifier, real, held_out, options.images, seed)
            row[str(seed)] = scores(model, *sides, options.guidance, options.decode_steps)
            print(f"  {row[str(seed)]}", flush=True)
            write_json(found, results)
    models = {name: GPT(replace(config, groups=SCHEDULES[name])).eval() for name in found["runs"]}
    found["costs"] = {name: costs(accelerate(model), 5) for name, model in models.items()}
    write_json(found, results)
    print(format_table(found["runs"], found["costs"]))


if __name__ == "__main__":
    main()
