"""A latent cache: what the frozen first part of an objective makes of each image of a data set.

A VAE that is not trained gives the same latents in every epoch, and its encoder often costs more
than the rest of a training step. Training reads the latents from parts that any number of processes
write once, several augmented variants of each image, and never runs the encoder.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flextok.data.parts import PartStore, Rows
from flextok.data.processes import Process
from flextok.data.transforms import ImageTransform
from flextok.data.variants import build_cache
from flextok.draws import POSTERIOR, BatchDraws, derived_generator
from flextok.nn.devices import check_finite
from flextok.objectives.base import Objective
from flextok.schema import ConfigError
from flextok.tokenizers.base import Tokenizer

CACHE = "latent cache"
IMAGES = ("image", "draft")  # columns in [-1, 1], kept as uint8


def check_cacheable(objective: Objective) -> None:
    """Raises ConfigError where the objective has no frozen first part, or images of several
    shapes."""
    check_one_shape(objective)
    if not objective.frozen_columns():
        raise ConfigError(
            f"data.latent_variants caches latents, and {type(objective).__name__} has no frozen "
            "encoder here: it takes a model whose vae is kl; else leave the key out"
        )


def check_one_shape(objective: Objective) -> None:
    """Raises ConfigError where the objective's model takes images of several shapes."""
    if isinstance(objective.model, Tokenizer) and len(objective.model.shapes) > 1:
        raise ConfigError(
            "a latent cache (data.latent_variants) holds latents of one shape: leave it out, or "
            "model.shapes"
        )


def latents_identity(objective: Objective, spec: Any) -> dict[str, Any]:
    """What a cache is made from: the frozen weights and settings, and the data set's spec."""
    return {**frozen_part(objective), "data": spec}


def frozen_part(objective: Objective) -> dict[str, Any]:
    found = {"columns": objective.frozen_columns(), **objective.frozen_identity()}
    return json.loads(json.dumps(found))  # as a manifest has it


def build_latent_cache(
    folder: str | Path,
    objective: Objective,
    dataset: Any,
    transform: ImageTransform,
    identity: Mapping[str, Any],
    variants: int = 1,
    batch_size: int = 32,
    num_workers: int = 0,
    seed: int = 0,
    part_size: int = 1024,
    process: Process | None = None,
    device: str | None = None,
) -> PartStore:
    """Keep what objective.frozen makes of a data set: latents in fp16, images in uint8. All else as
    build_cache. objective: prepared. identity: of latents_identity. device: where the model goes if
    there is anything to make; None = where it is. Raises ConfigError where nothing is frozen,
    ValueError for latents that are not finite."""
    check_cacheable(objective)

    @torch.no_grad()
    def compute(batch: dict[str, Any]) -> Rows:
        if device is not None:
            objective.model.to(device)
        images, positions = batch["image"].to(objective.model.device), batch["position"]
        # one generator for a part: what all rows of a step share differs between parts
        shared = derived_generator(seed, POSTERIOR, int(positions[0]) // part_size)
        draws = BatchDraws(len(positions), shared, positions)
        found = objective.frozen({"image": images}, draws)
        rows = {"label": batch["label"]}
        for name in objective.frozen_columns():
            packed = pack(name, check_finite(found[name], f"the cached {name}"))
            rows[name] = check_finite(packed, f"the cached {name} in fp16").cpu()
        return rows

    rest = (variants, batch_size, num_workers, seed, part_size, process, "encoding")
    return build_cache(folder, CACHE, dataset, transform, compute, identity, *rest)


def row_bytes(objective: Objective) -> int:
    """What a row takes in a cache, with its label."""
    model = objective.model
    image = 3 * model.image_size**2
    sizes = dict.fromkeys(IMAGES, image) | {"keep": 8}
    sizes["latents"] = 2 * math.prod(model.noise_shape)
    return 8 + sum(sizes[name] for name in objective.frozen_columns())


def pack(name: str, values: Tensor) -> Tensor:
    """A column as it is kept: images as the uint8 that they were read as, other floats in fp16."""
    if name in IMAGES:
        return ((values + 1) * 127.5).round().to(torch.uint8)
    return values.half() if values.is_floating_point() else values


def unpack(name: str, values: Tensor) -> Tensor:
    """The column in fp32, or its integers."""
    if name in IMAGES:
        return values.float() / 127.5 - 1
    return values.float() if values.is_floating_point() else values


class LatentDataset(Dataset[dict[str, Tensor]]):
    """The rows of a finished latent cache, memory-mapped: items {"latents": (C, h, w) float,
    "label": () long} and the cache's other columns, such as "image" (3, H, W) in [-1, 1]."""

    def __init__(self, path: str | Path, verify: bool = True) -> None:
        """verify: read all parts against their checksums, which build_latent_cache has done, each
        part in one of the processes. Raises ValueError for what is damaged."""
        self.store = PartStore.open(path, CACHE)
        self.manifest = self.store.manifest
        self.class_names = self.store.texts("class_names")
        names = [*self.store.texts("columns"), "label"]
        if verify:
            self.store.verify()
        self.columns = {name: self.store.column(name, keep=True) for name in names}

    def check_made_for(self, objective: Objective) -> None:
        """Raises ValueError unless objective.frozen would make these latents. objective:
        prepared."""
        check_one_shape(objective)
        found = frozen_part(objective)
        if wrong := [key for key, value in found.items() if self.manifest.get(key) != value]:
            raise ValueError(
                f"{self.store.folder} was not made for this {type(objective).__name__} "
                f"({', '.join(wrong)} differ): make it again, by build_latent_cache"
            )

    def __len__(self) -> int:
        return len(self.columns["label"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: unpack(name, rows.row(index)) for name, rows in self.columns.items()}
