"""Training checkpoints that outlast kills and bad disks: written whole, verified before they are
trusted; the last few and the best are kept; a signal to stop saves one first."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import lightning as L
import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from flextok.data.loading import SIGNALS
from flextok.data.processes import this_process
from flextok.files import atomic_write, read_mapping, write_text, writing
from flextok.hub import CheckpointError

BEST = "best.json"
VALIDATED = "validated.json"
SUMS = ".sum"  # of a checkpoint that is a file: its checksum and size, in a file beside it
CHECKSUMS = "checksums-*.json"  # of a checkpoint that is a folder, one a process
AVERAGE = "average."  # of a LightningModule's state: made when training begins
log = logging.getLogger(__name__)


class Interrupted(Exception):
    """A signal asked the run to stop, and its state is saved."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"{signal.Signals(signum).name}: stopped after step {step}, saved")
        self.signum, self.step = signum, step


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
            text = json.dumps({"crc32": summed.crc32, "size": summed.size}) + "\n"
            write_text(sums_of(path), text)

        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():  # damaged, or the run would not write here again
                remove(path)
        atomic_write(path, write)


class Summed:
    """A file that is written in order, once, and sums what is written."""

    def __init__(self, file: IO[bytes]):
        self.file, self.crc32, self.size = file, 0, 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        self.size += len(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


class Checkpoints(Checkpoint):
    """Saves step-<n>.ckpt every `every` steps, at the last one, whenever the validation loss is the
    best so far, and when a signal asks to stop. Keeps the newest `keep_last` and the best;
    last.ckpt is a link to the newest, for people."""

    def __init__(self, folder: Path, every: int, keep_last: int = 2, validate_every: int = 1):
        if every < 1 or keep_last < 1:
            raise ValueError(f"checkpoint_every={every} and keep_last={keep_last} must be positive")
        self.folder, self.every, self.keep_last = folder, every, keep_last
        self.validate_every = validate_every
        self.step = 0  # the last one seen
        self.saved: int | None = None
        self.received: int | None = None  # the signal
        self.previous: dict[int, Any] = {}  # signal handlers
        self.best: dict[str, Any] | None = None  # step and loss
        self.last_loss: float | None = None
        self.validated = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step = trainer.global_step
        self.best = self.read_best(trainer.global_step)
        self.validated = read_validated(self.folder)
        self.saved = self.step or None
        self.previous = catch(self.receive)
        # the checkpoint of a step is there before its validation is
        due = self.step % self.validate_every == 0 or self.step == trainer.max_steps
        missing = trainer.strategy.broadcast(due and self.validated < self.step)
        if missing and trainer.enable_validation:
            log.info("repeating the validation of step %d, which was interrupted", self.step)
            validate(trainer)

    def receive(self, signum: int, frame: Any) -> None:
        if self.received is None:
            name, safe = signal.Signals(signum).name, self.saved
            before = "nothing is saved yet" if safe is None else f"step {safe} is saved"
            log.warning("%s: stopping after step %d; until then %s", name, self.step + 1, before)
        elif signum == signal.SIGINT:  # Ctrl-C twice: without goodbye
            self.restore_handlers()
            raise KeyboardInterrupt
        self.received = self.received or signum

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        step = trainer.global_step
        if step == self.step:
            return  # gradients are being accumulated
        self.step = step
        stop = trainer.strategy.reduce_boolean_decision(self.received is not None, all=False)
        if stop or step % self.every == 0 or step == trainer.max_steps:
            connector = trainer._logger_connector
            connector.update_train_step_metrics()  # Lightning logs the step's row after this hook
            self.save(trainer)
        if stop:
            raise Interrupted(self.received or signal.SIGTERM, step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        loss, step = trainer.callback_metrics.get("val/loss"), trainer.global_step
        if loss is not None and loss.isfinite():
            self.last_loss = float(loss)
            if self.best is None or self.last_loss < self.best["loss"]:
                self.best = {"step": step, "loss": self.last_loss}
                self.save(trainer)
                self.record(trainer, BEST, self.best)
        for logger in trainer.loggers:
            logger.save()
        # from here on nothing of this validation can be lost, and it is not repeated
        self.validated = step
        self.record(trainer, VALIDATED, {"step": step})

    def record(self, trainer: L.Trainer, name: str, facts: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            text = json.dumps(facts) + "\n"
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / name, text)

    def save(self, trainer: L.Trainer) -> None:
        step = trainer.global_step
        if self.saved != step:
            path = self.folder / f"step-{step:07d}.ckpt"
            for logger in trainer.loggers:
                logger.save()  # what a checkpoint covers is logged too
            trainer.save_checkpoint(path)
            self.saved = step
            if trainer.is_global_zero:
                link(self.folder / "last.ckpt", path.name)
        if trainer.is_global_zero:
            self.prune(step)

    def prune(self, step: int) -> None:
        """Remove all but the newest and the best. What is newer than the run itself was found
        damaged when the run began."""
        found = list_checkpoints(self.folder)
        kept = {n for n in found if n <= step}
        kept = {*sorted(kept)[-self.keep_last :], self.best["step"] if self.best else step}
        for other in found.keys() - kept:
            remove(found[other])
        for leftover in self.folder.glob(".step-*.tmp"):  # of a run killed while it saved
            remove(leftover)
        for sums in self.folder.glob("step-*.ckpt" + SUMS):
            if not sums.with_suffix("").exists():
                remove(sums)

    def read_best(self, step: int) -> dict[str, Any] | None:
        path = self.folder / BEST
        if not path.exists():
            return None
        try:
            best = read_mapping(path, step=int, loss=float)
        except ValueError as error:
            log.warning("%s; the next validation counts as the best so far", error)
            return None
        return best if best["step"] <= step else None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.restore_handlers()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self.restore_handlers()

    def restore_handlers(self) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)
        self.previous = {}


def read_validated(folder: Path) -> int:
    """The step of the last validation of which everything is recorded, 0 if none is."""
    try:
        return int(read_mapping(folder / VALIDATED, step=int)["step"])
    except ValueError:  # repeating it costs nothing but time
        return 0


class Once:
    """Of loggers: what is the same as the call before counts once. Checkpoints has a step's row
    logged before it saves, and Lightning logs it again."""

    last: tuple[str, int | None] = "", None

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if self.last != (now := (str(metrics), step)):  # as text: NaN is the same as NaN
            self.last = now
            super().log_metrics(metrics, step)  # type: ignore[misc]


class Events(Once, TensorBoardLogger):
    """Logs to TensorBoard."""


class Rows(Once, CSVLogger):
    """Logs to a CSV file that is replaced as a whole: Lightning empties it first to add a column,
    and a kill then would lose all rows."""

    @rank_zero_only
    def save(self) -> None:
        writer = self.experiment
        if not writer.metrics:
            return
        path = Path(writer.metrics_file_path)

        def write(place: Path) -> None:
            if path.exists():
                shutil.copyfile(path, place)
            else:
                place.unlink()  # it looks for a file
            writer.metrics_file_path = str(place)
            try:
                super(Rows, self).save()
            finally:
                writer.metrics_file_path = str(path)

        atomic_write(path, write)


class Validations(L.Callback):
    """Adds a validation at the end of a run where none is due then. Listed first, so that at the
    end the others still work. max_steps: of the run; see train_alone for why it is set here."""

    def __init__(self, checkpoints: Checkpoints, max_steps: int):
        self.checkpoints, self.max_steps = checkpoints, max_steps

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.fit_loop.epoch_loop.max_steps = self.max_steps

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.enable_validation and self.checkpoints.validated < trainer.global_step:
            validate(trainer)


def validate(trainer: L.Trainer) -> None:
    """Validate between two steps, as Lightning itself does after one."""
    connector = trainer._logger_connector
    first = connector._first_loop_iter
    loop = trainer.fit_loop.epoch_loop.val_loop
    trainer.validating = True
    loop.restarting = False  # from the first batch on
    loop.run()
    trainer.training = True
    connector._first_loop_iter = first


def catch(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Have `handler` called for each of SIGNALS but those that are ignored, as nohup has it.
    Returns the handlers that were there before."""
    caught = [signum for signum in SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]
    try:
        return {signum: signal.signal(signum, handler) for signum in caught}
    except ValueError:  # only a program's main thread may: a notebook's server keeps its own
        log.warning("not in the main thread: signals will not save a checkpoint")
        return {}


def requeue(signum: int) -> None:
    """In a SLURM job that SIGUSR1 stopped, its time being up, ask for another. SIGTERM comes from
    scancel, or from a preemption after which SLURM itself requeues the job."""
    job = os.environ.get("SLURM_JOB_ID")
    if signal.Signals(signum).name != "SIGUSR1" or job is None or this_process().rank != 0:
        return
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"scontrol requeue {job} failed ({done.stderr.strip()}): submit it again")
    log.info("requeued SLURM job %s", job)


def list_checkpoints(folder: Path) -> dict[int, Path]:
    """step -> its checkpoint in `folder`, a file or, with sharded weights, a folder."""
    matches = {path: re.fullmatch(r"step-(\d+)\.ckpt", path.name) for path in folder.glob("*")}
    return {int(match[1]): path for path, match in matches.items() if match}


def find_checkpoint(folder: Path, model: nn.Module | None = None) -> Path | None:
    """The newest intact checkpoint, of `model`, a LightningModule, where one is given; None if
    there is none at all. Others are passed over with a warning; CheckpointError if all are."""
    damage = []
    for _, path in sorted(list_checkpoints(folder).items(), reverse=True):
        try:
            verify(path)
            content = load_checkpoint(path)
            if model is not None:
                check_fits(path, content, model)
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
    try:
        if path.is_dir():
            return verify_folder(path)
        if not path.is_file():
            raise CheckpointError(f"checkpoint {path} is neither a file nor a folder")
        if sums_of(path).exists():
            sums = read_mapping(sums_of(path), crc32=int, size=int)
            if (size := path.stat().st_size) != sums["size"]:
                raise CheckpointError(
                    f"checkpoint {path} is truncated or damaged: {size} of {sums['size']} bytes"
                )
            if crc32(path) != sums["crc32"]:
                raise CheckpointError(f"checkpoint {path} is damaged: it fails its checksum")
            return None
        with zipfile.ZipFile(path) as file:  # of an older version, or alone: sums of its parts
            damaged = file.testzip()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged zip raises many kinds
        raise CheckpointError(f"checkpoint {path} is truncated or damaged ({error})") from None
    if damaged is not None:
        raise CheckpointError(f"checkpoint {path} is damaged: {damaged} fails its checksum")


def verify_folder(path: Path) -> None:
    listed: dict[str, int] = {}
    records = [read_mapping(file, world_size=int, files=dict) for file in path.glob(CHECKSUMS)]
    if not records or len(records) != records[0]["world_size"]:
        raise CheckpointError(f"checkpoint {path} is incomplete: it lacks checksums")
    for record in records:
        listed |= record["files"]
    for name, expected in listed.items():
        if crc32(path / name) != expected:
            raise CheckpointError(f"checkpoint {path} is damaged: {name} fails its checksum")


def check_fits(path: Path, content: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse a checkpoint of another model, as loading it would, but in time for an older one.
    content: what load_checkpoint gives."""
    if path.is_dir():
        listed = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        found = {k: getattr(entry, "size", None) for k, entry in listed.items()}
        state = {
            k.removeprefix("state_dict."): size
            for k, size in found.items()
            if k.startswith("state_dict.")
        }
    else:
        state = {name: value.shape for name, value in content["state_dict"].items()}
    ours = {name: value.shape for name, value in model.state_dict().items()}
    theirs = {name: shape for name, shape in state.items() if not name.startswith(AVERAGE)}
    if different := [n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n)]:
        raise CheckpointError(
            f"checkpoint {path} is of another model: {different[0]} and {len(different) - 1} more "
            "tensors differ"
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
