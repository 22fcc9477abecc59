"""Experiments: a YAML file and key=value overrides to checked dataclasses."""

import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from flextok.data.augmentation import Augmentation
from flextok.registry import MODELS, OBJECTIVES, REGISTRIES
from flextok.schema import Bounds, ConfigError, Share, from_mapping, merged, options_of

NUMBER = r"[-+]?(0|[1-9]\d*)(\.\d+)?|true|false|null"

Count = Annotated[int, Bounds(1)]
CountOrZero = Annotated[int, Bounds(0)]
Weight = Annotated[float, Bounds(0)]
Rate = Annotated[float, Bounds(0, 10, open_low=True)]  # of learning
Seed = Annotated[int, Bounds(0, 2**32 - 1)]
Decay = Annotated[float, Bounds(0, 1, open_high=True)]  # of a moving average


@dataclass
class LoadingConfig(Augmentation):
    """How data sets are read: in what batches, and with what augmentation of images."""

    batch_size: Count = 64  # of one process
    num_workers: CountOrZero = 0


@dataclass(kw_only=True)
class DataConfig(LoadingConfig):
    """What a run reads: `data` of a config."""

    train: dict[str, Any] | list[dict[str, Any]]  # {name: emoji, ...}; several are concatenated
    validation: dict[str, Any] | list[dict[str, Any]] | None = None
    token_variants: Count = 1  # generator: augmented encodings of each image
    token_cache: str | None = None  # generator: folder, by default <output_dir>/tokens
    # generator: how often training sees a class of few images: 0 = as often as there are images of
    # it, 1 = as often as the largest class
    class_balance: Share = 0.0
    # tokenizer: latents of each image that a frozen VAE encodes once, in so many augmented
    # variants, for training to read; 0 = encode images in every step
    latent_variants: CountOrZero = 0
    latent_cache: str | None = None  # tokenizer: folder, by default <output_dir>/latents


@dataclass
class OptimConfig:
    """How parameters move: `optim` of a config."""

    name: Literal["adamw", "muon"] = "adamw"  # muon: for matrices or kernels, AdamW for the rest
    lr: Rate = 1e-4
    # {encoder: 0.1}: of a model's part
    lr_scale: Annotated[dict[str, float], Bounds(0, 1000)] = field(default_factory=dict)
    betas: list[Decay] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: Annotated[float, Bounds(0, 10)] = 0.05
    no_decay: list[str] = field(  # parameters spared by name; vectors (biases, norms) always are
        default_factory=lambda: ["embedding", "registers", "positions", "_pos", "token", "start"]
    )
    warmup_steps: CountOrZero = 1000
    final_lr: Share = 0.01  # of lr, at max_steps (cosine)
    grad_clip: Weight = 1.0  # the largest norm of the gradients; 0 = no clipping
    ema_decay: Decay = 0.999  # 0 = no average


@dataclass
class TrainerConfig:
    """How long a run is, on what devices, and what it writes when: `trainer` of a config."""

    max_steps: Count
    accelerator: str = "auto"
    devices: Annotated[int | str, Bounds(1)] = "auto"
    num_nodes: Count = 1
    strategy: str = "auto"  # ddp, fsdp2 (sharded, for 1B parameters and more), Lightning's others
    # auto: bf16-mixed on a GPU or CPU that multiplies it fast, else 32-true
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    accumulate: Count = 1
    log_every: Count = 50
    validate_every: Count = 1000
    checkpoint_every: Count = 1000
    keep_last: Count = 2  # checkpoints kept, besides that of the best validation loss
    max_nonfinite: Count = 10  # skipped steps in a row (loss not finite) that stop the run
    num_pictures: CountOrZero = 8  # in the grids drawn after each validation
    loggers: list[Literal["csv", "tensorboard", "wandb"]] = field(
        default_factory=lambda: ["csv", "tensorboard"]
    )
    compile: bool = False  # torch.compile, for GPUs
    cuda_graphs: bool = False  # of a tokenizer's networks: for small ones on a GPU, in 32-true
    checkpoint_blocks: bool = False  # recompute activations in the backward pass: less memory
    revive_every: CountOrZero = 0  # steps between revivals of a VQ's unused codes; 0 = never

    def count_devices(self, auto: int) -> int:
        """How many `devices` a machine has: a number of them, or the numbers of some, such as
        "0,2"; auto: how many are all."""
        text = str(self.devices)
        if text == "auto":
            return auto
        return int(text) if text.isdigit() else len(text.split(","))


@dataclass
class EvaluationConfig:
    """Periodic evaluation on the validation pictures, in the model's own precision."""

    every: Count = 1  # at every so many validations
    limit: Count | None = 1000  # pictures, evenly spread; null = all
    num_tokens: list[Count] | None = None  # prefix lengths to decode; null = all tokens only
    networks: list[str] = field(default_factory=list)  # inception, efficientnet_lite0, lpips
    batch_size: Count = 32


@dataclass
class ExperimentConfig:
    """One training run. `task`: of which kind `model` is."""

    task: Literal["autoencoder", "tokenizer", "generator"]
    output_dir: str
    model: dict[str, Any]  # what is saved: the architecture, and how it decodes by default
    data: DataConfig
    trainer: TrainerConfig
    # what training minimises, and all that only training needs: {name: flow, ...}, see objectives/;
    # the name may be left out, it follows from the model
    objective: dict[str, Any] = field(default_factory=dict)
    optim: OptimConfig = field(default_factory=OptimConfig)
    tokenizer: str | None = None  # generator: folder or hub id of its tokenizer
    # trained models that the objective starts from: {weights: folder or hub id}
    start: dict[str, str] = field(default_factory=dict)
    evaluation: EvaluationConfig | None = None
    seed: Seed = 0
    resume: bool = True  # continue from the newest intact one of <output_dir>/checkpoints, if any

    def __post_init__(self) -> None:
        """Raises ConfigError for settings that do not go together."""
        if self.task == "generator" and not self.tokenizer:
            raise ConfigError(
                "task generator needs tokenizer=<folder or hub id of a trained tokenizer>"
            )
        if self.task != "generator" and self.data.class_balance:
            raise ConfigError(
                f"data.class_balance={self.data.class_balance} is for generators: leave it out"
            )
        if self.task != "generator" and self.tokenizer:
            raise ConfigError(
                f"tokenizer={self.tokenizer} is what a generator reads tokens of: leave it out, or "
                "name a model to go on from as start.weights"
            )
        if self.task != "generator" and self.data.token_variants != 1:
            raise ConfigError(
                f"data.token_variants={self.data.token_variants} is for generators: leave it out"
            )
        if self.task == "generator" and self.data.latent_variants:
            raise ConfigError(
                "data.latent_variants is for tokenizers; a generator reads tokens: leave it out"
            )
        if len(self.optim.betas) != 2:
            raise ConfigError(
                f"optim.betas={self.optim.betas} must be two numbers, e.g. [0.9, 0.95]"
            )
        if [] in (self.data.train, self.data.validation):
            raise ConfigError("data.train and data.validation must not be empty lists")
        if not re.fullmatch(r"auto|\d+(,\d+)*", str(self.trainer.devices)):
            raise ConfigError(
                f"trainer.devices={self.trainer.devices!r} must be auto, a number or numbers: 0,1"
            )
        if self.evaluation is not None and self.data.validation is None:
            raise ConfigError("evaluation needs data.validation: the pictures to evaluate on")
        if self.evaluation is not None and self.task == "autoencoder":
            raise ConfigError(
                "evaluation decodes tokens, and an autoencoder has none: set evaluation=null"
            )
        if self.trainer.strategy == "fsdp2" and self.evaluation is not None:
            raise ConfigError(
                "trainer.strategy=fsdp2 shards the model, and evaluation needs it whole: take "
                "trainer.strategy=ddp, or evaluation=null"
            )


def load_experiment(path: str | Path, overrides: list[str] | None = None) -> ExperimentConfig:
    """Read a YAML file (over its base, see `read_yaml`), apply key=value overrides, check
    everything. Dots in a key descend; a value replaces what was there, a whole mapping too."""
    loaded = OmegaConf.create(read_yaml(Path(path)))
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if not equals or not all(key_parts(key)):
            raise ConfigError(f"override {override!r} must look like key=value, e.g. optim.lr=1e-4")
        try:
            value = read_override(text, type_of(key, OmegaConf.to_container(loaded)))
            OmegaConf.update(loaded, key, value, merge=False, force_add=True)
        except (YAMLError, OmegaConfBaseException, ValueError, IndexError) as error:
            raise ConfigError(f"override {override!r}: {error}") from None
    try:
        values: Any = OmegaConf.to_container(loaded, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if isinstance(data := values.get("data"), dict):
        data |= {key: folder_spec(key, data[key]) for key in ("train", "validation") if key in data}
    if isinstance(start := values.get("start"), dict):  # null takes away what the base has
        values["start"] = {name: model for name, model in start.items() if model is not None}
    check_places(values)
    return from_mapping(ExperimentConfig, values)


def read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping of a YAML file, `merged` over those of the files that its key `base` names, one
    or a list of them, relative to it; a later one over the earlier. above: the files that it is the
    base of."""
    chain = " -> ".join(map(str, (*above, path)))
    if not os.path.isfile(path):
        where = f" ({chain})" if above else ""
        raise ConfigError(f"no config file {str(path)!r}{where}: see configs/ for the shipped ones")
    if path.resolve() in [file.resolve() for file in above]:
        raise ConfigError(f"base: {chain} leads back to itself")
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError, OSError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    values: Any = OmegaConf.to_container(loaded)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a mapping of keys: see configs/ for the shipped ones")
    bases = values.pop("base", [])
    bases = bases if isinstance(bases, list) else [bases]
    if not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: base={bases!r} must name other config files")
    whole: dict[str, Any] = {}
    for over in (*(read_yaml(path.parent / base, (*above, path)) for base in bases), values):
        whole |= {key: merged(key, whole.get(key), value) for key, value in over.items()}
    return whole


# keys that are written otherwise now
RENAMED = {
    "adversarial": "objective={name: adversarial, ...}, and its start is objective.start_step",
    "model.cross_length": "objective={name: cross_length, weight: ...}",
    "model.distill": "objective={name: distillation, num_steps: ..., teacher_steps: ...}",
}


def check_places(values: Mapping[str, Any]) -> None:
    """Raises ConfigError for a key in a section that is not its own, naming the right one."""
    sections: dict[str, list[type]] = {
        "": [ExperimentConfig],
        "model": [model.config_class for model in MODELS.values()],
        "objective": [objective.config_class for objective in OBJECTIVES.values()],
        **{"data": [DataConfig], "optim": [OptimConfig]},
        **{"trainer": [TrainerConfig], "evaluation": [EvaluationConfig]},
    }
    homes = {k: {"name", *(f.name for c in v for f in fields(c))} for k, v in sections.items()}
    for section, home in homes.items():
        found = values.get(section) if section else values
        for key in found if isinstance(found, Mapping) else ():
            written = f"{section}.{key}".lstrip(".")
            if written in RENAMED:
                raise ConfigError(f"{written} is now {RENAMED[written]}")
            names = [f"{place}.{key}".lstrip(".") for place in homes if key in homes[place]]
            if key not in home and names:
                raise ConfigError(f"{written} belongs elsewhere: {' or '.join(names)}")


def folder_spec(key: str, value: Any) -> Any:
    """A data set's spec; the name of a folder alone stands for its pictures."""
    if not isinstance(value, str):
        return value
    if not os.path.isdir(value):
        raise ConfigError(f"data.{key}={value!r} is no folder: name one, or {{name: emoji, ...}}")
    return {"name": "folder", "root": value}


def read_override(text: str, hint: Any) -> Any:
    """The value that an override's text states, by the type of its field: a text stays as it is,
    whatever YAML would make of it. Where the type is open, numbers, true, false, null, and what
    begins as a list, a mapping or a quotation does are read as YAML."""
    kinds = leaves(hint)
    if not text or (text == "null" and type(None) in kinds):
        return None
    is_open = Any in kinds or (str in kinds and kinds - {str, Path, type(None)})
    is_yaml = text[0] in "{[\"'" or re.fullmatch(NUMBER, text) is not None
    holds = any(typing.get_origin(kind) in (dict, list) for kind in kinds)  # or a folder's name
    if (str in kinds or is_open or holds) and not ((is_open or holds) and is_yaml):
        return text
    return OmegaConf.from_dotlist([f"value={text}"]).value


def leaves(hint: Any) -> set[Any]:
    """The types that a hint allows, with those of Literal's values."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return leaves(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return {leaf for argument in arguments for leaf in leaves(argument)}
    return {type(value) for value in arguments} if origin is Literal else {hint}


def type_of(key: str, config: Any) -> Any:
    """The type of the field that a dotted key names: of the experiment's, or of a component's whose
    name `config`, plain data, holds. Any where neither states it."""
    hint: Any = ExperimentConfig
    above, node = "", config
    for part in key_parts(key):
        name = node.get("name") if isinstance(node, dict) else None
        component = REGISTRIES.get(above, {}).get(name) if isinstance(name, str) else None
        below: Any = Any
        if component is not None:
            below = options_of(component).get(part, Any)
        for kind in leaves(hint) if component is None else ():
            origin, arguments = typing.get_origin(kind), typing.get_args(kind)
            if is_dataclass(kind):
                below = typing.get_type_hints(kind, include_extras=True).get(part, Any)
            elif origin is list and part.isdigit():
                below = arguments[0]
            elif origin is dict:
                below = arguments[1]
        if isinstance(node, dict):
            node = node.get(part)
        elif isinstance(node, list) and part.isdigit():
            node, part = dict(enumerate(node)).get(int(part)), above
        hint, above = below, part
    return hint


def key_parts(key: str) -> list[str]:
    """The parts of a key: dots descend, and so do numbers in brackets."""
    return re.split(r"[.\[\]]+", key.removesuffix("]"))


def save_experiment(config: ExperimentConfig, path: Path) -> None:
    """Write a YAML file that load_experiment reads back as the same experiment."""
    OmegaConf.save(OmegaConf.create(asdict(config)), path)
