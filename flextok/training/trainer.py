"""Lightning's Trainer as runs need it, and the devices and precision that it trains with."""

import hashlib
import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from flextok.config import TrainerConfig
from flextok.cpu import multiplies_bf16
from flextok.data.processes import this_process
from flextok.nn.devices import one_device
from flextok.schema import ConfigError
from flextok.training.checkpoints import WholeFiles
from flextok.training.options import FitOptions
from flextok.training.saving import Events, Rows
from flextok.training.sharding import ShardedStrategy


def make_trainer(options: FitOptions, validates: bool, callbacks: list[L.Callback]) -> L.Trainer:
    """The trainer of a run. Raises ConfigError for a device or strategy that is not there."""
    sharded, folder = options.strategy == "fsdp2", Path(options.output_dir)
    plugins: list[Any] = [] if sharded else [WholeFiles()]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        # Checkpoints saves on signals, between two steps
        plugins.append(SLURMEnvironment(auto_requeue=False))
    loggers = [make_logger(name, folder) for name in dict.fromkeys(options.loggers)]
    try:
        trainer = L.Trainer(
            accelerator=options.accelerator,
            devices=options.devices,
            num_nodes=options.num_nodes,
            strategy=ShardedStrategy() if sharded else options.strategy,
            plugins=plugins,
            precision=choose_precision(options),
            max_steps=options.max_steps,
            accumulate_grad_batches=options.accumulate,
            gradient_clip_val=options.optim.grad_clip or None,
            log_every_n_steps=options.log_every,
            val_check_interval=options.validate_every * options.accumulate if validates else None,
            check_val_every_n_epoch=None if validates else 1,
            limit_val_batches=None if validates else 0,
            num_sanity_val_steps=0,
            callbacks=callbacks,
            logger=loggers,
            use_distributed_sampler=False,  # the stream and the validation set shard themselves
            enable_model_summary=False,
        )
    except (MisconfigurationException, ImportError) as error:  # no such device, or its library
        raise ConfigError(f"trainer.accelerator={options.accelerator}: {error}") from error
    if isinstance(trainer.strategy, DDPStrategy):
        # buffers are constants, or moved alike on all processes: never sent around in a forward
        trainer.strategy._ddp_kwargs["broadcast_buffers"] = False
    return trainer


def make_logger(name: str, folder: Path) -> Logger:
    """The logger of that name, which writes below folder/logs. Raises ConfigError for wandb where
    it is not installed."""
    if name == "csv":
        return Rows(folder / "logs", name="csv")  # a resumed run adds a version_<n>
    if name == "tensorboard":
        return Events(folder / "logs", name="tensorboard", version="")
    place = str(folder.resolve())
    same = hashlib.sha256(place.encode()).hexdigest()[:12]  # a continued run goes on in its own
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        return WandbLogger(
            folder.name, folder / "logs", version=same, project="flextok", resume="allow"
        )
    except ModuleNotFoundError as error:
        raise ConfigError(f"trainer.loggers={name}: {error}; pip install wandb") from None


def check_devices(options: TrainerConfig) -> None:
    """Refuse a device that is not there, more processes than a CPU has cores, another number of
    them than was launched, and what the device cannot do."""
    device, cores = device_type(options.accelerator), os.cpu_count() or 1
    if options.accelerator in ("gpu", "cuda", "mps") and device_type("gpu") not in ("cuda", "mps"):
        raise ConfigError(f"trainer.accelerator={options.accelerator}: there is none, take auto")
    if device == "cpu" and "," in str(options.devices):
        raise ConfigError(
            f"trainer.devices={options.devices} numbers GPUs: for a CPU give a number of processes"
        )
    asked = options.count_devices(auto=1)
    if device == "cpu" and asked > cores and this_process().world_size == 1:
        raise ConfigError(
            f"trainer.devices={asked} must be at most {cores} on this CPU, the number of its "
            "cores: each device is a process"
        )
    for kind in (TorchElasticEnvironment, SLURMEnvironment):
        if kind.detect():
            try:
                kind().validate_settings(
                    options.count_devices(all_devices(device)), options.num_nodes
                )
            except ValueError as error:
                raise ConfigError(
                    f"trainer.devices={options.devices}, trainer.num_nodes={options.num_nodes} "
                    f"are not what was launched: {error}"
                ) from None
            break
    if options.cuda_graphs:
        needs = {
            "trainer.accelerator=gpu, an NVIDIA one": device == "cuda",
            "trainer.precision=32-true": choose_precision(options) == "32-true",
            "trainer.devices=1": str(options.devices) == "1" and options.num_nodes == 1,
            "trainer.strategy=auto": options.strategy == "auto",
            # the next backward pass writes over the gradients that the last one left
            "trainer.accumulate=1": options.accumulate == 1,
            "trainer.compile=false": not options.compile,
            "trainer.checkpoint_blocks=false": not options.checkpoint_blocks,
        }
        if missing := [name for name, met in needs.items() if not met]:
            raise ConfigError(f"trainer.cuda_graphs needs {' and '.join(missing)}")
    if options.precision == "16-mixed" and (device == "cpu" or options.strategy == "fsdp2"):
        where = "on a CPU" if device == "cpu" else "with trainer.strategy=fsdp2"
        raise ConfigError(f"trainer.precision=16-mixed does not work {where}: take bf16-mixed")


def all_devices(device: str) -> int:
    """How many of this type a run takes for trainer.devices=auto."""
    return torch.cuda.device_count() if device == "cuda" else 1


def device_type(accelerator: str) -> str:
    """What Lightning takes for trainer.accelerator: cuda, mps or cpu."""
    if accelerator not in ("auto", "gpu"):
        return accelerator
    return one_device("auto").type


def choose_precision(options: TrainerConfig) -> Any:
    """The precision that `auto` stands for on the device that trains."""
    if options.precision != "auto":
        return options.precision
    fast = multiplies_bf16(device_type(options.accelerator))
    return "bf16-mixed" if fast else "32-true"
