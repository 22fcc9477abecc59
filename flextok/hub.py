"""Save and load models: a folder of model.safetensors, config.json and a model card, or weights as
others published them."""

import copy
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import flextok
from flextok.card import MARK, evaluation_rows, model_card, public_name
from flextok.convert.rules import count
from flextok.files import atomic_write, write_text
from flextok.nn.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapters
from flextok.nn.devices import Device, one_device
from flextok.places import (
    CONFIG,
    WEIGHTS,
    WRITTEN,
    HubOptions,
    StoredModel,
    check_layout,
    is_path,
    read_model,
    written_reference,
)
from flextok.schema import ConfigError, from_mapping, merged, to_mapping
from flextok.storage import CheckpointError, read_json

if TYPE_CHECKING:
    from typing_extensions import Unpack

CARD = "README.md"
Dtype = torch.dtype | str | None
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # of weights
# "grid" (1, D, h, w) and "flat" (1 + h w, D), positions behind one of no place, are interpolated;
# of "rows" (N, ...) the first are kept; "classes" (N, D) are rows by class name, which may be
# followed by one for none
Resize = Literal["grid", "flat", "rows", "classes"]
M = TypeVar("M", bound="Pretrained")


class Pretrained(nn.Module):
    """Adds from_pretrained, save_pretrained and push_to_hub to a module built from one config
    dataclass."""

    model_type: str
    config_class: type
    config: Any
    weights_file: str = WEIGHTS
    layout: str = "flextok"  # of what is written, see places.LAYOUTS
    # config keys that a tensor states: its name and axis, or None and how its numbered ones begin
    stated: tuple[tuple[str, str, int | None], ...] = ()
    # tensors that may have another size than those of the model that training starts from
    resizable: tuple[tuple[str, "Resize"], ...] = ()
    local_paths: tuple[str, ...] = ()  # config keys that may name a folder; dots descend
    home: Path | None = None  # the folder that metadata's relative paths start from
    held: tuple[nn.Parameter, ...] = ()  # that the objective which trains it has frozen
    adapters: Adapters | None = None  # in training by LoRA: what is saved in place of the weights

    @classmethod
    def checked(cls, config: Any) -> Any:
        """A config whose values and mappings are read as those of a file are. Raises ConfigError
        for what does not fit."""
        return from_mapping(cls.config_class, to_mapping(config))

    @property
    def metadata(self) -> dict[str, Any]:
        """Free-form facts kept beside the weights: class names, provenance, figures."""
        return self.__dict__.setdefault("_metadata", {})

    @property
    def device(self) -> torch.device:
        """Where the weights are. encode, decode and generate move what they are given there."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights. encode, decode and generate take fp32 images and conditions in any."""
        return next(self.parameters()).dtype

    def sizes(self) -> tuple[int | None, int, int]:
        """image_size (None of a generator), num_tokens and vocab_size (0 = continuous)."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls: type[M],
        path: str | Path,
        device: Device = "cpu",
        dtype: Dtype = torch.float32,
        overrides: Mapping[str, Any] | None = None,
        *,
        subfolder: str = "",
        torch_dtype: Dtype = None,
        device_map: Device | None = None,
        **hub: "Unpack[HubOptions]",
    ) -> M:
        """Load a model, in eval mode, from a local folder or file, a hub id owner/name, or a hub
        file owner/name/file.bin, in our layout or a published one, also spread over several
        safetensors files with an index.

        device: "auto" = a GPU where there is one, else MPS, else the CPU. dtype: of floating-point
        weights, such as torch.float16 or "float16"; "auto" or None = as stored. overrides: config
        fields to change, dots descend, such as {"max_timestep": 1.0}. subfolder: of the folder or
        hub id, where the model lies there. torch_dtype, device_map: other libraries' names for
        dtype and device. hub: revision, token, cache_dir and local_files_only, as huggingface_hub
        takes them. Raises CheckpointError when the model is missing, damaged or another's, or when
        any tensor is missing, left over or of another shape."""
        stored = read_model(path, subfolder, **hub)
        place = device if device_map is None else device_map  # 0 is the first GPU
        return cls.from_stored(stored, place, torch_dtype or dtype, overrides)

    @classmethod
    def from_stored(
        cls: type[M],
        stored: StoredModel,
        device: Device = "cpu",
        dtype: Dtype = torch.float32,
        overrides: Mapping[str, Any] | None = None,
    ) -> M:
        """The model that `read_model` found; arguments and errors as in from_pretrained."""
        place = one_device(device)
        named = {str(kind).removeprefix("torch."): kind for kind in DTYPES} | {"auto": None}
        kind = named.get(dtype, dtype) if isinstance(dtype, str) else dtype
        if kind not in (*DTYPES, None):
            raise ValueError(f"dtype={dtype!r} must be a torch.dtype or one of {', '.join(named)}")
        if stored.model_type != cls.model_type:
            raise CheckpointError(
                f"{stored.source} holds a {stored.model_type!r} model, not {cls.model_type!r}"
            )
        home = Path(stored.source).parent
        try:
            values = override(stored.config, overrides or {})
            for key in cls.local_paths:
                value = look_up(values, key)
                if isinstance(value, str) and value.startswith("."):
                    values = override(values, {key: str(home / value)})
            config: Any = from_mapping(cls.config_class, values)
            cls.check_stated(config, stored.state)
            # no memory and no draws for weights that get replaced
            with torch.device("meta"), SkipNormal():
                model = cls(config)
        except ValueError as error:
            raise CheckpointError(f"{stored.source}: {error}") from None
        except Exception as error:  # what a constructor makes of absurd sizes is its own
            name = type(error).__name__
            raise CheckpointError(
                f"{stored.source}: no model can be built from its config ({name}: {error})"
            ) from error
        model.check_state(stored.state, stored.source)  # before anything is copied
        for key, value in stored.state.items():  # one by one: a cast never holds two copies of all
            stored.state[key] = value.to(place, kind if value.is_floating_point() else None)
        model.load_weights(stored.state, stored.source)
        model.metadata.update(stored.metadata)
        model.home = home
        return model.eval()

    @classmethod
    def check_stated(cls, config: Any, state: Mapping[str, Tensor]) -> None:
        """Raise ConfigError where a config and the tensors' shapes state different sizes, before
        a model of absurd ones is built."""
        for key, name, axis in cls.stated:
            value, found = vars(config)[key], None
            if axis is None:
                found = count(state, name)
            elif name in state and state[name].ndim > axis:
                found = state[name].shape[axis]
            if None not in (value, found) and value != found:
                raise ConfigError(
                    f"its weights do not fit its config: {key}={value}, but {name!r} states {found}"
                )

    def load_weights(self, state: Mapping[str, Tensor], source: str) -> None:
        """Take over a state dict whole: a missing, extra or mis-shaped tensor is an error."""
        self.check_state(state, source)
        self.load_state_dict(state, strict=True, assign=True)

    def check_state(self, state: Mapping[str, Tensor], source: str) -> None:
        """Raise CheckpointError unless a state dict has exactly this model's tensors."""
        ours = {key: describe(value) for key, value in self.state_dict().items()}
        found = {key: describe(value) for key, value in state.items()}
        problems = [f"{key!r} is missing" for key in ours if key not in found]
        problems += [f"{key!r} is left over" for key in found if key not in ours]
        problems += [
            f"{key!r} is {kind}, expected {ours[key]}"
            for key, kind in found.items()
            if ours.get(key, kind) != kind
        ]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise CheckpointError(
                f"{source} does not fit its config: {'; '.join(problems[:3])}{more}"
            )

    def add_report(self, report: Mapping[str, Any] | str | Path) -> None:
        """Keep the scores of an evaluation, as `evaluate` returns it or as its report.json holds
        it, in the metadata: the card states them, and the hub reads them there. Raises
        ValueError."""
        content = report if isinstance(report, Mapping) else read_json(Path(report))
        self.metadata["evaluation"] = evaluation_rows(content)

    def check_place(self, folder: Path) -> None:
        """Raise ValueError where save_pretrained would."""
        check_layout(folder, self.layout if self.adapters is None else "adapters")

    def save_pretrained(
        self,
        folder: str | Path,
        state: Mapping[str, Tensor] | None = None,
        public: bool = False,
    ) -> Path:
        """Write model.safetensors, config.json and a model card README.md, each whole or not at
        all; a README.md of your own stays. Of a model that is trained by LoRA, its adapters are
        written in place of its weights. What the model refers to is named relative to the folder;
        public: by no path at all, for other machines. state: the weights, where not the model's own
        (those of a sharded model, gathered). Returns the folder. Raises ValueError for a folder
        that holds a model in another layout, or another program's."""
        folder = Path(folder)
        self.check_place(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            key: value.detach().contiguous().cpu()
            for key, value in (self.state_dict() if state is None else state).items()
        }
        place = None if public else folder
        text = json.dumps(self.document(place), indent=2)  # before all writing
        weights_file = self.weights_file
        if self.adapters is not None:
            tensors, weights_file = self.adapters.saved(tensors), ADAPTER_WEIGHTS
            base = written_reference(str(self.adapters.base), Path.cwd(), place)
            config = self.adapters.config | {"base_model_name_or_path": base}
            write_text(folder / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")
        atomic_write(folder / weights_file, lambda path: save_file(tensors, path, WRITTEN))
        card = folder / CARD
        if not card.is_file() or MARK in card.read_text(encoding="utf-8", errors="replace"):
            # a card is for others, wherever the folder lies now
            page = model_card(self, self.written_config(None), self.written_metadata(None))
            write_text(card, page)
        # last: with it the folder is complete
        write_text(folder / CONFIG, text + "\n")
        return folder

    def document(self, folder: Path | None) -> dict[str, Any]:
        """What config.json holds in `folder`, None = for other machines."""
        return {
            "model_type": self.model_type,
            "flextok_version": flextok.__version__,
            "config": self.written_config(folder),
            "metadata": self.written_metadata(folder),
        }

    def written_config(self, folder: Path | None) -> dict[str, Any]:
        """The config as saved in `folder`, None = for other machines: folders named relative to
        it."""
        config = to_mapping(self.config)
        for key in self.local_paths:
            value = look_up(config, key)
            if isinstance(value, str) and (is_path(value) or Path(value).is_dir()):
                place = str(Path(value).expanduser())
                stated = written_reference(place, Path.cwd(), folder) or Path(place).name
                config = override(config, {key: os.path.join(".", stated)})
        return config

    def written_metadata(self, folder: Path | None) -> dict[str, Any]:
        """The metadata as saved in `folder`, None = for other machines: without absolute paths."""
        names = {"class_names": self.metadata.get("class_names")}  # may look like paths
        if isinstance(rows := self.metadata.get("evaluation"), list):  # perhaps of an older version
            names["evaluation"] = [
                {**row, "data": public_name(str(row["data"]))}
                if isinstance(row, dict) and "data" in row
                else without_paths(row)
                for row in rows
            ]
        if (tokenizer := self.metadata.get("tokenizer")) is not None:
            names["tokenizer"] = written_reference(tokenizer, self.home or Path.cwd(), folder)
        written = without_paths(self.metadata) | names
        return {key: written[key] for key in self.metadata if written[key] is not None}

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Add model",
    ) -> str:
        """Save to the hub's repository owner/name, made if it is not there yet. Returns the
        commit's address. token: by default, that of `hf auth login`. No path of this machine is
        pushed: for a generator, set metadata["tokenizer"] to its tokenizer's hub id before."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, public=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message
            )
        return str(commit)


class SkipNormal(TorchFunctionMode):
    """Leaves tensors out of normal_. On the meta device it does nothing anyway, but imports
    PyTorch's compiler for it: nine seconds and 200 MB."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, nn.init.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def override(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of config with values replaced; dots in a key descend, and a mapping is merged into
    the one that is there, as in a config file."""
    result = copy.deepcopy(dict(config))
    for key, value in changes.items():
        *parents, last = key.split(".")
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ValueError(f"override {key!r}: {parent!r} is no mapping of keys")
        place[last] = merged(last, place.get(last), value)
    return result


def look_up(config: Mapping[str, Any], key: str) -> Any:
    """The value under a key whose dots descend; None where there is none."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def without_paths(value: Any) -> Any:
    """value with each text in it that is an absolute path cut to its last part."""
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and re.match(r"~[\w.-]*([\\/]|$)", value):
        return Path(value).name
    kinds = (PurePosixPath, PureWindowsPath) if isinstance(value, str) else ()
    for path in (kind(value) for kind in kinds if kind(value).is_absolute()):
        # "/255 levels" is a text: the folders at the top of a disk have no spaces in their names
        if path.drive or (path.name and not re.search(r"\s", path.parts[1])):
            return path.name
    return value


def describe(tensor: Tensor) -> str:
    kind = "float" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
    return f"{kind} {list(tensor.shape)}"


def fingerprint(model: nn.Module, parts: str | tuple[str, ...] = "") -> str:
    """A hash of a model's weights, or of those whose names begin so. What its indices mean is the
    tokenizers' codes_id."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        if not key.startswith(parts):
            continue
        digest.update(key.encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
