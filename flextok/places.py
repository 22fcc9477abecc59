"""Where a model lies (in a folder, in one file, among those of the package, on the hub), what is
stored there, and how one model names another, so that both can move."""

import ast
import contextlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from safetensors import SafetensorError, safe_open
from torch import Tensor

from flextok.convert import convert_published, current_config
from flextok.convert.autoencoder import OURS
from flextok.nn.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, merged
from flextok.schema import ConfigError, from_mapping
from flextok.storage import (
    INDEX,
    SUFFIXES,
    CheckpointError,
    check_file,
    read_json,
    read_shards,
    read_tensors,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

log = logging.getLogger(__name__)

WEIGHTS, CONFIG = "model.safetensors", "config.json"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"  # of an autoencoder
OLD_WEIGHTS = "pytorch_model.bin"  # what hub repositories held before safetensors
UNREADABLE = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)
LONGEST_LITERAL = 100_000  # characters of one section of a published config
SAFETENSORS = (WEIGHTS, DIFFUSERS_WEIGHTS)
USUAL_WEIGHTS = (*SAFETENSORS, *(name + INDEX for name in SAFETENSORS), OLD_WEIGHTS)
WRITTEN = {"written_by": "flextok"}  # metadata of our weights; of two keys the order would vary
PIPELINE = "model_index.json"  # of diffusers: its models lie in folders
PARTS = ("transformer", "autoencoder")  # of a pipeline of ours; the first that there is counts
# models of flextok.integrations.diffusers by class: how their tensors' names begin
WRAPPED = {"AutoencoderFlexTok": "tokenizer.", "FlexTokGenerator": "model."}
# how a model may lie in a folder, as errors say it
LAYOUTS = {
    "flextok": "a model of flextok",
    "adapters": "the adapters of a model",
    "diffusers": "a model in the layout of diffusers",
    "pipeline": "a pipeline of diffusers",
    "published": "a model as published (weights alone)",
    "config": f"another model's {CONFIG}",
}
RELEASES = Path(__file__).parent / "releases"  # models that come with the package, by name


class StoredModel(NamedTuple):
    """What a model's files hold, whatever their layout was; the tensors are not copied yet."""

    model_type: str
    config: dict[str, Any]
    metadata: dict[str, Any]
    state: dict[str, Tensor]
    source: str  # names the file in errors


class HubOptions(TypedDict, total=False):
    """How the hub is asked for a model, as huggingface_hub names it."""

    revision: str | None  # a branch, a tag or a commit
    token: str | bool | None  # by default, that of `hf auth login`
    cache_dir: str | Path | None  # by default, the hub's own
    local_files_only: bool  # take what the cache holds, and ask nobody


NEEDLESS = {  # other libraries' arguments
    "trust_remote_code": "no code of a model is ever run",
    "use_safetensors": "safetensors are read where there are some",
    "low_cpu_mem_usage": "weights are never in memory twice",
    "pretrained": "weights are always loaded",
}


def list_models(filter: str = "*") -> list[str]:
    """The names of the models that come with the package, as `load` takes them; filter: those that
    a pattern such as "emoji-*" matches."""
    return sorted(path.parent.name for path in RELEASES.glob(f"{filter}/{CONFIG}"))


def resolve(
    path: str | Path,
    subfolder: str = "",
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """A local folder or file as it is (of the name of a model that comes with the package, one that
    holds a model); else such a model, by its name; else, from the hub or its local cache, the
    snapshot of a hub id owner/name or the file of owner/name/file.bin. subfolder: of a folder
    or a hub id. The others are as in HubOptions. Raises CheckpointError."""
    place, name = Path(path), str(path)
    if subfolder and os.path.isdir(place):
        place /= subfolder
        if not place.is_dir():
            raise CheckpointError(f"{path} has no folder {subfolder!r}")
    if name in list_models() and not holds_model(place):  # such as a folder of emoji
        return RELEASES / name
    if os.path.isdir(place) or os.path.isfile(place):  # a name too long for a file is neither
        return place
    if os.path.exists(place):  # a pipe or a device is no name of the hub's
        check_file(place)
    parts = name.split("/")
    repo, file = "/".join(parts[:2]), "/".join(parts[2:])
    if is_path(name) or len(parts) < 2 or (file and not file.endswith(SUFFIXES)):
        raise CheckpointError(
            f"no model at {name!r}: expected a folder with {CONFIG}, a weight file, a hub id, or "
            f"one of those that come with the package ({', '.join(list_models())})"
        )
    how: HubOptions = {"revision": revision, "token": token, "cache_dir": cache_dir}
    how["local_files_only"] = local_files_only
    if file:
        from huggingface_hub import hf_hub_download

        return from_hub(name, lambda: hf_hub_download(repo, file, **how), local_files_only)
    inside = f"{subfolder}/" if subfolder else ""
    wanted = [inside + file for file in (CONFIG, PIPELINE, ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    for weights in SAFETENSORS:
        shards = f"{Path(weights).stem}-*-of-*.safetensors"
        wanted += [inside + file for file in (weights, weights + INDEX, shards)]
    folder = hub_folder(repo, *wanted, **how) / subfolder
    if (folder / PIPELINE).is_file():
        return hub_folder(repo, *(f"{inside}{part}/*" for part in PARTS), **how) / subfolder
    if any(folder.glob("*.safetensors")):
        return folder
    return hub_folder(repo, inside + CONFIG, inside + OLD_WEIGHTS, **how) / subfolder


def hub_folder(repo: str, *patterns: str, **hub: "Unpack[HubOptions]") -> Path:
    """A local folder with those files of a repository on the hub that the patterns match. Raises
    CheckpointError."""
    from huggingface_hub import snapshot_download

    cached = hub.get("local_files_only", False)
    wanted = list(patterns)
    return from_hub(repo, lambda: snapshot_download(repo, allow_patterns=wanted, **hub), cached)


def from_hub(name: str, download: Callable[[], str], cached: bool = False) -> Path:
    """What download() brings; cached: from the local cache only. What goes wrong is a
    CheckpointError that names the remedy."""
    from huggingface_hub import constants, errors

    try:
        return Path(download())
    except Exception as error:  # the hub client raises many kinds, some of its dependencies' own
        hints = {
            errors.GatedRepoError: "its owner asks to accept terms first: do so on its page, then "
            "`hf auth login`",
            errors.RepositoryNotFoundError: "the hub has no such model: check the name; for a "
            "private one, `hf auth login`",
            errors.RevisionNotFoundError: "the model has no such revision",
            Exception: f"the hub does not give it ({type(error).__name__} "
            f"{str(error).partition(chr(10))[0]}): check the name and the connection, or download "
            "it elsewhere and pass its folder",
        }
        hint = next(text for kind, text in hints.items() if isinstance(error, kind))
        if constants.HF_HUB_OFFLINE or cached:
            asked = "local_files_only" if cached else "HF_HUB_OFFLINE"
            hint = (
                f"{asked} is set and the local cache does not hold it: download it once "
                f"with `hf download {'/'.join(name.split('/')[:2])}` or unset it"
            )
        raise CheckpointError(f"no folder or file {name!r} here; {hint}") from error


def find_weights(folder: Path) -> Path:
    """The weight file of a folder: the one of the usual name, or the index of those that it is
    spread over, else the only one there is."""
    for name in USUAL_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if not files:
        if not (folder / CONFIG).is_file():
            raise CheckpointError(f"{folder} holds no model: neither {CONFIG} nor weights")
        raise CheckpointError(f"{folder / WEIGHTS} is missing: the model folder is incomplete")
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise CheckpointError(f"{folder} holds several weight files ({names}): name one of them")
    return files[0]


def read_model(path: str | Path, subfolder: str = "", **hub: "Unpack[HubOptions]") -> StoredModel:
    """What lies at a path or hub id, in our layout, a published one or diffusers', as a model of
    ours; places as in `resolve`. Of a pipeline of diffusers it is the generator, or else the
    tokenizer. The tensors are memory-mapped where the format allows it. Raises CheckpointError."""
    for name in hub:
        if name not in HubOptions.__annotations__:
            known = ", ".join(HubOptions.__annotations__)
            remedy = f"leave it out, {NEEDLESS[name]}" if name in NEEDLESS else f"known: {known}"
            raise TypeError(f"loading a model takes no argument {name!r}: {remedy}")
    place = resolve(path, subfolder, **hub)
    if (place / PIPELINE).is_file():
        parts = [place / part for part in PARTS if (place / part).is_dir()]
        if not parts:
            raise CheckpointError(f"{place} is a pipeline without a model of this package")
        place = parts[0]
    # beside a file of another name, config.json may be another model's
    folder = place if place.is_dir() else place.parent if place.name == WEIGHTS else None
    document: dict[str, Any] = {}
    if folder is not None and (folder / CONFIG).is_file():
        document = read_json(folder / CONFIG)
    weights = find_weights(place) if place.is_dir() else place
    is_index = weights.name.endswith(INDEX)
    state, metadata = (read_shards if is_index else read_tensors)(weights)
    if folder is not None and (folder / ADAPTER_CONFIG).is_file():
        state = on_base(folder, state)
    if is_ours(document):
        try:
            facts = check_metadata(document.get("metadata", {}))
        except ConfigError as error:
            raise CheckpointError(f"{folder}/{CONFIG}: {error}") from None
        model_type = document["model_type"]
        config = current_config(model_type, document["config"])
        return StoredModel(model_type, config, facts, state, str(weights))
    if document.get("_class_name") in WRAPPED:
        return unwrapped(document, state, weights)
    try:
        published = convert_published(state, [document, *parse_metadata(metadata)])
    except ValueError as error:
        where = f"{folder} has no {CONFIG} of ours; " if folder and not document else ""
        raise CheckpointError(f"{where}{weights}: {error}") from None
    for point in published.provenance.get("assumed", []):
        log.info("%s leaves settings open: %s", path, point)
    is_local = Path(path).exists()
    provenance = {"source": place.name if is_local else str(path), **published.provenance}
    facts = {"provenance": provenance}
    if isinstance(ours := document.get(OURS), dict):  # our own, in another library's layout
        facts = check_metadata(ours.get("metadata", {}))
    return StoredModel(published.model_type, published.config, facts, published.state, str(weights))


def on_base(folder: Path, adapters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the model that LoRA's adapters in a folder change, with them merged. Raises
    CheckpointError."""
    config = read_json(folder / ADAPTER_CONFIG)
    reference = config.get("base_model_name_or_path")
    base = find_reference(reference, folder) if isinstance(reference, str) else None
    if base is None:
        raise CheckpointError(
            f"{folder} holds adapters of a model that is not at {reference!r}: put it there, or "
            f"name its place as base_model_name_or_path in {ADAPTER_CONFIG}"
        )
    try:
        return merged(read_model(base).state, adapters, config)
    except RecursionError:
        raise CheckpointError(f"{folder}: its adapters are those of themselves") from None
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{folder}, adapters of {reference}: {error}") from None


def unwrapped(document: Mapping[str, Any], state: dict[str, Tensor], weights: Path) -> StoredModel:
    """The model that flextok.integrations.diffusers saved. Raises CheckpointError."""
    prefix, model_type = WRAPPED[document["_class_name"]], document.get("model_type", "flextok")
    settings, source = document.get("settings"), str(weights)
    if not isinstance(settings, dict) or not isinstance(model_type, str):
        raise CheckpointError(f"{weights.with_name(CONFIG)} holds no settings of a model")
    try:
        facts = check_metadata(document.get("metadata") or {})
    except ConfigError as error:
        raise CheckpointError(f"{weights.with_name(CONFIG)}: {error}") from None
    beside = weights.parent.parent / PARTS[1]
    if beside.is_dir() and weights.parent.name == PARTS[0]:
        facts |= {"tokenizer": f"../{PARTS[1]}"}
    tensors = {key.removeprefix(prefix): value for key, value in state.items()}
    return StoredModel(model_type, current_config(model_type, settings), facts, tensors, source)


@dataclass
class KnownMetadata:
    """The facts beside a model's weights that the package reads; others are free."""

    tokenizer: str | None = None
    codes_id: str | None = None
    tokenizer_fingerprint: str | None = None
    class_names: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)


def check_layout(folder: Path, layout: str) -> None:
    """Raise ValueError where a folder holds a model in another layout, or another program's: files
    of both would lie there, and one of the models, if not both, be lost. layout: of what is to be
    written, a key of LAYOUTS."""
    found = layout_of(folder)
    if found is None and layout == "published" and (folder / CONFIG).exists():
        found = "config"  # a damaged one
    if found is not None and found != layout:
        raise ValueError(
            f"{folder} holds {LAYOUTS[found]}, which would be lost: name another folder"
        )


def holds_model(place: Path) -> bool:
    """Whether a folder has a file of a model, whole or damaged."""
    files = (PIPELINE, ADAPTER_CONFIG, CONFIG, *USUAL_WEIGHTS)
    return any((place / name).is_file() for name in files)


def is_ours(document: Mapping[str, Any]) -> bool:
    """Whether a config.json is of our layout."""
    return isinstance(document.get("model_type"), str) and isinstance(document.get("config"), dict)


def layout_of(folder: Path) -> str | None:
    """The layout, a key of LAYOUTS, of the model in a folder; None where there is nothing to lose:
    without a model, with a damaged config.json, or after an export of ours that was cut off."""
    if (folder / PIPELINE).is_file():
        return "pipeline"
    if (folder / ADAPTER_CONFIG).is_file():
        return "adapters"
    if not (folder / CONFIG).is_file():
        lone = (folder / name for name in USUAL_WEIGHTS if (folder / name).is_file())
        return "published" if any(not is_written_here(weights) for weights in lone) else None
    try:
        document = read_json(folder / CONFIG)
    except CheckpointError:
        return None
    if is_ours(document):
        return "flextok"
    return "diffusers" if isinstance(document.get("_class_name"), str) else "config"


def is_written_here(weights: Path) -> bool:
    """Whether this package wrote a file of weights, which then states it, or nobody can read it."""
    if weights.suffix != ".safetensors":
        return False
    try:
        with safe_open(weights, framework="pt") as file:
            return WRITTEN.items() <= (file.metadata() or {}).items()
    except (SafetensorError, OSError):
        return True


def check_metadata(facts: object) -> dict[str, Any]:
    """The metadata of a stored model. Raises ConfigError for a fact of another type."""
    if not isinstance(facts, dict):
        raise ConfigError(f"metadata must be a mapping of keys, got {facts!r}.")
    known = {f.name for f in fields(KnownMetadata)}
    from_mapping(KnownMetadata, {k: v for k, v in facts.items() if k in known}, "metadata")
    return facts


def parse_metadata(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """A safetensors file's metadata as documents: all values that are JSON, or a Python literal as
    in published FlexTok files, under their names, and each mapping among them. A literal holds
    plain data only, and nothing in it is run."""
    parsed: dict[str, Any] = {}
    for key, text in metadata.items():
        for read in (json.loads, read_literal):  # free text such as "pt" is neither
            with contextlib.suppress(*UNREADABLE):
                parsed[key] = read(text)
                break
    return [parsed, *(value for value in parsed.values() if isinstance(value, dict))]


def read_literal(text: str) -> dict[Any, Any]:
    """A mapping of plain data as Python writes it; nothing in it is run. Raises ValueError, or what
    Python's parser raises."""
    if not text.startswith("{") or len(text) > LONGEST_LITERAL:
        raise ValueError("no mapping, or too long for one")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what odd text might have meant
        found = ast.literal_eval(text)
    if not isinstance(found, dict):
        raise ValueError("no mapping")
    return found


def is_path(reference: str) -> bool:
    """Whether a reference to another model can only be a place in a file system."""
    return reference.startswith((".", "~")) or Path(reference).is_absolute()


def find_reference(reference: str, home: Path) -> Path | str | None:
    """Where a model in the folder `home` finds another that it names: beside it, among those that
    come with the package, or by a hub id. None for a path at which nothing lies."""
    if (place := home / reference).exists():
        return place
    name = Path(reference).name if is_path(reference) else reference
    if name in list_models():
        return RELEASES / name
    return None if is_path(reference) else reference


def written_reference(reference: str, home: Path, folder: Path | None) -> str | None:
    """A reference that holds in the folder `home`, as a model saved in `folder` states it: relative
    to that folder, a name of the package, or a hub id. folder: None for readers elsewhere, for whom
    no path of this machine leads anywhere. None where nothing can be stated."""
    place = find_reference(reference, home)
    if not isinstance(place, Path):
        return place
    place = place.parent.resolve() / place.name
    repo = place.parent.parent.name  # of a snapshot in the hub's cache
    if place.parent.name == "snapshots" and repo.startswith("models--"):
        return repo.removeprefix("models--").replace("--", "/")
    releases = RELEASES.resolve()
    if place.parent == releases and (folder is None or folder.resolve().parent != releases):
        return place.name
    return None if folder is None else Path(os.path.relpath(place, folder.resolve())).as_posix()
