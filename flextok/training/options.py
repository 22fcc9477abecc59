"""What a training run may be asked for, from Python and from an experiment's sections alike."""

from dataclasses import dataclass, field
from pathlib import Path

from flextok.config import LoadingConfig, OptimConfig, Seed, TrainerConfig


@dataclass(kw_only=True)
class FitOptions(LoadingConfig, TrainerConfig):
    """How fit() trains: where it writes, for how long, on what, from which data."""

    output_dir: str | Path  # the model, its checkpoints, logs and images
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: Seed = 0
    resume: bool = True  # continue from the newest intact checkpoint in output_dir, if any
