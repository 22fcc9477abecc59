"""Data loaders whose workers leave signals to the main process, with failures in one line."""

import atexit
import multiprocessing
import re
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader, Dataset

# kill, Ctrl-C, a closed terminal, Ctrl-\, and what SLURM can send before a job's time is over
# (--signal=USR1@120); some systems have only the first two
NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
SIGNALS = tuple(signal.Signals[name] for name in NAMES if name in signal.Signals.__members__)


class WorkerDied(OSError):
    """A worker process of a data loader was killed; the message names the remedy."""


def make_loader(dataset: Dataset, num_workers: int, **options: Any) -> DataLoader:
    """A DataLoader whose workers ignore signals to stop: these often go to a whole group of
    processes, and the main one must still finish its step and save."""
    return DataLoader(dataset, num_workers=num_workers, worker_init_fn=ignore_signals, **options)


@atexit.register
def end_workers() -> None:
    """At its exit Python sends SIGTERM to what workers are left, and waits for them: for ever,
    where they ignore it."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def ignore_signals(worker: int) -> None:
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


@contextmanager
def failures_in_one_line() -> Iterator[None]:
    """Raises WorkerDied where torch reports that a worker was killed, and a worker's ValueError
    without the worker's traceback."""
    try:
        try:
            yield
        except (ConnectionError, EOFError) as error:
            frames = traceback.extract_tb(error.__traceback__)
            if not any("multiprocessing" in frame.filename for frame in frames):
                raise
            time.sleep(1)  # torch's own news of the death comes by a signal, as RuntimeError
            raise RuntimeError("DataLoader worker (pid unknown) died as it sent a batch") from None
    except RuntimeError as error:
        if not (found := re.match(r"DataLoader worker \(pid.*", str(error))):
            raise
        raise WorkerDied(
            f"{found[0].rstrip('. ')}. Often the machine is out of memory: take fewer workers or "
            "smaller batches, and run the same command again to continue"
        ) from None
    except ValueError as error:
        if not str(error).startswith("Caught ") or "DataLoader worker" not in str(error):
            raise
        raise ValueError(str(error).strip().splitlines()[-1].partition(": ")[2]) from None
