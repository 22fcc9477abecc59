"""The rows of one name in the parts of a store (parts.py)."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

ENDS = "_ends"  # of a column whose rows have unequal lengths: where each ends


class Column:
    """(n, ...) rows in the order of positions, without those that could not be read."""

    def __init__(self, paths: Iterable[Path], name: str, keep: bool) -> None:
        self.name, self.keep = name, keep
        self.paths, sizes = [], []
        for path in paths:
            if not path.exists():
                raise ValueError(
                    f"{path} is missing: all processes must write to one shared folder"
                )
            with safe_open(path, framework="pt") as file:
                if size := file.get_slice("position").get_shape()[0]:
                    self.paths.append(path)
                    sizes.append(size)
        self.ends = np.cumsum(sizes, dtype=np.int64)
        self._kept: dict[int, tuple[Tensor, Tensor | None]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}  # another process maps the files itself

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def _of_part(self, number: int) -> tuple[Tensor, Tensor | None]:
        """The rows of the number-th part that has any; where each ends if their lengths differ."""
        if number in self._kept:
            return self._kept[number]
        with safe_open(self.paths[number], framework="pt") as file:
            unequal = self.name + ENDS in file.keys()  # noqa: SIM118
            ends = file.get_tensor(self.name + ENDS) if unequal else None
            found: tuple[Tensor, Tensor | None] = file.get_tensor(self.name), ends
        if self.keep:
            self._kept[number] = found
        return found

    def row(self, index: int) -> Tensor:
        """One row, (...). Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"index={index} must be in [0, {len(self)})")
        number = int(np.searchsorted(self.ends, index, side="right"))
        rows, ends = self._of_part(number)
        here = index - int(self.ends[number])  # counted from the part's end
        if ends is None:
            return rows[here]
        here += len(ends)
        return rows[int(ends[here - 1]) if here else 0 : int(ends[here])]

    def __getitem__(self, which: slice | np.ndarray | Tensor) -> Tensor:
        """which: a slice, or an array of positions among the rows. Returns (m, ...)."""
        indices = np.arange(len(self))[which]
        numbers = np.searchsorted(self.ends, indices, side="right")
        pieces = []
        for number in np.unique(numbers):
            rows, ends = self._of_part(int(number))
            assert ends is None, f"the rows of {self.name} have unequal lengths"
            here = indices[numbers == number] - (self.ends[number] - len(rows))
            pieces.append(rows[torch.from_numpy(here)])
        if not pieces:
            raise IndexError(f"no rows of {self.name!r} at {which}")
        order = np.argsort(np.argsort(numbers, kind="stable"))  # from parts back to the asked
        return torch.cat(pieces)[torch.from_numpy(order)]

    def texts(self) -> list[str]:
        """All rows of a column of texts."""
        found = []
        for number in range(len(self.paths)):
            rows, ends = self._of_part(number)
            assert ends is not None, f"the rows of {self.name} are no texts"
            whole = rows.numpy().tobytes()
            found += [whole[a:b].decode() for a, b in itertools.pairwise([0, *ends.tolist()])]
        return found


def as_tensor(row: Tensor | str) -> Tensor:
    """A row of unequal length; a text as its bytes."""
    if isinstance(row, Tensor):
        return row
    content = np.frombuffer(row.encode("utf-8", "replace"), dtype=np.uint8)
    return torch.from_numpy(content.copy())
