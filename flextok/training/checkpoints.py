"""Training checkpoints that outlast kills and bad disks: written whole, and verified before they
are trusted."""

import json
import logging
import re
import shutil
import zlib
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from flextok.files import atomic_write, read_mapping, write_text, writing
from flextok.schema import ConfigError
from flextok.storage import CheckpointError

if TYPE_CHECKING:
    from flextok.training.module import TrainingModule

SUMS = ".sum"  # of a checkpoint that is a file: its checksum, in a file beside it
CHECKSUMS = "checksums-*.json"  # of a checkpoint that is a folder, one for each process
AVERAGE = "average."  # of a LightningModule's state: made when training begins
RUN_FORMAT = 2  # 1, without a number, held a model; 2 holds an objective
log = logging.getLogger(__name__)


class OldRun(ConfigError):
    """A checkpoint of a run that this version cannot continue."""


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints beside their place, then renames them. Lightning's own way goes through
    /tmp, from where a file on another disk arrives bit by bit."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        path = Path(path)

        def write(place: Path) -> None:
            with open(place, "wb") as file:
                summed = Summed(file)
                try:
                    torch.save(checkpoint, summed)  # type: ignore[arg-type]
                except RuntimeError as error:  # torch's words about a disk that was full
                    raise summed.error or error from None
            # there before the checkpoint is, so that no checkpoint is ever without
            record = {"world_size": 1, "files": {path.name: summed.crc32}}
            write_text(sums_of(path), json.dumps(record) + "\n")

        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():  # damaged, or the run would not write here again
                remove(path)
        atomic_write(path, write)


class Summed:
    """A file that is written in order, once, and sums what is written."""

    def __init__(self, file: IO[bytes]):
        self.file, self.crc32 = file, 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def list_checkpoints(folder: Path) -> dict[int, Path]:
    """step -> its checkpoint in `folder`, a file or, with sharded weights, a folder."""
    matches = {path: re.fullmatch(r"step-(\d+)\.ckpt", path.name) for path in folder.glob("*")}
    return {int(match[1]): path for path, match in matches.items() if match}


def find_checkpoint(folder: Path, module: "TrainingModule | None" = None) -> Path | None:
    """The newest intact checkpoint, of `module` if given; None without any. Others are passed over
    with a warning; CheckpointError if all are, OldRun for one of a version whose runs cannot be
    continued, ConfigError where one of the checkpoint and the module has an average and the other
    has none."""
    damage = []
    for _, path in sorted(list_checkpoints(folder).items(), reverse=True):
        try:
            verify(path)
            content = load_checkpoint(path)
            if module is not None:
                check_fits(path, content, module)
        except CheckpointError as error:
            log.warning("%s; looking for an older one", error)
            damage.append(str(error))
        else:
            return path
    if damage:
        raise CheckpointError(
            f"no checkpoint of {folder} is intact: remove them to start over. {damage[0]}"
        )
    return None


def sums_of(path: Path) -> Path:
    """Where the checksum of a checkpoint that is one file lies."""
    return path.with_name(path.name + SUMS)


def verify(path: Path) -> None:
    """Read a checkpoint whole against its checksums. Raises CheckpointError naming what differs."""
    is_folder = path.is_dir()
    try:
        sums = path.glob(CHECKSUMS) if is_folder else [sums_of(path)]
        records = [read_mapping(file, world_size=int, files=dict) for file in sums]
        if not records or len(records) != records[0]["world_size"]:
            raise ValueError("it lacks checksums")
        for name, expected in ChainMap(*(record["files"] for record in records)).items():
            if crc32(path / name if is_folder else path) != expected:
                raise ValueError(f"{name} is truncated or fails its checksum")
    except (ValueError, OSError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {error}") from None


def check_fits(path: Path, content: Mapping[str, Any], module: "TrainingModule") -> None:
    """Refuse a checkpoint of another model, as loading it would, but in time for an older one, and
    one that has an average of the weights where the module has none, or the other way round.
    content: what load_checkpoint gives."""
    if path.is_dir():
        listed = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        state = {
            key.removeprefix("state_dict."): entry.size
            for key, entry in listed.items()
            if key.startswith("state_dict.")
            and isinstance(entry, dcp.metadata.TensorStorageMetadata)
        }
    else:
        state = {name: value.shape for name, value in content["state_dict"].items()}
    ours = {name: value.shape for name, value in module.state_dict().items()}
    theirs = {name: shape for name, shape in state.items() if not name.startswith(AVERAGE)}
    if different := [n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n)]:
        raise CheckpointError(
            f"checkpoint {path} is of another model: {different[0]} and {len(different) - 1} more "
            "tensors differ"
        )
    decay, has_average = module.options.optim.ema_decay, len(theirs) < len(state)
    if has_average != (decay > 0):
        holds, wanted = ("an", "above 0") if has_average else ("no", "0")
        raise ConfigError(
            f"checkpoint {path} holds {holds} average of the weights, so that the run continues "
            f"only with an optim.ema_decay {wanted}, not {decay:g}: change it, choose another "
            "output_dir, or pass resume=false to start over there"
        )


def crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            value = zlib.crc32(block, value)
    return value


def load_checkpoint(path: Path) -> Mapping[str, Any]:
    """A verified checkpoint's content: of a file all, memory-mapped, of a folder all but weights
    and optimizer. Raises CheckpointError for anything else."""
    source = path / "meta.pt" if path.is_dir() else path
    try:
        content = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # what is in a file decides what torch raises
        reason = f"torch cannot load it, {type(error).__name__}"
        raise CheckpointError(f"checkpoint {path} is damaged: {reason}") from None
    kinds = {"global_step": int, "loops": dict, "callbacks": dict}
    if path.is_file():
        kinds |= {"state_dict": dict, "optimizer_states": list, "lr_schedulers": list}
    for key, kind in kinds.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise CheckpointError(f"checkpoint {path} is not one of a run: it has no {key}")
    if content.get("run_format") != RUN_FORMAT:
        raise OldRun(
            f"checkpoint {path} is of another version of flextok, whose runs this one cannot "
            "continue: finish the run with that version, or pass resume=false to start over"
        )
    return content


def link(path: Path, target: str) -> None:
    """Make `path` a symbolic link to its sibling `target`; where there are none, do without."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        aside.unlink(missing_ok=True)
        aside.symlink_to(target)
        aside.replace(path)
    except OSError as error:
        log.debug("no link %s: %s", path, error)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
        sums_of(path).unlink(missing_ok=True)


def set_aside(folder: Path) -> None:
    """Rename a folder of checkpoints, so that a run which starts over never finds them."""
    if folder.exists():
        number = 1
        while (aside := folder.with_name(f"{folder.name}-{number}")).exists():
            number += 1
        folder.rename(aside)
        log.info("the checkpoints of the run before are in %s", aside)
