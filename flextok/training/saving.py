"""When a run saves: regularly, at its best validation, and when a signal asks it to stop. Also the
loggers whose rows outlast a kill."""

import json
import logging
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from flextok.data.loading import SIGNALS
from flextok.data.processes import this_process
from flextok.files import atomic_write, read_mapping, write_text, writing
from flextok.training.checkpoints import SUMS, link, list_checkpoints, remove
from flextok.training.options import FitOptions

BEST = "best.json"
VALIDATED = "validated.json"
log = logging.getLogger(__name__)


class Interrupted(Exception):
    """A signal asked the run to stop, and its state is saved."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"{signal.Signals(signum).name}: stopped after step {step}, saved")
        self.signum, self.step = signum, step


class Checkpoints(Checkpoint):
    """Saves step-<n>.ckpt every options.checkpoint_every steps, at the last one, whenever the
    validation loss is the best so far, and when a signal asks to stop. Keeps the newest
    options.keep_last and the best; last.ckpt is a link to the newest, for people. Also validates
    where an interrupted run did not, and at the end of a run where no validation is due."""

    def __init__(self, folder: Path, options: FitOptions):
        self.folder, self.options = folder, options
        self.step = 0  # the last one seen
        self.saved: int | None = None
        self.received: int | None = None  # the signal
        self.previous: dict[int, Any] = {}  # signal handlers
        self.best: dict[str, Any] | None = None  # step and loss
        self.last_loss: float | None = None
        self.validated = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.fit_loop.epoch_loop.max_steps = self.options.max_steps  # fit() may raise it
        self.step = trainer.global_step
        self.best = self.read_best(trainer.global_step)
        self.validated = read_validated(self.folder)
        self.saved = self.step or None
        self.previous = catch(self.receive)
        # the checkpoint of a step is there before its validation is
        due = self.step % self.options.validate_every == 0 or self.step >= self.options.max_steps
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

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        step, last = trainer.global_step, self.options.max_steps
        if step == self.step:
            return  # gradients are being accumulated
        self.step = step
        stop = trainer.strategy.reduce_boolean_decision(self.received is not None, all=False)
        if stop or step % self.options.checkpoint_every == 0 or step == last:
            connector = trainer._logger_connector
            connector.update_train_step_metrics()  # Lightning logs the step's row after this hook
            self.save(trainer)
        if stop:
            raise Interrupted(self.received or signal.SIGTERM, step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
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
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / name, json.dumps(facts) + "\n")

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
        newest = sorted(n for n in found if n <= step)[-self.options.keep_last :]
        for other in found.keys() - {*newest, self.best["step"] if self.best else step}:
            remove(found[other])
        for leftover in self.folder.glob(".step-*.tmp"):  # of a run killed while it saved
            remove(leftover)
        for path in self.folder.glob("step-*.ckpt" + SUMS):
            if not path.with_suffix("").exists():
                remove(path)

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
        if trainer.enable_validation and self.validated < trainer.global_step:
            validate(trainer)
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


class Once:
    """For loggers: numbers that equal those of the call before are logged once. Checkpoints has a
    step's row logged before it saves, and Lightning logs it again."""

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
