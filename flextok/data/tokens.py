"""A token cache: every image of a data set as indices, in several augmented variants."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flextok.data.labels import renumbering
from flextok.data.parts import PartStore, Rows
from flextok.data.processes import Process
from flextok.data.text import TextCache
from flextok.data.transforms import ImageTransform
from flextok.data.variants import build_cache
from flextok.tokenizers.base import Tokenizer, check_indices, encode_rows

CACHE = "token cache"


def cache_identity(tokenizer: Tokenizer, spec: Any, bf16: bool = False) -> dict[str, Any]:
    """What a cache is made from: the tokenizer's codes, and the data set's spec."""
    precision = {"precision": "bf16"} if bf16 else {}
    return {"codes_id": tokenizer.codes_id, "data": spec, **precision}


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
    device: str | None = None,
) -> PartStore:
    """Encode a data set with `tokenizer`; captions are kept too, "" for images without one. All
    else as build_cache. identity: of cache_identity. device: where the tokenizer goes if there is
    anything to encode; None = where it is. Raises ValueError also for codes that are not finite."""
    if not tokenizer.vocab_size:
        raise ValueError("the tokenizer is continuous (KL): it has no indices to cache")

    def compute(batch: dict[str, Any]) -> Rows:
        if device is not None:
            tokenizer.to(device)
        return encode(tokenizer, batch, seed, "precision" in identity)

    rest = (variants, batch_size, num_workers, seed, part_size, process, "tokenizing")
    return build_cache(folder, CACHE, dataset, transform, compute, identity, *rest)


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
        self.class_names = names = self.store.texts("class_names")
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
