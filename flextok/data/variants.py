"""Caches of what a model makes of each image of a data set, in several augmented variants."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from flextok.data.augmentation import Augmentation
from flextok.data.labels import list_names
from flextok.data.parts import Compute, PartStore
from flextok.data.processes import Process, is_first
from flextok.data.sets import adapt, chosen_items, data_files
from flextok.data.stream import Item
from flextok.data.transforms import ImageTransform
from flextok.draws import derived_generator

log = logging.getLogger(__name__)


class Variants(Dataset):
    """Position p is variant p % variants of sample p // variants; variant 0 is not augmented."""

    def __init__(self, dataset: Any, transform: ImageTransform, variants: int, seed: int) -> None:
        if variants < 1:
            raise ValueError(f"variants={variants} must be at least 1")
        self.dataset, self.transform = dataset, transform
        self.variants, self.seed = variants, seed

    def __len__(self) -> int:
        return len(self.dataset) * self.variants

    def __getitem__(self, position: int) -> Item:
        index, variant = divmod(position, self.variants)
        generator = derived_generator(self.seed, index, variant) if variant else None
        item = self.dataset[index]
        image = self.transform(item["image"], generator)
        label, names = int(item["label"]), self.dataset.class_names
        if label not in range(len(names)):
            raise ValueError(f"label {label} is none of the {list_names(names)}: give class_names")
        several = item.get("captions") or [item.get("caption", "")]
        caption = several[variant % len(several)]  # each in turn
        return {"image": image, "label": label, "caption": caption}


def warn_unused(augmentation: Augmentation, variants: int, key: str) -> None:
    """Warn of asked changes of images where one variant of each, which is the image as it is, is
    kept. key: what states their number."""
    plain = Augmentation()
    names = [field.name for field in fields(plain)]
    asked = [name for name in names if getattr(augmentation, name) != getattr(plain, name)]
    if variants == 1 and asked and is_first():
        log.warning(
            "%s=1 keeps each image as it is, without %s; 2 or more keep it varied, too",
            *(key, ", ".join(asked)),
        )


def build_cache(
    folder: str | Path,
    what: str,
    dataset: Any,
    transform: ImageTransform,
    compute: Compute,
    identity: Mapping[str, Any],
    variants: int = 1,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    part_size: int = 16_384,
    process: Process | None = None,
    desc: str = "",
) -> PartStore:
    """Keep what `compute` makes of a data set, `variants` times each image, in `folder`: this
    process's parts of it, less those already there.

    what: the kind of cache. compute: rows of a batch of Variants. identity: what they depend on
    beside the files, the augmentation and the other arguments here. A folder made from something
    else, or from files that have changed since (names, sizes, times), is refused with
    ValueError."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    dataset = adapt(dataset)
    source = Variants(dataset, transform, variants, seed)
    made_from = {
        **identity,
        "augmentation": {
            key: value
            for key, value in asdict(transform.augmentation).items()
            if value or key in ("flip", "shift")  # caches of before the others existed stay valid
        },
        "variants": variants,
        "seed": seed,
        "data_files": data_files(dataset),
        "class_names": list(dataset.class_names),
    }
    if items := chosen_items(dataset):
        made_from["items"] = items
    store = PartStore.make(folder, what, made_from, len(source), part_size, process)
    store.fill(source, compute, batch_size, num_workers, desc)
    return store
