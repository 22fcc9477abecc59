"""LoRA (arXiv 2106.09685): a linear layer W of a trained model becomes W + alpha / rank * B A, of
which training changes A and B alone.

The layers are those of the library peft, and what is saved is its layout: adapter_config.json and
adapter_model.safetensors, which `peft.PeftModel.from_pretrained(model, folder)` reads. Loading it
here merges it into the model that it names, which needs no peft.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor, nn

from flextok.schema import Bounds, ConfigError, Share, check_number

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _ADAPTER = "base_model.model.", ".default"  # peft's, in files and in modules
# what of peft's options `merged` implements, by their values
_ONLY = {
    **{"peft_type": "LORA", "use_rslora": False, "use_dora": False, "bias": "none"},
    **{"rank_pattern": {}, "alpha_pattern": {}, "fan_in_fan_out": False},
}


@dataclass
class LoraOptions:
    """What `objective.lora` states."""

    rank: Annotated[int, Bounds(1, 4096)] = 8
    alpha: Annotated[float, Bounds(0, 1e6, open_low=True)] = 16.0
    targets: list[str] | None = None  # linear layers by name, such as [wq, wv]; None = the blocks'
    dropout: Share = 0.0


@dataclass
class Adapters:
    """What a model saves in place of its weights."""

    config: dict[str, Any]  # of adapter_config.json, as plain data
    base: Path | None  # the folder of the trained model that they change
    whole: tuple[str, ...]  # how the names begin of what is trained, and saved, whole

    def saved(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of a model's state dict the tensors that training changes, by peft's names."""
        return {
            _PREFIX + name.replace(_ADAPTER, ""): value
            for name, value in state.items()
            if ".lora_" in name or name.startswith(self.whole)
        }


def add_adapters(
    model: nn.Module, options: LoraOptions, whole: list[str] | None = None
) -> dict[str, Any]:
    """Put adapters on linear layers of a model, whose other weights are then frozen, but for the
    parts in `whole`. Returns the content of adapter_config.json. Raises ConfigError for layers that
    are not there, and without peft."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError("objective.lora needs peft: pip install 'flextok[lora]'") from None
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    ends = options.targets or [n.rsplit(".")[-1] for n in linear if n.startswith("blocks.")]
    for end in ends:
        if not any(f".{name}".endswith(f".{end}") for name in linear):
            known = sorted({name.rsplit(".")[-1] for name in linear})
            raise ConfigError(
                f"objective.lora.targets={options.targets} names {end!r}, which is no linear layer "
                f"of the model: {', '.join(known)}"
            )
    chosen = [name for name in linear if f".{name}".endswith(tuple(f".{end}" for end in ends))]
    asked: dict[str, Any] = {"r": options.rank, "lora_alpha": options.alpha}  # a float too
    settings = LoraConfig(**asked, lora_dropout=options.dropout, target_modules=chosen)
    inject_adapter_in_model(settings, model)
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.to_dict().items()}
    return plain | {"modules_to_save": whole}  # peft would wrap them, which training does not need


def remove_adapters(model: nn.Module) -> None:
    """Merge what add_adapters put there into the layers, which are then as they were made."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.get_base_layer())


def merged(
    base: Mapping[str, Tensor], found: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """A model's state dict with adapters merged. base: of the model that they change; found and
    config: of their files. Raises ValueError for what does not fit."""
    for key, value in _ONLY.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key}={config[key]!r} is not supported, only {value!r}")
    check_number("r", config.get("r"), 1, 65_536, whole=True)
    check_number("lora_alpha", config.get("lora_alpha"), 0, 1e6)
    scale, state = config["lora_alpha"] / config["r"], dict(base)
    names = {key.removeprefix(_PREFIX): value for key, value in found.items()}
    for name, value in names.items():
        layer, _, kind = name.rpartition(".lora_")
        if kind == "A.weight":
            up, weight = names.get(f"{layer}.lora_B.weight"), base.get(f"{layer}.weight")
            if up is None or weight is None or weight.shape != (len(up), *value.shape[1:]):
                raise ValueError(f"its adapter of {layer!r} fits no layer of that model")
            change = scale * (up.float() @ value.float())
            state[f"{layer}.weight"] = (weight.float() + change).to(weight.dtype)
        elif not layer:
            state[name] = value
    return state
