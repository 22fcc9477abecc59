"""What lies in a file that somebody else may have written: JSON, and tensors by name.

Nothing read here is code: safetensors hold none, and pickles load with weights_only=True.
"""

import hashlib
import math
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flextok.files import read_mapping

PICKLES = (".bin", ".pt", ".pth")
SUFFIXES = (".safetensors", *PICKLES)
INDEX = ".index.json"  # ends the name of the file that lists the files of a sharded model
LARGEST_SUMMED = 4_000_000_000  # bytes: a second or two
LARGEST_JSON, MOST_LEVELS = 100_000_000, 50  # bytes, and mappings in mappings, of a JSON document


class CheckpointError(ValueError):
    """A model that cannot be loaded; the message names the file and the remedy."""


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file. Raises CheckpointError when it is damaged or something else."""
    check_file(path, LARGEST_JSON)
    try:
        document = read_mapping(path)
    except ValueError as error:
        raise CheckpointError(f"{error}; write it again") from None
    level: list[Any] = [document]
    for _ in range(MOST_LEVELS):
        items = [item.values() if isinstance(item, dict) else item for item in level]
        level = [value for some in items for value in some if isinstance(value, dict | list)]
    if level:
        raise CheckpointError(f"{path} is damaged: nested in more than {MOST_LEVELS} levels")
    return document


def check_file(path: Path, most: float = math.inf) -> None:
    """Raise CheckpointError unless a path is a regular file of at most so many bytes: a pipe would
    be waited for."""
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "is no regular file"
        raise CheckpointError(f"{path} {kind if path.exists() else 'is missing'}: a file is needed")
    if (size := path.stat().st_size) > most:
        raise CheckpointError(f"{path} has {size:,} bytes, at most {most:,.0f} are read")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file by name, memory-mapped where the format allows it, and a safetensors
    file's metadata. Raises CheckpointError for anything else than plain tensors."""
    check_file(path)
    if path.suffix in PICKLES:
        return read_pickle(path), {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError, MemoryError, RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({error}); copy, download or export the model again"
        ) from None


def read_shards(index: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As read_tensors, of safetensors files that an index beside them lists by tensor. Raises
    CheckpointError, also for an index that names a file elsewhere."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} has no weight_map: copy or download the model again")
    state: dict[str, Tensor] = {}
    for name in sorted(set(map(str, places.values()))):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {name!r}, which is no safetensors file beside it")
        tensors, metadata = read_tensors(index.with_name(name))
        state |= tensors
    if astray := sorted(set(places) ^ set(state)):
        raise CheckpointError(
            f"{index} does not list what its files hold, such as {astray[0]!r}: copy or download "
            "the model again"
        )
    return state, metadata


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of tensors by name, with their types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_zip(path: Path) -> None:
    """Raise CheckpointError for a zip file that torch.save did not write: its tensors are mapped
    as they lie in the file, so a compressed one would be read as noise. So would a damaged one:
    up to LARGEST_SUMMED bytes it is read against its checksums."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
            times = Counter(entry.filename for entry in entries)
            for entry in entries:
                stored = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1
                as_it_lies = stored and entry.compress_size == entry.file_size
                if not as_it_lies or times[entry.filename] > 1:
                    fault = "is there twice" if as_it_lies else "is compressed or encrypted"
                    raise CheckpointError(
                        f"{path} is refused: its entry {entry.filename!r} {fault}, as when a file "
                        "is unpacked and packed again. Get the original, or write it again with "
                        "torch.save"
                    )
            claimed = sum(entry.file_size for entry in entries)
            if claimed > size:  # parts that lie over each other would be read many times
                raise ValueError(f"its parts have {claimed:,} bytes, the file {size:,}")
            summed = any(entry.CRC for entry in entries)  # torch leaves them out if asked
            if summed and size <= LARGEST_SUMMED and (damaged := file.testzip()) is not None:
                raise ValueError(f"its part {damaged!r} fails its checksum")
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({error}); copy or download it again"
        ) from None


def fault_of(value: object) -> str | None:
    """What makes a value another thing than numbers that lie in the file; None for a plain
    tensor."""
    if type(value) not in (Tensor, nn.Parameter):
        return type(value).__name__
    assert isinstance(value, Tensor)
    if value.is_nested:
        return "nested tensor"
    if value.layout != torch.strided:
        return f"sparse tensor ({value.layout})"
    if value.is_quantized:
        return "quantized tensor"
    if value.device.type != "cpu":
        return f"tensor without data ({value.device})"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"tensor of {value.numel():,} elements, more than are stored"
    return None


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors by name of a file that torch.save wrote. Raises CheckpointError."""
    mmap = zipfile.is_zipfile(path)  # torch cannot map the format that it wrote before 1.6
    if mmap:
        check_zip(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        # torch's message advises to allow code: ours names the culprit and advises not to
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"its pickle names {named[1]!r}" if named else "its pickle is damaged or hostile"
        raise CheckpointError(
            f"{path} is refused: {reason}, and only plain tensors are read. Nothing in it was run; "
            "get the model from a source that you trust, best as safetensors"
        ) from None
    except Exception as error:  # zip, end-of-file and OS errors alike mean an unusable file
        raise CheckpointError(
            f"{path} is truncated or damaged ({type(error).__name__}); copy or download it again"
        ) from None
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not tensors by name")
    for key, value in content.items():
        fault = fault_of(value) if isinstance(key, str) else type(value).__name__
        if fault is not None:
            raise CheckpointError(
                f"{path} holds a {fault} under {key!r}, where only plain tensors are read"
            )
    return {key: value.detach().resolve_conj().resolve_neg() for key, value in content.items()}
