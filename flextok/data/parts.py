"""The part store: what was worked out for each position of a data set, on disk.

Token, caption and latent caches and evaluations lie in one: `length` positions, cut into parts of
`part_size`. A part is a safetensors file, written whole by one process: part p belongs to process
p mod world_size. So any number of processes gives the same files, an interruption loses at most a
part for each process, and every position counts once. The manifest holds the store's identity,
which is all that its rows depend on, and each part names it.

    store = PartStore.make(folder, "token cache", identity, len(dataset), part_size)
    store.fill(dataset, compute, batch_size)        # this process's missing parts
    store.wait()                                    # the other processes'
    codes = store.column("codes")                   # codes.row(i), codes[10:20], codes[array]

`compute(batch)` returns the batch's rows by name: a tensor (n, ...), a list of tensors of unequal
lengths, or a list of texts. Each part also has the column "position", since what cannot be read has
no row. Several variants of an image are several positions of a data set, as in variants.Variants.
"""

import hashlib
import itertools
import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from flextok.data.columns import ENDS, Column, as_tensor
from flextok.data.loading import failures_in_one_line, make_loader
from flextok.data.pictures import CorruptPicture
from flextok.data.processes import Process, this_process
from flextok.data.stream import Item, collate, counter_of
from flextok.files import atomic_write, clear_leftovers, differences, read_mapping, write_text
from flextok.storage import checksum

MANIFEST = "manifest.json"
MARK = "flextok"  # the first key of a manifest: this folder's files are ours to remove
OWN = re.compile(r"\.?(part-\d{6}\.safetensors|manifest\.json)(\.\w+\.tmp)?")
REMEDY = "delete it and run what made it again"
log = logging.getLogger(__name__)

Rows = Mapping[str, Tensor | list[Tensor] | list[str]]
Compute = Callable[[dict[str, Any]], Rows]


class PartStore:
    """Parts in a folder. `make` begins or continues one, `open` reads one."""

    def __init__(self, folder: Path, manifest: dict[str, Any], process: Process) -> None:
        self.folder, self.manifest, self.process = folder, manifest, process
        self.what, self.length = str(manifest[MARK]), int(manifest["length"])
        self.part_size = int(manifest["part_size"])
        self.num_parts = -(-self.length // self.part_size)
        self.id = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def make(
        cls,
        folder: str | Path,
        what: str,
        identity: Mapping[str, Any],
        length: int,
        part_size: int,
        process: Process | None = None,
        replace: bool = False,
    ) -> "PartStore":
        """Begin a store, or continue the one of the same identity in `folder`. Damaged parts of
        this process are removed with a warning, to be made again.

        identity: plain data, the same on every process. Where the folder's is another one, raises
        ValueError naming the keys that differ; with `replace`, of one process before the others
        join, removes that store and begins anew. Raises ValueError for a folder with files of
        others, if replaced."""
        folder, process = Path(folder), process or this_process()
        if part_size < 1:
            raise ValueError(f"part_size={part_size} must be at least 1")
        manifest = {MARK: what, **identity, "length": length, "part_size": part_size}
        manifest = json.loads(json.dumps(manifest))
        store = cls(folder, manifest, process)
        folder.mkdir(parents=True, exist_ok=True)
        if not replace:
            store._join()
        else:
            store._replace()
        for part in store._mine():
            if (path := store.path(part)).exists():
                try:
                    store.read(part)
                except ValueError as error:
                    log.warning("%s: it is made again", error)
                    path.unlink()
        return store

    @classmethod
    def open(cls, folder: str | Path, what: str) -> "PartStore":
        """The store in `folder`. Raises ValueError where there is none, or it is damaged."""
        folder = Path(folder)
        manifest = _read_manifest(folder, what)
        for key in ("length", "part_size"):
            value = manifest.get(key)
            if type(value) is not int or value < (key == "part_size"):
                path = folder / MANIFEST
                raise ValueError(f"{path} is damaged ({key}={value!r}): remove {folder}, {REMEDY}")
        return cls(folder, manifest, Process())

    def _join(self) -> None:
        if not (self.folder / MANIFEST).exists():
            return self._write_manifest()
        found = _read_manifest(self.folder, self.what)
        # a folder is the same one however its path is written
        if different := sorted({k.partition(".")[0] for k in differences(found, self.manifest)}):
            raise ValueError(
                f"the {self.what} {self.folder} was made from something else "
                f"({', '.join(different)} differ): delete it, or name another folder"
            )

    def _replace(self) -> None:
        held = _held(self.folder)
        ours = held is not None and held.get(MARK) == self.what
        others = [path.name for path in self.folder.iterdir() if not OWN.fullmatch(path.name)]
        if held is not None:
            others.append(MANIFEST)
        if others and not ours:
            raise ValueError(
                f"{self.folder} holds files that no {self.what} wrote, such as {others[0]}: choose "
                "another output folder, or move them away"
            )
        if held == self.manifest:
            log.info("continuing the %s in %s", self.what, self.folder)
            return
        if any(self.folder.iterdir()):
            log.info("%s holds another %s: starting over", self.folder, self.what)
            self._remove_files()
        self._write_manifest()

    def _write_manifest(self) -> None:
        write_text(self.folder / MANIFEST, json.dumps(self.manifest, indent=2) + "\n")

    def path(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.safetensors"

    def positions(self, part: int) -> range:
        return range(part * self.part_size, min((part + 1) * self.part_size, self.length))

    def _mine(self) -> range:
        return range(self.process.rank, self.num_parts, self.process.world_size)

    def missing(self) -> list[int]:
        """The parts that this process has to make."""
        return [part for part in self._mine() if not self.path(part).exists()]

    @property
    def is_finished(self) -> bool:
        return all(self.path(part).exists() for part in range(self.num_parts))

    def wait(self, poll: float = 1.0) -> None:
        """Wait for the parts that other processes are making."""
        while not self.is_finished:
            log.info("waiting for the other processes' parts of %s", self.folder)
            time.sleep(poll)
            poll = min(2 * poll, 30)

    def fill(
        self,
        dataset: Any,
        compute: Compute,
        batch_size: int,
        num_workers: int = 0,
        desc: str = "",
        unit: str = "img",
    ) -> None:
        """Make this process's missing parts.

        dataset: `length` items, mappings; one that raises CorruptPicture is skipped with a warning
        and has no row. compute: rows of a batch of items as `collate` stacks them, with their
        "position", (n,) long; no batch crosses the end of a part."""
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        missing = self.missing()
        batches = []
        for positions in map(self.positions, missing):
            firsts = range(0, len(positions), batch_size)
            batches.append([positions[first : first + batch_size] for first in firsts])
        total = sum(len(self.positions(part)) for part in self._mine())
        done = total - sum(len(positions) for part in batches for positions in part)
        loader = make_loader(
            _Readable(dataset),
            num_workers,
            batch_sampler=list(itertools.chain.from_iterable(batches)),
            collate_fn=_collate,
        )
        hidden = self.process.rank > 0
        bar = tqdm(total=total, initial=done, desc=desc, unit=unit, disable=hidden)
        with bar, failures_in_one_line():
            loaded = iter(loader)
            for part, asked in zip(missing, batches, strict=True):
                rows: list[Rows] = []
                unreadable: dict[str, None] = {}
                for positions in asked:
                    batch, errors = next(loaded)
                    unreadable |= dict.fromkeys(errors)
                    if batch:
                        rows.append({"position": batch["position"], **compute(batch)})
                    bar.update(len(positions))
                self.write(part, rows, list(unreadable))

    def write(self, part: int, rows: Sequence[Rows], unreadable: Sequence[str] = ()) -> None:
        """Write the rows of a part's batches, each with "position"."""
        rows = rows or [{"position": torch.empty(0, dtype=torch.long)}]
        tensors: dict[str, Tensor] = {}
        for name, first in rows[0].items():
            values = [batch[name] for batch in rows]
            if isinstance(first, Tensor):
                tensors[name] = torch.cat(values).cpu().contiguous()  # type: ignore[arg-type]
            else:
                several = [as_tensor(row) for batch in values for row in batch]
                tensors[name] = torch.cat(several).cpu().contiguous()
                tensors[name + ENDS] = torch.tensor([len(row) for row in several]).cumsum(0)
        facts = {"store": self.id, "part": part, "unreadable": list(unreadable)}
        facts["sha256"] = _digest(tensors, facts)
        # one entry: safetensors writes several in no fixed order
        metadata = {"part": json.dumps(facts)}
        clear_leftovers(self.path(part))
        atomic_write(self.path(part), lambda path: save_file(tensors, path, metadata))

    def read(self, part: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A part's tensors, memory-mapped and checked, and its facts. Raises ValueError."""
        path = self.path(part)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                facts = json.loads(file.metadata()["part"])
            stated = facts.pop("sha256")
            whole = stated == _digest(tensors, facts)
        except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as e:
            raise ValueError(f"{path} is damaged ({e}); {REMEDY}") from None
        if not whole:
            raise ValueError(f"{path} is damaged (its checksum differs); {REMEDY}")
        if facts["store"] != self.id or facts["part"] != part:
            raise ValueError(f"{path} is not part {part} of this {self.what}; {REMEDY}")
        positions, asked = tensors["position"], self.positions(part)
        inside = not len(positions) or asked[0] <= positions[0] <= positions[-1] <= asked[-1]
        if not (inside and bool((positions.diff() > 0).all())):
            raise ValueError(f"{path} holds a position twice, or one of another part; {REMEDY}")
        return tensors, facts

    def verify(self) -> list[str]:
        """Check every part of a finished store. Returns what could not be read. Raises ValueError
        naming the first part that is damaged."""
        if not self.is_finished:
            raise ValueError(f"the {self.what} {self.folder} is unfinished: run what made it again")
        return [name for n in range(self.num_parts) for name in self.read(n)[1]["unreadable"]]

    def texts(self, key: str) -> list[str]:
        """A list of texts in the manifest. Raises ValueError for anything else."""
        found = self.manifest.get(key)
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            raise ValueError(f"{self.folder} is damaged ({key} must be texts): make it again")
        return found

    def column(self, name: str, keep: bool = False) -> "Column":
        """The rows of one name, once all parts are there. keep: memory-map each part once, for many
        single rows; without, memory stays flat."""
        return Column([self.path(part) for part in range(self.num_parts)], name, keep)

    def remove(self) -> None:
        """Remove the store, and its folder unless somebody put a file of their own there."""
        self._remove_files()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _remove_files(self) -> None:
        """Remove our files, the manifest last."""
        found = [path for path in self.folder.iterdir() if OWN.fullmatch(path.name)]
        for path in sorted(found, key=lambda path: path.name == MANIFEST):
            path.unlink(missing_ok=True)


class _Readable(Dataset):
    """Items with their positions, or the error of what cannot be read."""

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.skips = dataset, counter_of(dataset)

    def __getitem__(self, position: int) -> Item | CorruptPicture:
        try:
            return {**self.dataset[position], "position": position}
        except CorruptPicture as error:
            self.skips.skip(error)
            return error


def _collate(items: list[Item | CorruptPicture]) -> tuple[dict[str, Any], list[str]]:
    errors = [str(item) for item in items if isinstance(item, CorruptPicture)]
    return collate([None if isinstance(i, CorruptPicture) else i for i in items]), errors


def _digest(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(f"{checksum(tensors)} {json.dumps(facts)}".encode()).hexdigest()


def _held(folder: Path) -> dict[str, Any] | None:
    """A folder's manifest; None where there is none, or it cannot be read."""
    with suppress(ValueError):
        return read_mapping(folder / MANIFEST)
    return None


def _read_manifest(folder: Path, what: str) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.exists():
        raise ValueError(f"{folder} is no {what}: it has no {MANIFEST}")
    try:
        manifest = read_mapping(path)
    except ValueError as error:
        raise ValueError(f"{error}: remove {folder} and run what made it again") from None
    if manifest.get(MARK) != what:
        raise ValueError(
            f"{path} is of no {what}, or of one of an older version: name another folder, or "
            f"{REMEDY}"
        )
    return manifest
