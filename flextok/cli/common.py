"""What the commands share when they run: devices, tokenizers, data sets, folders."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml

from flextok.config import load_experiment
from flextok.data.datasets import EXTENSIONS
from flextok.data.processes import local_device
from flextok.files import check_writable
from flextok.pipeline import decodable_lengths, load_token_model
from flextok.places import list_models
from flextok.registry import make_dataset
from flextok.tokenizers import Tokenizer
from flextok.viz import is_ours


def pick_device(name: str | None) -> str:
    """The device of that name. By default this process's GPU, else MPS, else the CPU."""
    if name is not None:
        try:
            torch.empty(1, device=name).cpu()  # "meta" computes nothing
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(f"--device {name}: {error}") from None
    return name or local_device()


def load_tokenizer(name: str, device: str | None) -> Tokenizer:
    model = load_token_model(name, pick_device(device))
    if not isinstance(model, Tokenizer):
        raise ValueError(f"{name} is a generator: name the tokenizer whose indices it predicts")
    return model


def token_lengths(asked: list[int] | None, tokenizer: Tokenizer, total: int) -> list[int]:
    """Those asked for, sorted; by default 1, 2, 4, ... where the tokenizer decodes prefixes."""
    return check_lengths(asked or decodable_lengths(tokenizer, total), total)


def check_lengths(lengths: list[int], total: int) -> list[int]:
    if bad := [k for k in lengths if not 1 <= k <= total]:
        raise ValueError(f"--num-tokens {min(bad)} must be in [1, {total}]")
    return sorted(set(lengths))


def check_folder(output: str | Path) -> None:
    """Raise ValueError for a place, given as --output, that cannot be a folder, cannot be
    written or looks like an image's."""
    place = Path(output)
    check_writable(output, "--output", folder=True)
    if place.suffix.lower() in EXTENSIONS and not place.is_dir():
        raise ValueError(f"--output {output} ends as an image does: name a folder")


def spare_sources(places: Iterable[str | Path], sources: Iterable[str | Path]) -> None:
    """Raise ValueError where a picture would be written over one of those that are read."""
    read = {file_id(source): source for source in sources if os.path.exists(source)}
    for place in places:
        if str(place) != "-" and Path(place).exists() and (source := read.get(file_id(place))):
            raise ValueError(f"the picture {source} would be written over: name another --output")


def spare_others(places: Iterable[str | Path]) -> None:
    """Raise ValueError where a picture of a name that is not given would be written over one that
    this package has not written."""
    for place in places:
        if Path(place).exists() and not is_ours(place):
            raise ValueError(f"{place} is there and would be written over: name another --output")


def spare_run(folder: Path) -> None:
    """Raise ValueError for a training's folder, where a model would take the place of its own."""
    if any((folder / name).is_dir() for name in ("checkpoints", "starts")):
        raise ValueError(
            f"{folder} holds a training, whose model would be replaced: name another folder"
        )


def files_of(data: Any) -> list[Path]:
    """The pictures of a data set that are files of their own."""
    return [getattr(data, "root", Path()) / path for path in getattr(data, "paths", ())]


def file_id(path: str | Path) -> tuple[int, int]:
    """The same for all names of one file."""
    found = Path(path).stat()
    return found.st_dev, found.st_ino


def data_of(asked: str | None, model: str, part: str = "validation") -> Any:
    """The data set asked for; by default the one a model was validated (or, with part train,
    trained) on, as its folder's config.yaml has it, and the emoji for the package's own models.
    Raises ValueError for any other model."""
    if asked is not None:
        return open_data(asked)
    if model in list_models():
        return open_data(f"emoji:{part}")
    config = Path(model) / "config.yaml"
    data = load_experiment(config).data if config.is_file() else None
    spec = data and (data.train if part == "train" else data.validation)
    option = "--train" if part == "train" else "--data"
    if not spec or (isinstance(spec, dict) and spec.get("name") == "tokens"):
        raise ValueError(
            f"{model} does not state which images it belongs to: name them with {option}"
        )
    try:
        return make_dataset(spec)
    except ValueError as error:  # such as a folder relative to another working directory
        raise ValueError(
            f"the images that {model} belongs to cannot be read ({error}): name them with {option}"
        ) from None


def open_data(name: str) -> Any:
    return make_dataset(data_spec(name))


def data_spec(name: str) -> dict[str, Any]:
    """emoji, emoji:validation, emoji_scenes:train, a folder of pictures, WebDataset shards (*.tar)
    or a spec as in configs, {name: folder, root: pictures}."""
    if name.startswith("{"):
        try:
            return yaml.safe_load(name)
        except yaml.YAMLError as error:
            raise ValueError(f"--data {name!r} is no mapping: {error}") from None
    if os.path.isdir(name):
        return {"name": "folder", "root": name}
    if ".tar" in name:
        return {"name": "webdataset", "urls": name}
    if os.path.isfile(name):
        raise ValueError(f"--data {name!r} is a file: name the folder that it is in")
    dataset, _, split = name.partition(":")
    if dataset not in ("emoji", "emoji_scenes"):
        raise ValueError(
            f"--data {name!r} is neither a folder nor shards (*.tar) nor emoji[:split] nor "
            "emoji_scenes[:split] nor {name: ...}"
        )
    return {"name": dataset, "split": split or "validation"}
