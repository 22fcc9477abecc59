"""A small classifier that reads an emoji scene's facts off its pixels: how many objects, how they
are arranged, what each is, and the background's colours. Trained on real scenes, it measures how
much of its prompt a generated one shows (alignment.py)."""

import functools
import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from flextok.data.transforms import ImageTransform
from flextok.draws import PROBE, derived_generator
from flextok.emoji.scenes import COLORS, LAYOUTS, EmojiScenes
from flextok.files import atomic_write

UNKNOWN = -1  # a fact that a scene does not have, such as its second object's kind
GRIDS = sorted({grid for grids, _ in LAYOUTS.values() for grid in grids})


def fact_sizes(scenes: EmojiScenes) -> dict[str, int]:
    """The facts of such scenes by name, with the number of answers to each."""
    kinds = {f"object {i}": len(scenes.kinds) for i in range(1, scenes.max_objects + 1)}
    backgrounds = {"background": len(COLORS), "second color": len(COLORS)}
    return {"count": scenes.max_objects, "arrangement": len(GRIDS), **backgrounds, **kinds}


def scene_facts(scene: dict[str, Any], max_objects: int) -> Tensor:
    """(F,) long in the order of fact_sizes, UNKNOWN for objects that are not there. A plain
    background's second colour is its only one."""
    name = scene["background"].removesuffix(" background").removeprefix("gradient from ")
    first, _, second = name.partition(" to ")
    colors = list(COLORS)
    kinds = [thing["kind"] for thing in scene["objects"]]
    return torch.tensor(
        [
            scene["label"],
            GRIDS.index(scene["grid"]),
            colors.index(first),
            colors.index(second or first),
            *kinds,
            *[UNKNOWN] * (max_objects - len(kinds)),
        ]
    )


class Probe(nn.Module):
    """Four strided convolutions, then one linear layer for each fact that sees all positions."""

    def __init__(self, image_size: int, sizes: dict[str, int], width: int = 32):
        super().__init__()
        if image_size % 16:
            raise ValueError(f"image_size={image_size} must be a multiple of 16")
        self.image_size, self.sizes, self.width = image_size, dict(sizes), width
        layers: list[nn.Module] = []
        channels = 3
        for out in (width, 2 * width, 4 * width, 4 * width):
            layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.GroupNorm(8, out)]
            layers.append(nn.SiLU())
            channels = out
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(channels * (image_size // 16) ** 2, sum(sizes.values()))

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: (B, 3, H, W) in [-1, 1]. Returns the logits of each fact, (B, answers)."""
        return list(self.head(self.body(images)).split(list(self.sizes.values()), dim=1))

    def loss(self, images: Tensor, facts: Tensor) -> Tensor:
        """facts: (B, F) long, UNKNOWN ones left out. Returns the mean cross-entropy."""
        parts = [
            F.cross_entropy(logits, facts[:, i], ignore_index=UNKNOWN, reduction="sum")
            for i, logits in enumerate(self(images))
        ]
        return torch.stack(parts).sum() / (facts != UNKNOWN).sum()

    @torch.no_grad()
    def read(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W) in [-1, 1]. Returns the likeliest facts, (B, F) long."""
        device = self.head.weight.device
        return torch.stack([x.argmax(dim=1) for x in self(images.to(device))], dim=1).cpu()

    def save(self, path: str | Path) -> None:
        settings = {"image_size": self.image_size, "sizes": self.sizes, "width": self.width}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"probe": json.dumps(settings)}
        atomic_write(path, lambda p: save_file(self.state_dict(), p, metadata))

    @classmethod
    def load(cls, path: str | Path) -> "Probe":
        """Raises ValueError for a file that holds no probe."""
        try:
            with safe_open(path, framework="pt") as file:
                settings = json.loads((file.metadata() or {})["probe"])
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            probe = cls(**settings)
            probe.load_state_dict(state)
        except Exception as error:  # of the file's format, of JSON, of shapes
            raise ValueError(f"{path} holds no probe ({error}): delete it") from None
        return probe.eval()


@functools.cache
def packaged_probe() -> Probe:
    """The probe that comes with the package, for images of 64 x 64 and scenes of one or two emoji
    of the basic vocabulary: the verifier that benchmarks/tree_search.py trained."""
    file = resources.files("flextok.emoji") / "assets" / "probe-64.safetensors"
    with resources.as_file(file) as path:
        return Probe.load(path)


def read_scenes(
    scenes: EmojiScenes, image_size: int, number: int
) -> tuple[Tensor, Tensor, list[str]]:
    """The first `number` scenes: pictures (n, 3, H, W) in [-1, 1], facts (n, F), captions."""
    transform = ImageTransform(image_size)
    items = [scenes[i] for i in range(number)]
    images = torch.stack([transform(item["image"]) for item in items])
    facts = torch.stack([scene_facts(item, scenes.max_objects) for item in items])
    return images, facts, [item["caption"] for item in items]


def train_probe(
    scenes: EmojiScenes,
    image_size: int,
    steps: int = 1500,
    num_scenes: int = 8000,
    batch_size: int = 64,
    seed: int = 0,
    device: str | torch.device = "cpu",
    width: int = 32,
) -> Probe:
    """A probe for pictures of image_size, in eval mode. It learns from scenes, blurred and with
    noise in random measure, since generated pictures are not as crisp as real ones."""
    number = min(num_scenes, steps * batch_size)
    images, facts, _ = read_scenes(scenes, image_size, number)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = Probe(image_size, fact_sizes(scenes), width).to(device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in tqdm(range(steps), desc="training the probe", unit="step"):
        draws = derived_generator(seed, PROBE, step)
        index = torch.randint(len(images), (batch_size,), generator=draws)
        loss = probe.loss(degrade(images[index], draws).to(device), facts[index].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return probe.eval()


def degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mixes each picture with its blurred self and adds noise of a standard deviation up to 0.2."""
    mix, level = torch.rand(2, len(images), 1, 1, 1, generator=generator)
    blurred = F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    noise = torch.randn(images.shape, generator=generator)
    return images.lerp(blurred, mix) + 0.2 * level * noise
