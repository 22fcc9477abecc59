"""A token cache: every image of a data set as indices, in several augmented variants."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flextok.data.labels import list_names, renumbering
from flextok.data.parts import PartStore, Rows
from flextok.data.pictures import UNLABELLED
from flextok.data.processes import Process
from flextok.data.sets import adapt, data_files
from flextok.data.stream import Item
from flextok.data.text import TextCache
from flextok.data.transforms import ImageTransform
from flextok.draws import derived_generator
from flextok.tokenizers.base import Tokenizer, check_indices, encode_rows

CACHE = "token cache"


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
        caption = "" if caption == UNLABELLED else caption
        return {"image": image, "label": label, "caption": caption}


def cache_identity(
    tokenizer: Tokenizer, spec: Any, transform: ImageTransform, bf16: bool = False
) -> dict[str, Any]:
    """What a cache is made from: the tokenizer's codes, the data set's spec, the augmentation."""
    return {
        "codes_id": tokenizer.codes_id,
        "data": spec,
        "augmentation": {
            key: value
            for key, value in asdict(transform.augmentation).items()
            if value or key in ("flip", "shift")  # caches of before the others existed stay valid
        },
        **({"precision": "bf16"} if bf16 else {}),
    }


def build_token_cache(
    folder: str | Path,
    tokenizer: Tokenizer,
    dataset: Any,
    transform: ImageTransform,
    identity: dict[str, Any],
    variants: int = 1,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    part_size: int = 16_384,
    process: Process | None = None,
) -> PartStore:
    """Encode a data set with `tokenizer`, `variants` times each image, into `folder`: this
    process's parts of it, less those already there; captions too, "" for images without one.

    identity: what the cache is made from, by cache_identity. A folder made from something else, or
    from files that have changed since (names, sizes, times), is refused with ValueError; so are
    codes that are not finite."""
    if not tokenizer.vocab_size:
        raise ValueError("the tokenizer is continuous (KL): it has no indices to cache")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    dataset = adapt(dataset)
    source = Variants(dataset, transform, variants, seed)
    made_from = {**identity, "variants": variants, "seed": seed, "data_files": data_files(dataset)}
    made_from["class_names"] = list(dataset.class_names)
    store = PartStore.make(folder, CACHE, made_from, len(source), part_size, process)
    compute = partial(encode, tokenizer, seed=seed, bf16="precision" in identity)
    store.fill(source, compute, batch_size, num_workers, desc="tokenizing")
    return store


def encode(tokenizer: Tokenizer, batch: dict[str, Any], seed: int, bf16: bool) -> Rows:
    """The rows of a batch of Variants: indices (n, K), label (n,), caption."""
    images = batch["image"].to(next(tokenizer.parameters()).device)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        indices = encode_rows(tokenizer, images, seed, batch["position"]).cpu()
    check_indices(indices, tokenizer.num_tokens, tokenizer.vocab_size)
    dtype = torch.uint16 if tokenizer.vocab_size <= 2**16 else torch.uint32
    return {"indices": indices.to(dtype), "label": batch["label"], "caption": batch["caption"]}


class TokenDataset(Dataset):
    """The sequences of a finished token cache, checked and memory-mapped: items {"indices": (K,)
    long, "label": () long}, and "text", the row of its caption, once `text` is set."""

    def __init__(self, path: str | Path) -> None:
        self.store = PartStore.open(path, CACHE)
        self.manifest = self.store.manifest
        names = self.manifest.get("class_names")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path} is damaged (class_names must be texts): make it again")
        self.class_names: list[str] = names
        self.text: TextCache | None = None
        self.store.verify()
        self.indices = self.store.column("indices", keep=True)
        self.labels = self.store.column("label")[:] if len(self.indices) else torch.empty(0).long()
        if len(self) and not 0 <= self.labels.min() <= self.labels.max() < len(names):
            raise ValueError(
                f"{path} has labels from {self.labels.min()} to {self.labels.max()}, but names "
                f"{len(names)} classes: make it again"
            )

    def __getstate__(self) -> dict[str, Any]:
        # another process reads them itself
        return {key: value for key, value in self.__dict__.items() if key != "captions"}

    def check_codes(self, tokenizer: Tokenizer) -> None:
        """Refuse indices that the tokenizer does not have."""
        for first in range(0, len(self), 2**14):
            try:
                some = self.indices[first : first + 2**14].long()
                check_indices(some, tokenizer.num_tokens, tokenizer.vocab_size)
            except ValueError as error:
                raise ValueError(f"{self.store.folder}: {error}") from None

    def count_classes_in(self, class_names: Sequence[str]) -> None:
        """Let labels count in class_names, by name. Raises ValueError for a class of these
        sequences that class_names lacks."""
        present = self.labels.unique().tolist()
        names = [self.class_names[label] for label in present]
        numbers = torch.zeros(len(self.class_names), dtype=torch.long)
        numbers[present] = torch.tensor(renumbering(names, class_names))
        self.labels, self.class_names = numbers[self.labels], list(class_names)

    @cached_property
    def captions(self) -> list[str]:
        """One a sequence, "" where there is none."""
        return self.store.column("caption").texts()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        item = {"indices": self.indices.row(i).long(), "label": self.labels[i]}
        if self.text is not None:
            item["text"] = self.text[self.captions[i]]
        return item
