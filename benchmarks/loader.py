"""Samples a second of the data loader and of the model: does training wait for its data? And what
does a latent cache save?

    python benchmarks/loader.py configs/quickstart_tokenizer.yaml [key=value ...] \
        [--workers 0 1 2] [--seconds 10] [--json benchmarks/results/loader_cpu.json]

The loader row reads, decodes, augments and batches as training does; the model row takes training
steps (forward, backward, optimizer) on one batch again and again. The loader is not the bottleneck
where it gives more than the model takes; workers run beside the model, so with a worker or more
the two overlap. The first batches of each are not counted. With data.latent_variants the latent
cache is written first, and both rows read it: run the config with 0 and with 1 to see what a frozen
VAE costs.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch.utils.data import DataLoader

from flextok.config import load_experiment
from flextok.data.datamodule import DataModule
from flextok.data.processes import local_device
from flextok.data.stream import PositionSampler, collate
from flextok.draws import derived_generator
from flextok.objectives import Objective
from flextok.training.fit import make_data
from flextok.training.optim import make_optimizer
from flextok.training.plan import measure
from flextok.training.prepare import fill_auto, prepare
from flextok.training.run import fit_options

CLOCK = time.perf_counter


def rate(step: Callable[[], object], samples: int, seconds: float, warm_up: int = 3) -> float:
    """Samples a second, by CLOCK, of a step that handles `samples` of them."""
    for _ in range(warm_up):
        step()
    begun, count = CLOCK(), 0
    while (passed := CLOCK() - begun) < seconds or count < 3:
        step()
        count += 1
    return count * samples / passed


def loader_rate(data: DataModule, workers: int, seconds: float) -> float:
    data.num_workers = workers
    sampler = PositionSampler(data.stream, data.batch_size)
    batches = iter(DataLoader(data.stream, batch_sampler=sampler, **data._loader_options()))
    # what the workers fetched ahead at the start must not count as speed
    warm_up = 3 + 2 * workers
    return rate(lambda: next(batches), data.batch_size, seconds, warm_up)


def model_rate(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    data: DataModule,
    device: str,
    seconds: float,
) -> float:
    batch = collate([data.stream[position] for position in range(data.batch_size)])
    batch = {key: value.to(device) for key, value in batch.items()}
    objective.to(device).train()
    on_gpu = device.startswith("cuda")
    draws = derived_generator(0)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            loss = objective(batch, draws)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()

    return rate(step, data.batch_size, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring, each row")
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    parser.add_argument(
        "--cpu-seconds", action="store_true", help="of this process: on a busy machine, no workers"
    )
    options = parser.parse_args()
    if options.cpu_seconds:
        if any(options.workers):
            parser.error("--cpu-seconds counts no other process: give --workers 0")
        globals()["CLOCK"] = time.process_time
    config = fill_auto(load_experiment(options.config, options.overrides))
    objective, train_set, validation_set, _ = prepare(config)
    objective.prepare()
    asked = fit_options(config)
    data = make_data(objective.model, train_set, validation_set, asked)
    optimizer = make_optimizer(objective, asked.optim)
    device = local_device() if config.trainer.accelerator != "cpu" else "cpu"
    facts: dict[str, Any] = {
        "config": Path(options.config).stem,
        "overrides": options.overrides,
        "batch_size": data.batch_size,
        "device": torch.cuda.get_device_name() if "cuda" in device else platform.machine(),
        "cpus": os.cpu_count(),
        "clock": "cpu" if options.cpu_seconds else "wall",
        "torch": torch.__version__,
        "gflop_per_sample": measure(config).flops / 1e9,
        "model_samples_per_s": model_rate(objective, optimizer, data, device, options.seconds),
    }
    print(f"{facts['config']}, batches of {data.batch_size}, {facts['device']}")
    print(f"{'model, training steps':24s}{facts['model_samples_per_s']:12.1f} samples/s")
    facts["loader_samples_per_s"] = {}
    for workers in options.workers:
        found = loader_rate(data, workers, options.seconds)
        facts["loader_samples_per_s"][workers] = found
        times = found / facts["model_samples_per_s"]
        print(f"{f'loader, {workers} workers':24s}{found:12.1f} samples/s, {times:.1f} x the model")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(options.json.read_text()) if options.json.exists() else []
        options.json.write_text(json.dumps([*known, facts], indent=2) + "\n")


if __name__ == "__main__":
    main()
