"""The processes of one evaluation: those that torchrun, or a Trainer, started together."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def barrier() -> None:
    if count() > 1:
        dist.barrier()


@contextmanager
def joined() -> Iterator[None]:
    """Joins the processes that torchrun started; alone, does nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    # gloo: only barriers pass between them; the last one waits for the scores
    dist.init_process_group("gloo", timeout=timedelta(hours=12))
    try:
        yield
    finally:
        dist.destroy_process_group()
