"""What a config may name: models, objectives, data sets and components, and how they are built."""

from collections.abc import Callable, Mapping
from typing import Any

from flextok.autoencoder import AUTOENCODERS
from flextok.data import datasets
from flextok.data.fashion_mnist import FashionMNIST
from flextok.data.sets import Joined
from flextok.data.web import WebDatasetStream
from flextok.emoji.datasets import Emoji
from flextok.emoji.scenes import EmojiScenes
from flextok.generators import GENERATORS
from flextok.generators.conditioning import CONDITIONERS, TEXT_ENCODERS
from flextok.hub import Pretrained
from flextok.objectives import OBJECTIVES
from flextok.quantizers import QUANTIZERS
from flextok.schema import (
    ConfigError,
    build,
    check_number,
    from_mapping,
    merged,
    named_spec,
    to_mapping,
)
from flextok.tokenizers import TOKENIZERS
from flextok.vae import VAES

DATASETS: dict[str, Callable[..., Any]] = {
    **datasets.DATASETS,
    **{"emoji": Emoji, "emoji_scenes": EmojiScenes, "fashion_mnist": FashionMNIST},
}
# what a run trains: the models by name
TASKS: dict[str, Mapping[str, type[Pretrained]]] = {
    "autoencoder": AUTOENCODERS,
    "tokenizer": TOKENIZERS,
    "generator": GENERATORS,
}
MODELS: dict[str, type[Pretrained]] = {k: v for task in TASKS.values() for k, v in task.items()}
# where a config names a component: the registry that it is chosen from
REGISTRIES: dict[str, Mapping[str, Callable[..., Any]]] = {
    **{"train": DATASETS, "validation": DATASETS},
    **{"model": {name: model.config_class for name, model in MODELS.items()}},
    **{"objective": {name: objective.config_class for name, objective in OBJECTIVES.items()}},
    **{"vae": VAES, "quantizer": QUANTIZERS},
    **{"conditioner": CONDITIONERS, "encoder": TEXT_ENCODERS},
}


def build_model(registry: Mapping[str, type[Any]], spec: Mapping[str, Any]) -> Any:
    """Build the model that `spec` names: {"name": "flextok", **its config's keys}."""
    return registry[named_spec(spec, "model", list(registry))["name"]](model_config(registry, spec))


def model_config(registry: Mapping[str, type[Any]], spec: Mapping[str, Any]) -> Any:
    """The checked config of the model that `spec` names."""
    keys = named_spec(spec, "model", list(registry))
    return from_mapping(registry[keys.pop("name")].config_class, keys, "model")


def make_dataset(spec: dict[str, Any] | list[dict[str, Any]]) -> Any:
    """Build the dataset that a spec names; a list of specs is concatenated, each as often as its
    `repeat` states, once by default."""
    if isinstance(spec, dict):
        return build(DATASETS, spec, "dataset")
    parts = []
    for part in spec:
        keys = dict(part)
        repeat = keys.pop("repeat", 1)
        check_number("repeat", repeat, 1, 10_000, whole=True, hint=" times a dataset")
        parts += [build(DATASETS, keys, "dataset")] * repeat
    if any(isinstance(part, WebDatasetStream) for part in parts):
        raise ConfigError("a webdataset_stream stands alone: list all its shards as its urls")
    return Joined(parts)


def like_start(spec: Mapping[str, Any], start: Mapping[str, Pretrained]) -> dict[str, Any]:
    """A model's spec over the config of the model of the same type that its training starts from:
    a student or a second stage has the sizes of that one where the spec states no others."""
    for trained in start.values():
        if trained.model_type == spec.get("name"):
            found = to_mapping(trained.config)
            found.pop("length_head", None)  # of that model's own images and prefixes
            if found.pop("distilled", False):  # what a few-step decoder fixes is its own
                del found["decode"]
            return merged("model", {"name": trained.model_type, **found}, dict(spec))
    return dict(spec)
