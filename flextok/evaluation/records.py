"""What an evaluation has measured so far, by picture, on disk.

Rows lie in parts of consecutive pictures; each part is written whole by one process. So memory
stays flat however many pictures there are, an interrupted evaluation continues after its last part,
every picture counts once whatever the number of processes, and the scores, computed from the rows
in the pictures' order, cannot depend on batches.
"""

import json
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flextok.evaluation import processes
from flextok.files import atomic_write, write_text
from flextok.storage import checksum

PART = 64  # pictures: the unit of work that an interruption may lose, and that processes share
MANIFEST = "identity.json"
MARK = "flextok evaluation"  # the first key of a manifest: this folder's files are ours to remove
OWN = re.compile(r"\.?(part-\d{6}\.safetensors|identity\.json)(\.\w+\.tmp)?")
log = logging.getLogger(__name__)


class Records:
    """Rows of named tensors for the pictures 0 .. length - 1, in a folder that all processes share.

    identity: what the rows depend on. Rows of anything else in the folder, and damaged ones, are
    measured again. Raises ValueError for a folder with files that no evaluation wrote.
    """

    def __init__(self, folder: Path, length: int, identity: dict[str, Any]):
        self.folder, self.length = folder, length
        if processes.rank() == 0:
            facts = {MARK: 1, **identity, "length": length}
            self._prepare(json.dumps(facts, sort_keys=True, indent=2))
        processes.barrier()
        missing = [p for p in range(-(-length // PART)) if not self._path(p).exists()]
        processes.barrier()  # nobody writes before everybody has looked
        mine = missing[processes.rank() :: processes.count()]
        self.missing = [i for part in mine for i in self._range(part)]  # this process's pictures
        self._left = {part: len(self._range(part)) for part in mine}
        self._pending: dict[int, list[dict[str, Tensor]]] = {part: [] for part in mine}

    def _prepare(self, identity: str) -> None:
        manifest = self.folder / MANIFEST
        self.folder.mkdir(parents=True, exist_ok=True)
        held = read_manifest(manifest)
        others = [path.name for path in self.folder.iterdir() if not OWN.fullmatch(path.name)]
        if held is None and others:
            raise ValueError(
                f"{self.folder} holds files that no evaluation wrote, such as {others[0]}: choose "
                "another output folder, or move them away"
            )
        if held == identity:
            log.info("continuing the evaluation in %s", self.folder)
            for part in self.folder.glob("part-*.safetensors"):
                if (damage := self._damage(part)) is not None:
                    log.warning("%s is damaged (%s): it is measured again", part, damage)
                    part.unlink()
        elif any(self.folder.iterdir()):
            log.info("%s holds another evaluation: starting over", self.folder)
            self._remove()
        write_text(manifest, identity)

    def _damage(self, path: Path) -> str | None:
        """What is wrong with a part, None if it is whole."""
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                stated = (file.metadata() or {}).get("checksum")
        except (SafetensorError, OSError) as error:
            return str(error)
        return None if stated == checksum(tensors) else "its checksum differs"

    def _remove(self) -> None:
        """Remove the files that an evaluation writes here, the manifest last; nothing else."""
        found = [path for path in self.folder.iterdir() if OWN.fullmatch(path.name)]
        for path in sorted(found, key=lambda path: path.name == MANIFEST):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the records, and their folder unless somebody put a file of their own there."""
        self._remove()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.safetensors"

    def _range(self, part: int) -> range:
        return range(part * PART, min((part + 1) * PART, self.length))

    def add(self, asked: list[int], rows: dict[str, Tensor]) -> None:
        """asked: the pictures of a batch, in order; rows: tensors with a row for each that could be
        read, whose numbers are rows["index"]; {} if none could."""
        for part, number in Counter(i // PART for i in asked).items():
            if rows:
                here = rows["index"] // PART == part
                self._pending[part].append({k: v[here] for k, v in rows.items() if here.any()})
            self._left[part] -= number
            if self._left[part] == 0:
                self._write(part, [rows for rows in self._pending.pop(part) if rows])

    def _write(self, part: int, pieces: list[dict[str, Tensor]]) -> None:
        names = pieces[0] if pieces else {}
        tensors = {k: torch.cat([piece[k] for piece in pieces]).contiguous() for k in names}
        tensors.setdefault("index", torch.empty(0, dtype=torch.long))
        facts = {"checksum": checksum(tensors)}
        atomic_write(self._path(part), lambda path: save_file(tensors, path, facts))

    def column(self, name: str) -> "Column":
        """All rows of one name, when every process is done."""
        return Column([self._path(p) for p in range(-(-self.length // PART))], name)


def read_manifest(path: Path) -> str | None:
    """The text of an evaluation's manifest; None where there is none, or another program's."""
    try:
        text = path.read_text(encoding="utf-8")
        facts = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return None
    return text if isinstance(facts, dict) and MARK in facts else None


class Column:
    """(n, ...) rows in the order of the pictures, read from the parts as they are asked for."""

    def __init__(self, parts: list[Path], name: str):
        self.name, self.parts, sizes = name, [], []
        for path in parts:
            if not path.exists():
                raise ValueError(
                    f"{path} is missing: all processes must write to one shared output folder"
                )
            with safe_open(path, framework="pt") as file:
                if size := file.get_slice("index").get_shape()[0]:
                    self.parts.append(path)
                    sizes.append(size)
        self.ends = np.cumsum(sizes)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, which: Any) -> Tensor:
        """which: a slice or an array of positions among the rows. Returns (m, ...)."""
        positions = np.arange(len(self))[which]
        parts = np.searchsorted(self.ends, positions, side="right")
        result: Tensor | None = None
        for part in np.unique(parts):
            with safe_open(self.parts[part], framework="pt") as file:
                rows = file.get_tensor(self.name)
            first = self.ends[part] - len(rows)
            here = torch.from_numpy(parts == part)
            if result is None:
                result = rows.new_empty(len(positions), *rows.shape[1:])
            result[here] = rows[torch.from_numpy(positions[here.numpy()] - first)]
        if result is None:
            raise IndexError(f"no rows of {self.name!r} at {which}")
        return result
