"""Where a model's files lie (a folder, one file, the hub) and what they hold: JSON and tensors.

Nothing read here is code: safetensors hold none, and pickles load with weights_only=True.
"""

import hashlib
import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

WEIGHTS, CONFIG = "model.safetensors", "config.json"
RELEASES = Path(__file__).parent / "releases"  # models that come with the package, by name
OLD_WEIGHTS = "pytorch_model.bin"  # what hub repositories held before safetensors
PICKLES = (".bin", ".pt", ".pth")
SUFFIXES = (".safetensors", *PICKLES)
LARGEST_SUMMED = 4_000_000_000  # bytes: a second or two
LARGEST_JSON, MOST_LEVELS = 100_000_000, 50  # bytes, and mappings in mappings, of a JSON document


class CheckpointError(ValueError):
    """A model that cannot be loaded; the message names the file and the remedy."""


def resolve(path: str | Path, revision: str | None = None) -> Path:
    """A local folder or file as it is; else a model that comes with the package, by its name; else,
    from the hub or its local cache, the snapshot of a hub id owner/name or the file of
    owner/name/file.bin. Raises CheckpointError."""
    place, name = Path(path), str(path)
    if os.path.isdir(place) or os.path.isfile(place):  # a name too long for a file is neither
        return place
    if os.path.exists(place):  # no name of a hub's, which a pipe would have been asked for
        check_file(place)
    if name in released():
        return RELEASES / name
    parts = name.split("/")
    is_hub_file = len(parts) > 2 and name.endswith(SUFFIXES)
    if name.startswith((".", "/", "~")) or not (len(parts) == 2 or is_hub_file):
        raise CheckpointError(
            f"no model at {name!r}: expected a folder with {CONFIG}, a weight file, a hub id, or "
            f"one of those that come with the package ({', '.join(released())})"
        )
    from huggingface_hub import hf_hub_download, snapshot_download

    repo = "/".join(parts[:2])
    if is_hub_file:
        file = "/".join(parts[2:])
        return Path(from_hub(name, lambda: hf_hub_download(repo, file, revision=revision)))

    def snapshot(*patterns: str) -> Path:
        return Path(
            from_hub(
                name,
                lambda: snapshot_download(repo, revision=revision, allow_patterns=list(patterns)),
            )
        )

    folder = snapshot(WEIGHTS, CONFIG)
    if not (folder / WEIGHTS).is_file():
        folder = snapshot(OLD_WEIGHTS, CONFIG)
    return folder


def released() -> list[str]:
    """The names of the models that come with the package."""
    return sorted(path.parent.name for path in RELEASES.glob(f"*/{CONFIG}"))


def is_path(reference: str) -> bool:
    """Whether a reference to another model can only be a place in a file system."""
    return reference.startswith((".", "~")) or Path(reference).is_absolute()


def find_reference(reference: str, home: Path) -> Path | str | None:
    """Where a model in the folder `home` finds another that it names: beside it, among those that
    come with the package, or by a hub id. None for a path at which nothing lies."""
    if (place := home / reference).exists():
        return place
    name = Path(reference).name if is_path(reference) else reference
    if name in released():
        return RELEASES / name
    return None if is_path(reference) else reference


def written_reference(reference: str, home: Path, folder: Path | None) -> str | None:
    """A reference that holds in the folder `home`, as a model saved in `folder` states it: relative
    to that folder, a name of the package, or a hub id. folder: None for readers elsewhere, to whom
    no path says anything. None where nothing can be stated."""
    place = find_reference(reference, home)
    if not isinstance(place, Path):
        return place
    place = place.parent.resolve() / place.name
    releases = RELEASES.resolve()
    if place.parent == releases and (folder is None or folder.resolve().parent != releases):
        return place.name
    return None if folder is None else Path(os.path.relpath(place, folder.resolve())).as_posix()


def from_hub(name: str, download: Callable[[], str]) -> str:
    """download's result; what goes wrong becomes a CheckpointError that says what to do."""
    from huggingface_hub import constants, errors

    try:
        return download()
    except Exception as error:  # the hub client raises many kinds, some of its dependencies' own
        if constants.HF_HUB_OFFLINE:
            hint = (
                "HF_HUB_OFFLINE is set and the local cache does not hold it: download it once "
                f"with `hf download {'/'.join(name.split('/')[:2])}` or unset the variable"
            )
        elif isinstance(error, errors.GatedRepoError):
            hint = "its owner asks to accept terms first: do so on its page, then `hf auth login`"
        elif isinstance(error, errors.RepositoryNotFoundError):
            hint = "the hub knows no such model: check the name; for a private one, `hf auth login`"
        elif isinstance(error, errors.RevisionNotFoundError):
            hint = "the model has no such revision"
        else:
            reason = " ".join([type(error).__name__, *str(error).splitlines()[:1]])
            hint = (
                f"the hub does not give it ({reason}): check the name and the connection, or "
                "download it elsewhere and pass its folder"
            )
        raise CheckpointError(f"no folder or file {name!r} here; {hint}") from error


def find_weights(folder: Path) -> Path:
    """The weight file of a folder: the one of the usual name, else the only one there is."""
    for name in (WEIGHTS, OLD_WEIGHTS):
        if (folder / name).is_file():
            return folder / name
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if not files:
        raise CheckpointError(f"{folder / WEIGHTS} is missing: the model folder is incomplete")
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise CheckpointError(f"{folder} holds several weight files ({names}): name one of them")
    return files[0]


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file. Raises CheckpointError when it is damaged or something else."""
    check_file(path, LARGEST_JSON)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); write it again") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is not a flextok model's config, nor a published one's")
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
        return _read_pickle(path), {}
    check_length(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError, MemoryError, RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({error}); copy, download or export the model again"
        ) from None


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of tensors by name, with their types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_length(path: Path) -> None:
    """Raise CheckpointError unless a safetensors file is as long as its header says, before all of
    it is mapped: a sparse file may claim more than there is memory."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
        if size < 8 or header > min(size - 8, LARGEST_JSON):
            raise CheckpointError(
                f"{path} is truncated or damaged (a header of {header:,} bytes in a file of "
                f"{size:,}); copy, download or export the model again"
            )
        try:
            entries = json.loads(file.read(header))
            entries.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        except (
            ValueError,
            TypeError,
            KeyError,
            IndexError,
            AttributeError,
            RecursionError,
        ) as error:
            raise CheckpointError(
                f"{path} is truncated or damaged (its header cannot be read: {error}); copy, "
                "download or export the model again"
            ) from None
    if 8 + header + end != size:
        raise CheckpointError(
            f"{path} is truncated or damaged ({size:,} bytes, its header says "
            f"{8 + header + end:,}); copy, download or export the model again"
        )


def check_zip(path: Path) -> None:
    """Raise CheckpointError for a zip file that torch.save did not write: its tensors are mapped
    as they lie in the file, so a compressed one would be read as noise. So would a damaged one:
    up to LARGEST_SUMMED bytes it is read against its checksums."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
            seen: set[str] = set()
            for entry in entries:
                check_entry(path, entry, seen)
                seen.add(entry.filename)
            claimed = sum(entry.file_size for entry in entries)
            if claimed > size:  # parts that lie over each other would be read many times
                raise ValueError(f"its parts have {claimed:,} bytes, the file {size:,}")
            summed = any(entry.CRC for entry in entries)  # torch can be told to leave them out
            if summed and size <= LARGEST_SUMMED and (damaged := file.testzip()) is not None:
                raise ValueError(f"its part {damaged!r} fails its checksum")
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({error}); copy or download it again"
        ) from None


def check_entry(path: Path, entry: zipfile.ZipInfo, seen: Container[str]) -> None:
    """Refuse an entry of check_zip's that is not stored as it is, or there already."""
    packed = entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size
    packed = packed or bool(entry.flag_bits & 1)
    if packed or entry.filename in seen:
        raise CheckpointError(
            f"{path} is refused: its entry {entry.filename!r} "
            f"{'is compressed or encrypted' if packed else 'is there twice'}, as when a file is "
            "unpacked and packed again. Get the original, or write it again with torch.save"
        )


def fault_of(tensor: Tensor) -> str | None:
    """What makes a tensor another thing than numbers that lie in the file; None for a plain one."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return type(tensor).__name__
    if tensor.is_nested:
        return "nested tensor"
    if tensor.layout != torch.strided:
        return f"sparse tensor ({tensor.layout})"
    if tensor.is_quantized:
        return "quantized tensor"
    if tensor.device.type != "cpu":
        return f"tensor without data ({tensor.device})"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"tensor of {tensor.numel():,} elements, more than are stored"
    return None


def _read_pickle(path: Path) -> dict[str, Tensor]:
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
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} holds a {type(value).__name__} under {key!r}, where only tensors are read"
            )
        if fault := fault_of(value):
            raise CheckpointError(
                f"{path} holds a {fault} under {key!r}, where only plain tensors are read"
            )
    return {key: value.detach().resolve_conj().resolve_neg() for key, value in content.items()}
