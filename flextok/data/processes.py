"""Which of several processes this one is, by the variables of torchrun or SLURM."""

import os
from typing import NamedTuple

import torch

from flextok.nn.devices import one_device


class Process(NamedTuple):
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on its machine


def this_process() -> Process:
    """By torchrun's variables, else by those of a SLURM step (srun), else alone. A SLURM batch
    script that runs a command without srun is one process. So are those that Lightning starts,
    which come when the first has done its work before training; they have a local rank."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        found = Process(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
    elif int(env.get("SLURM_STEP_ID", 2**32)) < 2**31:  # batch and interactive steps count down
        tasks = env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"]
        found = Process(int(env["SLURM_PROCID"]), int(tasks), int(env["SLURM_LOCALID"]))
    else:
        found = Process(local_rank=int(env.get("LOCAL_RANK", 0)))
    if not 0 <= found.rank < found.world_size:
        raise ValueError(f"the environment names process {found.rank} of {found.world_size}")
    return found


def is_first() -> bool:
    """Whether this process is the first of those that train together."""
    # LOCAL_RANK alone: Lightning started this process, torchrun or SLURM did not
    return this_process().rank == 0 and int(os.environ.get("LOCAL_RANK", 0)) == 0


def local_device() -> str:
    """This process's GPU where the machine has any, else MPS (Apple's), else the CPU."""
    kind = one_device("auto").type
    if kind == "cuda":
        return f"cuda:{this_process().local_rank % torch.cuda.device_count()}"
    return kind
