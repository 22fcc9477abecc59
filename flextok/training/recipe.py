"""Configs for a folder of pictures: a tokenizer and a generator that fit the memory at hand.

The recipe is the quickstart's (Muon, iFSQ, truncated prefixes, spread registers), which is measured
on a CPU at 64 pixels. The sizes for GPUs follow plan.py's estimate of their memory; they have not
been trained.
"""

from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flextok.config import ExperimentConfig, load_experiment, save_experiment
from flextok.data.datasets import ImageFolder
from flextok.data.labels import renumbering
from flextok.schema import ConfigError, check_number, from_mapping
from flextok.training.plan import plan

USABLE = 0.92  # of a GPU's memory: the rest is for CUDA and what fragmentation wastes


class Sizes(NamedTuple):
    """The sizes of a tokenizer and its generator."""

    encoder: tuple[int, int]  # depth, width
    decoder: tuple[int, int]
    generator: tuple[int, int]
    grid: int  # patches a side
    registers: int
    levels: list[int]


CPU = Sizes((2, 128), (4, 128), (4, 128), 8, 16, [8, 8, 8])
GPU = [  # the largest first
    Sizes((12, 768), (18, 1024), (16, 1024), 16, 256, [8, 8, 8, 5, 5, 5]),
    Sizes((8, 512), (12, 768), (12, 768), 16, 256, [8, 8, 8, 5, 5]),
    Sizes((6, 384), (8, 512), (8, 512), 16, 256, [8, 8, 8, 8]),
    Sizes((4, 256), (6, 384), (8, 384), 16, 256, [8, 8, 8, 8]),
]
BATCHES = (256, 128, 64)
PARTS = ("train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing")


def write_recipe(
    pictures: str | Path, output: str | Path, size: int = 64, gpu_memory: float | None = None
) -> list[Path]:
    """Write output/tokenizer.yaml and output/generator.yaml for the pictures in a folder, at `size`
    pixels. gpu_memory: GB, None = a CPU. Where the folder has a train and a val folder, these are
    the two sets; else the pictures are validated on, too. Returns the files. Raises ConfigError,
    also for files of these names with other settings."""
    check_number("size", size, 16, 1024, whole=True)
    train, val = parts_of(Path(pictures))
    names = ImageFolder(train).class_names
    if val != train and len(names) > 1:
        try:
            renumbering(ImageFolder(val).class_names, names)
        except ValueError as error:
            raise ConfigError(f"{val}: {error}") from None
    data = {
        "train": {"name": "folder", "root": str(train)},
        "validation": {"name": "folder", "root": str(val)},
        **{"crop": "random", "flip": True, "num_workers": 0 if gpu_memory is None else 4},
    }
    found = choose(data, len(names), Path(output), size, gpu_memory)
    files = []
    for name, values in found.items():
        config, path = from_mapping(ExperimentConfig, values), Path(output) / f"{name}.yaml"
        if path.is_file() and load_experiment(path) != config:
            raise ConfigError(
                f"{path} has other settings: train it by `flextok train {path}`, or name another "
                "--output"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        save_experiment(config, path)
        files.append(path)
    return files


def parts_of(root: Path) -> tuple[Path, Path]:
    """The folders to train and to validate on: `train` and `val`, or `validation`, in the folder;
    else both are the folder itself. Raises ConfigError where other parts of a data set would be
    taken for classes."""
    names = [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    held_out = [name for name in ("val", "validation") if name in names]
    if "train" in names and held_out:
        return root / "train", root / held_out[0]
    parts = sorted(name for name in names if name.lower() in PARTS)
    if len(parts) > 1 or (parts and parts[0].lower() == "train"):
        raise ConfigError(
            f"{root} has the folders {' and '.join(parts)}, which are parts of a data set and no "
            "classes: name them train and val, or give the one to train on"
        )
    return root, root


def choose(
    data: dict[str, Any], classes: int, output: Path, size: int, gpu_memory: float | None
) -> dict[str, dict[str, Any]]:
    """The experiments of a tokenizer and its generator: on a GPU the largest sizes, and of these
    the largest batch, whose training fits."""

    def both(sizes: Sizes, batch: int, steps: int) -> dict[str, dict[str, Any]]:
        tokenizer = tokenizer_of(sizes, data | {"batch_size": batch}, output, size, steps)
        return {"tokenizer": tokenizer, "generator": generator_of(sizes, tokenizer, classes)}

    if gpu_memory is None:
        return both(CPU, batch=16, steps=2000)
    for sizes, batch in (*product(GPU, BATCHES), (GPU[-1], 32)):
        found = both(sizes, batch, steps=100_000)
        needed = [memory_of(from_mapping(ExperimentConfig, run)) for run in found.values()]
        if max(needed) < USABLE * gpu_memory:
            return found
    raise ConfigError(f"gpu_memory={gpu_memory}: {size} pixels need more: take a smaller size")


def memory_of(config: ExperimentConfig) -> float:
    """GB that training takes on one GPU, by the plan."""
    return sum(plan(config, gpus=1).memory.values()) / 1e9


def tokenizer_of(
    sizes: Sizes, data: dict[str, Any], output: Path, size: int, steps: int
) -> dict[str, Any]:
    if size % sizes.grid:
        raise ConfigError(f"size={size} must be a multiple of {sizes.grid}")
    (encoder_depth, encoder_dim), (decoder_depth, decoder_dim) = sizes.encoder, sizes.decoder
    on_cpu = sizes is CPU
    model = {
        **{"name": "flextok", "image_size": size, "patch_size": size // sizes.grid},
        **{"num_registers": sizes.registers, "head_dim": 32 if on_cpu else 64},
        **{"encoder_depth": encoder_depth, "encoder_dim": encoder_dim},
        **{"decoder_depth": decoder_depth, "decoder_dim": decoder_dim},
        "vae": {"name": "identity", "shift": "auto", "scale": "auto"},
        "quantizer": {"name": "fsq", "levels": sizes.levels, "bound": "ifsq"},
        **{"position_temperature": 10.0 if on_cpu else 100.0, "token_std": 0.3},
        **{"register_start": "spread", "drop_mode": "truncate", "prediction": "x0"},
        "decode": {
            **{"num_steps": 1 if on_cpu else 16, "guidance": {"name": "cfg"}},
            "guidance_scale": 1.0 if on_cpu else 1.5,
        },
    }
    objective = {
        **{"name": "flow", "nested_dropout": "uniform_pow2", "null_prob": 0.05},
        "time_sampler": {"name": "logit_normal", "mean": 3.0, "std": 1.5},
        "loss_space": "x0",
    }
    optim = {
        **{"name": "muon", "lr": 3e-3, "lr_scale": {"encoder": 0.2}, "weight_decay": 0.01},
        **{"warmup_steps": steps // 40, "ema_decay": 0.998 if on_cpu else 0.9995},
    }
    return {
        **{"task": "tokenizer", "output_dir": str(output / "tokenizer"), "model": model},
        **{"objective": objective, "data": data, "optim": optim},
        # as the quickstart's: bf16 is no faster for a model of this size
        "trainer": trainer(steps) | ({"precision": "32-true"} if on_cpu else {}),
    }


def generator_of(sizes: Sizes, tokenizer: dict[str, Any], classes: int) -> dict[str, Any]:
    """The experiment of a generator by class, or without a condition where there is one class."""
    depth, dim = sizes.generator
    steps = tokenizer["trainer"]["max_steps"] // 2
    name, scale = ("class", 2.0) if classes > 1 else ("none", 1.0)
    model = {
        **{"name": "gpt", "depth": depth, "dim": dim, "dropout": 0.1},
        **{"num_heads": dim // tokenizer["model"]["head_dim"], "num_tokens": sizes.registers},
        "conditioner": {"name": name},
        "generate": {"temperature": 0.8, "top_p": 0.9, "guidance_scale": scale},
    }
    optim = {
        **{"name": "muon", "lr": 3e-3, "weight_decay": 0.1, "warmup_steps": steps // 20},
        **{"final_lr": 0.02, "ema_decay": 0.99 if sizes is CPU else 0.9995},
    }
    output = Path(tokenizer["output_dir"])
    return {
        **{"task": "generator", "output_dir": str(output.with_name("generator"))},
        **{"tokenizer": str(output), "model": model, "optim": optim},
        "data": {**tokenizer["data"], "token_variants": 4},
        **{"objective": {"name": "next_token", "context_noise": 0.1}, "trainer": trainer(steps)},
    }


def trainer(steps: int) -> dict[str, Any]:
    every = {"log_every": 25, "validate_every": steps // 4, "checkpoint_every": steps // 8}
    return {"max_steps": steps, **every}


def memory_here() -> float | None:
    """GB of the first GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory / 1e9
