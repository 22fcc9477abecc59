"""Experiments: a YAML file and key=value overrides to checked dataclasses."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flextok.schema import ConfigError, from_mapping


@dataclass
class DataConfig:
    train: dict[str, Any] | list[dict[str, Any]]  # {name: emoji, ...}; several are concatenated
    validation: dict[str, Any] | list[dict[str, Any]] | None = None
    batch_size: int = 64  # of one process
    num_workers: int = 0
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    shift: float = 0.0  # random shifts, a fraction of the picture; fills with white
    token_variants: int = 1  # generator: augmented encodings of each picture
    token_cache: str | None = None  # generator: folder, by default <output_dir>/tokens


@dataclass
class OptimConfig:
    name: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, AdamW for the rest
    lr: float = 1e-4
    lr_scale: dict[str, float] = field(default_factory=dict)  # {encoder: 0.1}: of a model's part
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.05
    no_decay: list[str] = field(  # parameters spared by name; vectors (biases, norms) always are
        default_factory=lambda: ["embedding", "registers", "positions", "_pos", "token", "start"]
    )
    warmup_steps: int = 1000
    final_lr: float = 0.01  # of lr, at max_steps (cosine)
    grad_clip: float = 1.0
    ema_decay: float = 0.999  # 0 = no average


@dataclass
class TrainerConfig:
    max_steps: int
    accelerator: str = "auto"
    devices: int | str = "auto"
    num_nodes: int = 1
    strategy: str = "auto"  # ddp, fsdp2 (sharded, for 1B parameters and more), Lightning's others
    precision: str = "auto"  # bf16-mixed on a GPU that has it, else 32-true
    accumulate: int = 1
    log_every: int = 50
    validate_every: int = 1000
    checkpoint_every: int = 1000
    keep_last: int = 2  # checkpoints kept, besides that of the best validation loss
    max_nonfinite: int = 10  # steps in a row skipped for a loss that is not finite, before stopping
    num_pictures: int = 8  # in the grids drawn after each validation
    compile: bool = False  # torch.compile, for GPUs
    revive_every: int = 0  # steps between revivals of a VQ's unused codes; 0 = never


@dataclass
class AdversarialConfig:
    """A patch discriminator trained along with a tokenizer (TiTok's second stage)."""

    weight: float = 0.01  # of the adversarial loss, in the tokenizer's
    start: int = 20_000  # the step from which on it counts, and the discriminator learns
    lecam: float = 1e-3  # weight of the LeCam regularization, in the discriminator's loss
    lecam_decay: float = 0.999
    dim: int = 128  # channels of the discriminator's first stage
    num_stages: int = 3
    lr: float | None = None  # the discriminator's; by default the tokenizer's


@dataclass
class EvaluationConfig:
    """Periodic evaluation on the validation pictures, in the model's own precision."""

    every: int = 1  # at every so many validations
    limit: int | None = 1000  # pictures, evenly spread; null = all
    num_tokens: list[int] | None = None  # prefix lengths to decode; null = all tokens only
    networks: list[str] = field(default_factory=list)  # inception, efficientnet_lite0, lpips
    batch_size: int = 32


@dataclass
class ExperimentConfig:
    """One training run. `task` says which of the two models `model` configures."""

    task: Literal["tokenizer", "generator"]
    output_dir: str
    model: dict[str, Any]
    data: DataConfig
    trainer: TrainerConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    tokenizer: str | None = None  # generator: folder or hub id of its tokenizer
    # tokenizer: trained models that it starts from, {weights: folder or hub id}, see
    # prepare_training
    start: dict[str, str] = field(default_factory=dict)
    adversarial: AdversarialConfig | None = None  # tokenizer: none for FlexTok
    evaluation: EvaluationConfig | None = None
    seed: int = 0
    resume: bool = True  # continue from the newest intact one of <output_dir>/checkpoints, if any


def load_experiment(path: str | Path, overrides: list[str] | None = None) -> ExperimentConfig:
    """Read a YAML file, apply key=value overrides, check everything. Dots in a key descend; a value
    replaces what was there, a whole mapping too."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no config file {str(path)!r}: see configs/ for the shipped ones")
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # a YAML parser's error type is its own
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"override {override!r} must look like key=value, e.g. optim.lr=1e-4")
        try:
            value = OmegaConf.from_dotlist([f"value={text}"]).value
            OmegaConf.update(loaded, key, value, merge=False, force_add=True)
        except Exception as error:  # likewise
            raise ConfigError(f"override {override!r}: {error}") from None
    try:
        values: Any = OmegaConf.to_container(loaded, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error}") from None
    config = from_mapping(ExperimentConfig, values)
    if config.task == "generator" and not config.tokenizer:
        raise ConfigError(
            "task generator needs tokenizer=<folder or hub id of a trained tokenizer>"
        )
    if config.evaluation is not None and config.data.validation is None:
        raise ConfigError("evaluation needs data.validation: the pictures to evaluate on")
    if config.evaluation is not None and config.evaluation.every < 1:
        raise ConfigError(f"evaluation.every={config.evaluation.every} must be at least 1")
    whole = {
        "adversarial": config.adversarial,
        "evaluation": config.evaluation,
        "trainer.revive_every": config.trainer.revive_every,
    }
    if config.trainer.strategy == "fsdp2" and any(whole.values()):
        asked = ", ".join(name for name, value in whole.items() if value)
        raise ConfigError(f"trainer.strategy=fsdp2 shards the model, {asked} needs it whole: ddp?")
    return config


def save_experiment(config: ExperimentConfig, path: Path) -> None:
    """Write a YAML file that load_experiment reads back as the same experiment."""
    OmegaConf.save(OmegaConf.create(asdict(config)), path)
