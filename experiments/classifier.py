"""A small convolutional classifier of Fashion-MNIST, whose features and classes measure images."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from flextok.data.fashion_mnist import FashionMNIST
from flextok.evaluation.evaluators import FAITHFUL, FeatureDistances, Rows
from flextok.evaluation.features import Features, file_hash
from flextok.files import atomic_write, read_mapping, write_text

log = logging.getLogger(__name__)
BATCH = 128


class Classifier(nn.Module):
    """Grey images (B, 1, 28, 28) in [-1, 1] -> features (B, 128) and logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inside, out, stride in ((1, 32, 1), (32, 64, 2), (64, 128, 2)):
            layers += [nn.Conv2d(inside, out, 3, stride, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(out), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 49, 128), nn.ReLU())
        self.head = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Features:
        features = self.body(images)
        return Features(features, self.head(features))


class ClassifierNetwork:
    """The trained classifier as a network for the package's evaluators."""

    name, classifies = "classifier", True
    preprocessing = "mean of the channels; (x - 127.5) / 127.5; own size"

    def __init__(self, path: Path, device: str | torch.device, dtype: torch.dtype):
        model = Classifier()
        model.load_state_dict(load_file(path))
        self.model, self.weights = model.eval().to(device, dtype), file_hash(path)
        self.dtype = dtype

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Features:
        grey = pixels.to(self.dtype).mean(dim=1, keepdim=True)
        return self.model((grey - 127.5) / 127.5)


class ClassDistances(FeatureDistances):
    """Distances in the classifier's features, and of reconstructions the share to which it gives
    the same class as to the original."""

    def group_of(self, score: str) -> str:
        return FAITHFUL if score == "class_kept" else super().group_of(score)

    def scores(self, rows: Rows) -> dict[str, float]:
        found = super().scores(rows)
        if rows.paired and rows.real is not None:
            made, real = (side(f"{self.name}/logits").argmax(1) for side in (rows.made, rows.real))
            found["class_kept"] = float((made == real).double().mean())
        return found


def tensors(dataset: FashionMNIST) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 28, 28) in [-1, 1] and labels (n,)."""
    pixels = torch.tensor(dataset.pixels)[:, None]
    return pixels.float() / 127.5 - 1, torch.tensor(dataset.labels)


def train_classifier(root: str, steps: int, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Train a classifier unless `folder` holds one of as many steps, with batches of 128. Writes
    classifier.safetensors and classifier.json there. Returns what the latter holds: steps, accuracy
    (on the test set, all of it) and seed."""
    folder.mkdir(parents=True, exist_ok=True)
    path, facts = folder / "classifier.safetensors", folder / "classifier.json"
    if facts.exists() and path.exists():
        try:
            found = read_mapping(facts, accuracy=float, steps=int, seed=int)
            Classifier().load_state_dict(load_file(path))
            if (found["steps"], found["seed"]) == (steps, seed):
                return found
        except (ValueError, SafetensorError, RuntimeError) as error:
            log.warning("%s and .json are damaged (%s): made again", path, error)
    images, labels = tensors(FashionMNIST(root))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    rng = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(steps), desc="training the classifier", unit="step"):
        rows = torch.randint(len(labels), (BATCH,), generator=rng)
        batch, flipped = images[rows], torch.rand(BATCH, 1, 1, 1, generator=rng) < 0.5
        logits = model(batch.flip(3).where(flipped, batch)).logits
        loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    images, labels = tensors(FashionMNIST(root, "test"))
    with torch.no_grad():
        guesses = torch.cat([model(some).logits.argmax(1) for some in images.split(500)])
    accuracy = float((guesses == labels).double().mean())
    atomic_write(path, lambda place: save_file(model.state_dict(), place))
    found = {"steps": steps, "accuracy": accuracy, "seed": seed}
    write_text(facts, json.dumps(found) + "\n")
    return found
