"""A token cache: every picture of a data set as indices, in several augmented variants.

A folder of parts (safetensors) and a manifest. A part holds a fixed range of positions, encoded in
one order by one process: any number of processes gives the same files, byte for byte. It is written
aside and renamed, so a part that is there is whole and never made again. Once all are there, the
manifest lists their counts and checksums.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from flextok.data.labels import label_table, renumbering
from flextok.data.loading import make_loader, told_in_one_line
from flextok.data.pictures import UNLABELLED, CorruptPicture
from flextok.data.processes import Process, this_process
from flextok.data.stream import Item, collate, counter_of
from flextok.data.text import TextCache, pack, unpack
from flextok.data.transforms import ImageTransform
from flextok.draws import derived_generator
from flextok.files import atomic_write, clear_leftovers, read_mapping, write_text
from flextok.schema import from_mapping
from flextok.storage import checksum
from flextok.tokenizers.base import (
    check_indices,
    encode_rows,
    same_codes,
)

MANIFEST = "manifest.json"
log = logging.getLogger(__name__)


@dataclass
class Part:
    """What the manifest says about a part."""

    file: str
    sequences: int
    unreadable: int
    sha256: str


class _Variants(Dataset):
    """Position p is variant p % variants of sample p // variants; variant 0 is not augmented. What
    cannot be read gives its CorruptPicture."""

    def __init__(self, dataset: Any, transform: ImageTransform, variants: int, seed: int):
        self.dataset, self.transform = dataset, transform
        self.variants, self.seed = variants, seed
        self.skips = counter_of(dataset)

    def __len__(self) -> int:
        return len(self.dataset) * self.variants

    def __getitem__(self, position: int) -> Item | CorruptPicture:
        index, variant = divmod(position, self.variants)
        generator = derived_generator(self.seed, index, variant) if variant else None
        try:
            item = self.dataset[index]
            image = self.transform(item["image"], generator)
        except CorruptPicture as error:
            self.skips.skip(error)
            return error
        several = item.get("captions") or [item["caption"]]
        caption = several[variant % len(several)]  # each in turn
        caption = "" if caption == UNLABELLED else caption
        facts = {"label": item["label"], "caption": caption, "position": position}
        return {"image": image, **facts}


class _Batches:
    """The batches of positions of several parts; none crosses the end of its part."""

    def __init__(self, parts: Sequence[range], batch_size: int):
        self.parts, self.batch_size = parts, batch_size

    def __iter__(self) -> Iterator[range]:
        for part in self.parts:
            for first in range(0, len(part), self.batch_size):
                yield part[first : first + self.batch_size]


def cache_identity(
    tokenizer: Any, spec: Any, transform: ImageTransform, bf16: bool = False
) -> dict[str, Any]:
    """What a cache is made from: the tokenizer's codes, the data set's spec, the augmentation."""
    return {
        "codes_id": tokenizer.codes_id,
        "data": json.loads(json.dumps(spec)),
        "augmentation": {"flip": transform.flip, "crop": transform.crop, "shift": transform.shift},
        **({"precision": "bf16"} if bf16 else {}),
    }


@told_in_one_line()
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
    process: Process | None = None,
) -> bool:
    """Encode a data set with `tokenizer`, `variants` times each picture, into `folder`: this
    process's parts of it, less those already there; captions too, "" for pictures without one.
    Returns whether the whole cache is finished.

    identity: what the cache is made from, by cache_identity. A folder made from something else, or
    from files that have changed since (names, sizes, times), is refused with ValueError; so are
    codes that are not finite."""
    if not tokenizer.vocab_size:
        raise ValueError("the tokenizer is continuous (KL): it has no indices to cache")
    counts = {"variants": variants, "part_size": part_size, "batch_size": batch_size}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    folder, process = Path(folder), process or this_process()
    manifest = {**identity, "variants": variants, "seed": seed, "part_size": part_size}
    manifest |= {"num_samples": len(dataset), "class_names": list(dataset.class_names)}
    manifest |= {"captions": True, "data_files": data_files(dataset)}
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MANIFEST).exists():
        found = read_manifest(folder)
        if "codes_id" not in found and same_codes(found, tokenizer):  # an older cache
            found["codes_id"] = manifest["codes_id"]
        if "data_files" not in found and is_finished(folder):
            log.warning(
                "the token cache %s is of an older version, which did not note the files that it "
                "was made from: delete it if they have changed since",
                folder,
            )
            found["data_files"] = manifest["data_files"]
        if different := sorted(k for k in manifest if found.get(k) != manifest[k]):
            raise ValueError(
                f"the token cache {folder} was made from something else ({', '.join(different)} "
                "differ): delete it, or name another data.token_cache"
            )
        if is_finished(folder):
            return True
    else:
        write_manifest(folder, manifest)
    positions = _Variants(dataset, transform, variants, seed)
    parts = {
        folder / f"part-{number:05d}.safetensors": range(len(positions))[first : first + part_size]
        for number, first in enumerate(range(0, len(positions), part_size))
    }
    mine = dict(list(parts.items())[process.rank :: process.world_size])
    missing = {path: part for path, part in mine.items() if not path.exists()}
    batches_of_parts = _Batches(list(missing.values()), batch_size)
    loader = make_loader(positions, num_workers, batch_sampler=batches_of_parts, collate_fn=list)
    total, done = sum(map(len, mine.values())), sum(map(len, missing.values()))
    progress = tqdm(total=total, initial=total - done, desc="tokenizing", unit="img")
    batches = iter(loader)
    for path, part in missing.items():
        encoded, unreadable = [], []
        for _ in range(0, len(part), batch_size):
            items = next(batches)
            encoded.append(encode(tokenizer, items, seed, bool(manifest.get("precision"))))
            unreadable += [str(item) for item in items if isinstance(item, CorruptPicture)]
            progress.update(len(items))
        clear_leftovers(path)
        write_part(path, encoded, list(dict.fromkeys(unreadable)), tokenizer)
    progress.close()
    return finish(folder, manifest, list(parts))


@runtime_checkable
class Files(Protocol):
    """A data set that tells which files it reads."""

    def state(self) -> Iterator[str]: ...


def data_files(dataset: Any) -> str:
    """A hash of the names, sizes and times of the files behind a data set; none are known of one
    that was made in Python."""
    whole = dataset.dataset if isinstance(dataset, Subset) else dataset
    lines = whole.state() if isinstance(whole, Files) else iter(())
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def encode(tokenizer: Any, items: list[Any], seed: int, bf16: bool) -> dict[str, Any]:
    """Items or their errors -> the batch's indices (n, K) long, label (n,), position (n,) and
    captions; {} if none could be read."""
    batch = collate([None if isinstance(item, CorruptPicture) else item for item in items])
    if not batch:
        return {}
    device = next(tokenizer.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        images = batch.pop("image").to(device)
        batch["indices"] = encode_rows(tokenizer, images, seed, batch["position"]).cpu()
    check_indices(batch["indices"], tokenizer.num_tokens, tokenizer.vocab_size)
    return batch


def write_part(
    path: Path, encoded: list[dict[str, Any]], unreadable: list[str], tokenizer: Any
) -> None:
    dtype = torch.uint16 if tokenizer.vocab_size <= 2**16 else torch.uint32
    batches = [batch for batch in encoded if batch]
    none = torch.empty(0, dtype=torch.long)
    no_indices = none.view(0, tokenizer.num_tokens)
    captions, ends = pack([caption for batch in batches for caption in batch["caption"]])
    tensors = {
        "indices": torch.cat([no_indices, *(b["indices"] for b in batches)]).to(dtype),
        "labels": torch.cat([none, *(b["label"] for b in batches)]),
        "positions": torch.cat([none, *(b["position"] for b in batches)]),
        "captions": captions,
        "caption_ends": ends,
    }
    record = {
        "sequences": len(tensors["labels"]),
        "unreadable": unreadable,
        "sha256": checksum(tensors),
    }
    # one entry: safetensors writes several in no fixed order
    metadata = {"part": json.dumps(record)}
    atomic_write(path, lambda p: save_file(tensors, p, metadata))


def finish(folder: Path, manifest: dict[str, Any], parts: list[Path]) -> bool:
    """Complete the manifest if all parts are there. Whichever process comes last does it."""
    if not all(path.exists() for path in parts):
        return False
    records = []
    for path in parts:
        _, record = read_part(path)
        records.append({"file": path.name, **record, "unreadable": len(record["unreadable"])})
    whole = {"num_sequences": sum(record["sequences"] for record in records), "parts": records}
    write_manifest(folder, {**manifest, **whole})
    return True


def wait_until_finished(folder: Path, poll: float = 1.0) -> None:
    """Wait for the parts that other processes are making."""
    while not is_finished(folder):
        log.info("waiting for the other processes' parts of %s", folder)
        time.sleep(poll)
        poll = min(2 * poll, 30)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    text = json.dumps(manifest, indent=2) + "\n"
    write_text(folder / MANIFEST, text)


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.exists():
        raise ValueError(f"{folder} is no token cache: it has no {MANIFEST}; see flextok tokenize")
    try:
        manifest = read_mapping(path, class_names=list)
        if not all(isinstance(name, str) for name in manifest["class_names"]):
            raise ValueError(f"{path} is damaged (class_names must be texts)")
        if "parts" in manifest:
            parts = [from_mapping(Part, part) for part in read_mapping(path, parts=list)["parts"]]
            if any(Path(part.file).name != part.file for part in parts):
                raise ValueError(f"{path} is damaged (a part lies outside of the folder)")
    except ValueError as error:
        raise ValueError(
            f"{error}: remove {folder} and run the same flextok tokenize, or the same training, "
            "again"
        ) from None
    return manifest


def is_finished(folder: Path) -> bool:
    parts = read_manifest(folder).get("parts")
    return parts is not None and all((folder / part["file"]).exists() for part in parts)


def read_part(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A part's tensors, memory-mapped, and its record: sequences, unreadable, sha256."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            record = json.loads(file.metadata()["part"])
            _ = record["sha256"], len(record["unreadable"]), tensors["indices"], tensors["labels"]
            return tensors, record
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} is missing, damaged or of an older version ({error}): remove it and run the "
            "same flextok tokenize, or the same training, again"
        ) from None


def verify_token_cache(folder: str | Path) -> dict[str, Any]:
    """Check every part against the manifest's checksums, and that no position is there twice.
    Returns the manifest. Raises ValueError naming the part that differs."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    if not is_finished(folder):
        raise ValueError(f"{folder} is not finished: run the same flextok tokenize again")
    last = -1
    for part in manifest["parts"]:
        tensors, _ = read_part(folder / part["file"])
        check_part(folder / part["file"], part, tensors)
        positions = tensors["positions"]
        ascending = bool((positions.diff() > 0).all())
        if len(positions):
            if not ascending or positions[0] <= last:
                raise ValueError(f"{folder / part['file']} holds a position twice: remove {folder}")
            last = int(positions[-1])
    return manifest


def check_part(path: Path, listed: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Refuse a part that is not, bit by bit, what the manifest lists."""
    if checksum(tensors) != listed["sha256"] or len(tensors["labels"]) != listed["sequences"]:
        raise ValueError(
            f"{path} fails its checksum: remove it and run the same flextok tokenize, or the same "
            "training, again"
        )


class TokenDataset(Dataset):
    """The sequences of a finished token cache, checked and memory-mapped: items {"indices": (K,)
    long, "label": () long}, and "text", the row of its caption, once `text` is set."""

    def __init__(self, path: str | Path):
        self.path = folder = Path(path)
        self.manifest = read_manifest(folder)
        if not is_finished(folder):
            raise ValueError(f"the token cache {folder} is unfinished: run flextok tokenize again")
        self.class_names: list[str] = self.manifest["class_names"]
        self.numbers: Tensor | None = None  # of these classes, by the stored labels
        self.text: TextCache | None = None
        self.parts = []
        for part in self.manifest["parts"]:
            tensors, record = read_part(folder / part["file"])
            if record["sha256"] != part["sha256"]:
                raise ValueError(
                    f"{folder / part['file']} is not the part that {MANIFEST} lists: remove it and "
                    "run flextok tokenize again"
                )
            check_part(folder / part["file"], part, tensors)
            labels = tensors["labels"]
            if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.class_names):
                raise ValueError(
                    f"{folder / part['file']} has labels from {labels.min()} to {labels.max()}, "
                    f"but {MANIFEST} names {len(self.class_names)} classes: make it again"
                )
            self.parts.append(tensors)
        self.starts = np.cumsum([0, *(part["sequences"] for part in self.manifest["parts"])])

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("parts", "captions")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state  # a worker that is not forked maps the files itself
        files = [self.path / part["file"] for part in self.manifest["parts"]]
        self.parts = [read_part(file)[0] for file in files]

    def check_codes(self, tokenizer: Any) -> None:
        """Refuse indices that the tokenizer does not have."""
        for part, tensors in zip(self.manifest["parts"], self.parts, strict=True):
            if len(indices := tensors["indices"]):
                try:
                    check_indices(indices.long(), tokenizer.num_tokens, tokenizer.vocab_size)
                except ValueError as error:
                    raise ValueError(f"{self.path / part['file']}: {error}") from None

    def count_classes_in(self, class_names: Sequence[str]) -> None:
        """Let labels count in class_names, by name. Raises ValueError for a class of these
        sequences that class_names lacks."""
        if self.class_names == list(class_names):
            return
        present = {number for part in self.parts for number in part["labels"].unique().tolist()}
        names = [name if i in present else None for i, name in enumerate(self.class_names)]
        renumbering([name for name in names if name is not None], class_names)
        table = label_table(class_names)
        self.numbers = torch.tensor([table.get(name or "", -1) for name in names])
        self.class_names = list(class_names)

    @cached_property
    def captions(self) -> list[str]:
        """One a sequence, "" where there is none."""
        return [
            caption
            for part in self.parts
            for caption in unpack(part["captions"], part["caption_ends"])
        ]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if not 0 <= i < len(self):
            raise IndexError(f"index={i} must be in [0, {len(self)})")
        part = int(np.searchsorted(self.starts, i, side="right")) - 1
        tensors, row = self.parts[part], i - int(self.starts[part])
        label = tensors["labels"][row]
        if self.numbers is not None:
            label = self.numbers[label]
        item = {"indices": tensors["indices"][row].long(), "label": label}
        if self.text is not None:
            item["text"] = self.text[self.captions[i]]
        return item
