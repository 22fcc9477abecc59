"""Save and load models: a folder with model.safetensors and config.json. Nothing in it is code."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import flextok
from flextok.schema import ConfigError, from_mapping, to_mapping

WEIGHTS, CONFIG = "model.safetensors", "config.json"
M = TypeVar("M", bound="Pretrained")


class CheckpointError(ValueError):
    """A model that cannot be loaded; the message names the file and the remedy."""


class Pretrained(nn.Module):
    """Adds from_pretrained and save_pretrained to a module built from one config dataclass."""

    model_type: str
    config_class: type
    config: Any
    training_only: tuple[str, ...] = ()  # "name." of parts that inference never needs

    @property
    def metadata(self) -> dict[str, Any]:
        """Free-form facts kept beside the weights: class names, provenance, figures."""
        return self.__dict__.setdefault("_metadata", {})

    @classmethod
    def from_pretrained(
        cls: type[M],
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> M:
        """Load a model from a local folder or a hub id, in eval mode. Raises CheckpointError when
        it is missing, damaged, or another model's."""
        folder = resolve(path)
        header = read_header(folder)
        if header["model_type"] != cls.model_type:
            raise CheckpointError(
                f"{folder} holds a {header['model_type']!r} model, not {cls.model_type!r}"
            )
        try:
            config: Any = from_mapping(cls.config_class, header["config"])
        except ConfigError as error:
            raise CheckpointError(f"{folder / CONFIG}: {error}") from None
        with torch.device("meta"):  # no memory and no random draws for weights that get replaced
            model = cls(config)
        model.load_weights(read_weights(folder / WEIGHTS, device, dtype), str(folder / WEIGHTS))
        model.metadata.update(header.get("metadata", {}))
        return model.eval()

    def load_weights(self, state: Mapping[str, Tensor], source: str) -> None:
        """Take over a state dict whole: a missing, extra or mis-shaped tensor is an error."""
        try:
            self.load_state_dict(state, strict=True, assign=True)
        except RuntimeError as error:
            raise CheckpointError(f"{source} does not fit its config: {error}") from None

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write model.safetensors and config.json, each whole or not at all. Returns the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            key: value.detach().contiguous().cpu()
            for key, value in self.state_dict().items()
            if not key.startswith(self.training_only)
        }
        dropped = {name.rstrip("."): None for name in self.training_only}
        header = {
            "model_type": self.model_type,
            "flextok_version": flextok.__version__,
            "config": to_mapping(replace(self.config, **dropped)),
            "metadata": self.metadata,
        }
        text = json.dumps(header, indent=2)
        atomic_write(folder / WEIGHTS, lambda path: save_file(state, path))
        atomic_write(folder / CONFIG, lambda path: path.write_text(text + "\n", encoding="utf-8"))
        return folder


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's weights: the identity that a token cache or a generator refers to."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def atomic_write(path: Path, write: Callable[[Path], Any]) -> None:
    """Call write(temporary path), then rename: readers see the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def resolve(path: str | Path) -> Path:
    """A local folder as it is; else a hub id's snapshot, from the local cache where possible."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    is_hub_id = str(path).count("/") == 1 and not str(path).startswith((".", "/", "~"))
    if not is_hub_id:
        raise CheckpointError(f"no model at {str(path)!r}: expected a folder with {CONFIG}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=[WEIGHTS, CONFIG]))
    except Exception as error:  # the hub client raises many kinds; all mean the same to the caller
        raise CheckpointError(
            f"no folder {str(path)!r} here, and the hub does not give it ({type(error).__name__}: "
            f"{error}). Check the name, or download the model first and pass its folder."
        ) from error


def read_header(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a model folder."""
    try:
        header = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {CONFIG}: is it a model folder?") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder / CONFIG} is damaged ({error}); write it again") from None
    if not isinstance(header, dict) or not {"model_type", "config"} <= header.keys():
        raise CheckpointError(f"{folder / CONFIG} is not a flextok model's config")
    return header


def read_weights(path: Path, device: str | torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of a safetensors file, floating ones cast to dtype."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the model folder is incomplete") from None
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({error}); copy or export the model again"
        ) from None
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
