"""Compares training that starts from the package's models with training from fresh weights.

    python benchmarks/warm_start.py

Each case has the same steps, batches and optimizer for both:

tokenizer:   `emoji`, which was trained at 64 px, goes on at 48 px on 300 crops of eight photographs
             and is validated on crops of four others. The fresh one begins as configs/emoji_32px
             has it begin.
generator:   `emoji-class` goes on with nine new classes, the groups of the flat emoji; it was
             trained on subgroups of the 3D ones. 300 emoji of the training split, validated on
             the validation split.
photographs: `emoji-class` goes on with twelve new classes, one for each photograph. It is trained
             on 300 crops of their left three fifths and validated on crops of the rest.

The photographs come with scikit-image. Writes the validation losses of every run to --output after
each run, and prints their means over the seeds.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import skimage.data
import torch
from PIL import Image
from torch import Tensor

import flextok
from flextok.cli.options import write_json
from flextok.config import OptimConfig
from flextok.cpu import accelerate
from flextok.emoji.datasets import Emoji
from flextok.generators import GPT
from flextok.images import image_tensor, load_picture
from flextok.objectives import Objective, make_objective
from flextok.tokenizers import FlexTok
from flextok.training.optim import make_optimizer, warmup_cosine

PHOTOGRAPHS = Path(skimage.data.__file__).parent
TRAINED_ON = (
    *("astronaut.png", "chelsea.png", "motorcycle_left.png", "rocket.jpg"),
    *("camera.png", "grass.png", "brick.png", "hubble_deep_field.jpg"),
)
HELD_OUT = ("coffee.png", "gravel.png", "coins.png", "retina.jpg")
SIZE, LEFT = 48, 0.6  # pixels; share of a photograph that is trained on
Batch = dict[str, Tensor]


class Case(NamedTuple):
    make: Callable[[bool], Objective]  # of trained weights, or of fresh ones
    data: Batch
    held_out: Batch
    optim: OptimConfig


def read(names: tuple[str, ...]) -> list[Image.Image]:
    return [load_picture(PHOTOGRAPHS / name) for name in names]


def crops(pictures: list[Image.Image], number: int, size: int, rng: torch.Generator) -> Tensor:
    """Square crops at random places, their sides from a quarter of the shorter side to all of it,
    the pictures in turn. Returns (number, 3, size, size) in [-1, 1]."""
    found = []
    for i in range(number):
        picture = pictures[i % len(pictures)]
        share, across, down = torch.rand(3, generator=rng).tolist()
        side = round(min(picture.size) * (0.25 + 0.75 * share))
        left, top = (
            (length - side) * at for length, at in zip(picture.size, (across, down), strict=True)
        )
        box = (round(left), round(top), round(left) + side, round(top) + side)
        found.append(image_tensor(picture.crop(box), size, size))
    return torch.stack(found)


def halves(pictures: list[Image.Image]) -> tuple[list[Image.Image], list[Image.Image]]:
    """The left part of each picture, and the rest."""
    cuts = [(picture, round(LEFT * picture.width)) for picture in pictures]
    left = [picture.crop((0, 0, cut, picture.height)) for picture, cut in cuts]
    return left, [picture.crop((cut, 0, *picture.size)) for picture, cut in cuts]


def train(case: Case, warm: bool, steps: int, seed: int) -> list[tuple[int, float]]:
    """(step, validation loss) before the first step, after each quarter, and at the end."""
    torch.manual_seed(seed)  # of fresh weights
    objective, optim = accelerate(case.make(warm)), case.optim
    optimizer = make_optimizer(objective, optim)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, warmup_cosine(optim.warmup_steps, steps, optim.final_lr)
    )
    curve = [(0, validate(objective, case.held_out))]
    torch.manual_seed(seed)  # of dropout layers
    for step, batch in enumerate(batches(case.data, steps, seed)):
        rng = torch.Generator().manual_seed(seed * steps + step)
        loss = objective.train()(batch, rng)["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), optim.grad_clip)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, steps // 4) == 0 or step + 1 == steps:
            curve.append((step + 1, validate(objective, case.held_out)))
    return curve


def batches(data: Batch, steps: int, seed: int, size: int = 16) -> Iterator[Batch]:
    number = len(next(iter(data.values())))
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(number, (size,), generator=rng)
        yield {key: value[rows] for key, value in data.items()}


@torch.no_grad()
def validate(objective: Objective, held_out: Batch) -> float:
    """The mean loss, with the same draws each time."""
    objective.eval()
    parts = zip(*(value.split(16) for value in held_out.values()), strict=True)
    losses, sizes = [], []
    for i, part in enumerate(parts):
        batch = dict(zip(held_out, part, strict=True))
        losses.append(float(objective(batch, torch.Generator().manual_seed(i))["loss"]))
        sizes.append(len(part[0]))
    return sum(x * n for x, n in zip(losses, sizes, strict=True)) / sum(sizes)


def tokenizer_case(images: int) -> Case:
    trained = flextok.load("emoji")
    trained.drop_drawer()
    spec = trained.metadata["tokens_trained_by"]
    config = replace(trained.config, image_size=SIZE)
    begins = {"position_temperature": 10.0, "token_std": 0.3, "register_start": "spread"}

    def make(warm: bool) -> Objective:
        if warm:
            return make_objective(FlexTok(config), spec, {"weights": trained})
        return make_objective(FlexTok(replace(config, **begins)), spec)

    rng = torch.Generator().manual_seed(0)
    data = {"image": crops(read(TRAINED_ON), images, SIZE, rng)}
    held_out = {"image": crops(read(HELD_OUT), max(16, images // 3), SIZE, rng)}
    optim = OptimConfig(name="muon", lr=2e-3, lr_scale={"encoder": 0.2}, warmup_steps=20)
    return Case(make, data, held_out, optim)


def emoji_case(images: int) -> Case:
    sets = [Emoji(split, style="flat", label="group") for split in ("train", "validation")]
    labelled = []
    for data, number in zip(sets, (images, max(16, images // 3)), strict=True):
        items = [data[i * len(data) // number] for i in range(number)]
        pictures = torch.stack([image_tensor(item["image"], 64, 64) for item in items])
        labelled.append((pictures, torch.tensor([item["label"] for item in items])))
    return generator_case(sets[0].class_names, *labelled)


def photograph_case(images: int) -> Case:
    names = [Path(name).stem for name in TRAINED_ON + HELD_OUT]
    rng = torch.Generator().manual_seed(0)
    labelled = []
    parts = halves(read(TRAINED_ON + HELD_OUT))
    for pictures, number in zip(parts, (images, max(16, images // 3)), strict=True):
        found = crops(pictures, number, 64, rng)
        labelled.append((found, torch.arange(number) % len(names)))
    return generator_case(names, *labelled)


def generator_case(names: list[str], *labelled: tuple[Tensor, Tensor]) -> Case:
    """labelled: images and labels to train on, and to validate on."""
    trained = flextok.load("emoji-class")
    tokenizer = flextok.load_tokenizer_of(trained)
    conditioner = {"name": "class", "num_classes": len(names)}

    def make(warm: bool) -> Objective:
        model = GPT(replace(trained.config, conditioner=conditioner))
        model.metadata["class_names"] = names
        return make_objective(model, start={"weights": trained} if warm else None)

    data, held_out = (
        {"indices": torch.cat([tokenizer.encode(some) for some in images.split(32)]), "label": x}
        for images, x in labelled
    )
    return Case(make, data, held_out, OptimConfig(name="muon", lr=1e-3, warmup_steps=20))


CASES = {"tokenizer": tokenizer_case, "generator": emoji_case, "photographs": photograph_case}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", default="benchmarks/results/warm_start.json")
    options = parser.parse_args(arguments)
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    found: dict[str, Any] = {}
    for name, load in CASES.items():
        case = load(options.images)
        for start, warm in (("trained weights", True), ("fresh weights", False)):
            for seed in options.seeds:
                curve = train(case, warm, options.steps, seed)
                found.setdefault(name, {}).setdefault(start, []).append(curve)
                write_json(options.output, {**settings, "validation_loss": found})
        for start, curves in found[name].items():
            shown = [f"{mean(loss for _, loss in at):.3f}" for at in zip(*curves, strict=True)]
            steps = [step for step, _ in curves[0]]
            print(f"{name}, {start}: " + ", ".join(map("{} at step {}".format, shown, steps)))


if __name__ == "__main__":
    main()
