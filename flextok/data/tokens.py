"""A token cache: every picture of a data set as indices, in several augmented variants.

A folder of parts (safetensors) and a manifest. Parts are written whole, so an interrupted run
continues after the last one.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from flextok.data.datasets import UNLABELLED
from flextok.data.pictures import CorruptPicture
from flextok.data.stream import Item, SkipCounter, collate, derived_generator
from flextok.data.text import TextCache, pack, unpack
from flextok.data.transforms import ImageTransform
from flextok.hub import atomic_write

MANIFEST = "manifest.json"


class _Variants(Dataset):
    """Position p is variant p % variants of sample p // variants; variant 0 is not augmented."""

    def __init__(self, dataset: Any, transform: ImageTransform, variants: int, seed: int):
        self.dataset, self.transform = dataset, transform
        self.variants, self.seed = variants, seed
        self.skips = SkipCounter()

    def __len__(self) -> int:
        return len(self.dataset) * self.variants

    def __getitem__(self, position: int) -> Item | None:
        index, variant = divmod(position, self.variants)
        generator = derived_generator(self.seed, index, variant) if variant else None
        try:
            item = self.dataset[index]
            return {**item_labels(item), "image": self.transform(item["image"], generator)}
        except CorruptPicture as error:
            self.skips.skip(error)
            return None


def build_token_cache(
    folder: str | Path,
    tokenizer: Any,
    dataset: Any,
    transform: ImageTransform,
    identity: dict[str, Any],
    variants: int = 1,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    part_size: int = 16_384,
    captions: bool = False,
) -> Path:
    """Encode a data set with `tokenizer`, `variants` times each picture, into `folder`; with
    `captions` if asked, "" for pictures without one.

    identity: what the cache was made from (tokenizer fingerprint, data, augmentation). A folder
    made from something else is refused with ValueError; parts already there are kept.
    """
    folder = Path(folder)
    manifest = {**identity, "variants": variants, "seed": seed, "part_size": part_size}
    manifest |= {"num_samples": len(dataset), "class_names": list(dataset.class_names)}
    if captions:
        manifest["captions"] = True
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MANIFEST
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if different := sorted(k for k in manifest if found.get(k) != manifest[k]):
            raise ValueError(
                f"the token cache {folder} was made from something else ({', '.join(different)} "
                "differ): delete it, or name another data.token_cache"
            )
    atomic_write(path, lambda p: p.write_text(json.dumps(manifest, indent=2), encoding="utf-8"))
    positions = _Variants(dataset, transform, variants, seed)
    dtype = torch.uint16 if tokenizer.vocab_size <= 2**16 else torch.int32
    device = next(tokenizer.parameters()).device
    progress = tqdm(total=len(positions), desc="tokenizing", unit="img")
    for number, first in enumerate(range(0, len(positions), part_size)):
        part = folder / f"part-{number:05d}.safetensors"
        subset = range(first, min(first + part_size, len(positions)))
        if part.exists():
            progress.update(len(subset))
            continue
        loader = DataLoader(
            positions,
            batch_size=batch_size,
            sampler=subset,
            num_workers=num_workers,
            collate_fn=collate,
        )
        indices, labels, texts = [], [], []
        for batch in loader:
            if batch:
                indices.append(tokenizer.encode(batch["image"].to(device)).cpu())
                labels.append(batch["label"])
                texts += batch["caption"]
            progress.update(min(batch_size, len(positions) - int(progress.n)))
        if not indices:
            continue
        tensors = {"indices": torch.cat(indices).to(dtype), "labels": torch.cat(labels)}
        if captions:
            tensors["captions"], tensors["caption_ends"] = pack(texts)
        atomic_write(part, lambda p, t=tensors: save_file(t, p))  # type: ignore[misc]
    progress.close()
    return folder


def item_labels(item: Item) -> Item:
    caption = item["caption"]
    return {"label": item["label"], "caption": "" if caption == UNLABELLED else caption}


class TokenDataset(Dataset):
    """The sequences of a token cache: items {"indices": (K,) long, "label": () long}, and "text",
    the row of its caption, once `text` is set."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        self.class_names: list[str] = self.manifest["class_names"]
        self.captions: list[str] = []  # one a sequence, if the cache holds them
        self.text: TextCache | None = None
        parts = sorted(folder.glob("part-*.safetensors"))
        if not parts:
            raise ValueError(f"the token cache {folder} has no parts: build it again")
        indices, labels = [], []
        for part in parts:
            with safe_open(part, framework="pt") as file:
                indices.append(file.get_tensor("indices"))
                labels.append(file.get_tensor("labels"))
                if self.manifest.get("captions"):
                    packed = file.get_tensor("captions"), file.get_tensor("caption_ends")
                    self.captions += unpack(*packed)
        self.indices, self.labels = torch.cat(indices), torch.cat(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        item = {"indices": self.indices[i].long(), "label": self.labels[i]}
        if self.text is not None:
            item["text"] = self.text[self.captions[i]]
        return item
