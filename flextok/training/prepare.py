"""From an experiment to what fit() takes. A generator's images are tokenized, and its captions
read, once, into caches: a step of its own, with a progress bar, before training."""

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from flextok.config import ExperimentConfig, load_experiment
from flextok.data.labels import balanced, list_names, renumbering, union
from flextok.data.latents import (
    LatentDataset,
    build_latent_cache,
    check_cacheable,
    latents_identity,
)
from flextok.data.pictures import UNLABELLED
from flextok.data.pixels import measure_pixels
from flextok.data.processes import local_device, this_process
from flextok.data.sets import origins, take
from flextok.data.text import build_text_cache
from flextok.data.tokens import (
    TokenDataset,
    build_token_cache,
    cache_identity,
)
from flextok.data.transforms import ImageTransform
from flextok.data.variants import warn_unused
from flextok.evaluation import Cell, Options, evaluate
from flextok.evaluation.job import make_job
from flextok.evaluation.runner import check_captions, check_enough, has_captions
from flextok.evaluation.sources import Images as EvaluationImages
from flextok.generators import GENERATORS
from flextok.generators.conditioning import CONDITIONERS, TextConditioner
from flextok.generators.text import Text, load_encoder
from flextok.hub import fingerprint
from flextok.objectives import Objective, make_objective
from flextok.pipeline import expected_codes, load, remember_tokenizer
from flextok.places import CONFIG
from flextok.registry import TASKS, build_model, like_start, make_dataset, model_config
from flextok.schema import ConfigError, build, named_spec
from flextok.storage import CheckpointError, read_json
from flextok.tokenizers import TOKENIZERS, FlexTokConfig, TiTokConfig
from flextok.tokenizers.base import Tokenizer, same_codes
from flextok.training.checkpoints import list_checkpoints
from flextok.training.validation import Evaluation, Images, draw_generations

log = logging.getLogger(__name__)


class Run(NamedTuple):
    """What fit() takes."""

    objective: Objective
    train_set: Dataset[Any]
    validation_set: Dataset[Any] | None
    callbacks: list[L.Callback]


Check = Callable[[Objective], None]  # raises for what a run of this objective cannot do


def prepare(config: ExperimentConfig, check: Check = lambda objective: None) -> Run:
    """Build the model, its objective and the data sets of an experiment, and fill the caches. That
    may take hours: what can be known to be wrong is named before, also by `check`."""
    make = prepare_generator if config.task == "generator" else prepare_images
    return make(config, check)


def prepare_images(config: ExperimentConfig, check: Check) -> Run:
    """As prepare, for what trains on images: an autoencoder or a tokenizer."""
    objective = build_objective(config, config.model)
    validation_set = make_dataset(config.data.validation) if config.data.validation else None
    callbacks = evaluation(config, objective.model, None)
    train_set = make_dataset(config.data.train)
    if config.data.latent_variants:
        train_set = cached_latents(config, objective, train_set, check)
    return Run(objective, train_set, validation_set, callbacks)


def cached_latents(
    config: ExperimentConfig, objective: Objective, dataset: Any, check: Check
) -> LatentDataset:
    check_cacheable(objective)
    torch.manual_seed(config.seed)  # as fit() does: a cache changes no first weights
    objective.prepare()
    check(objective)
    warn_unused(config.data, config.data.latent_variants, "data.latent_variants")
    data, model = config.data, objective.model.eval()
    folder = Path(data.latent_cache or Path(config.output_dir) / "latents")
    store = build_latent_cache(
        folder,
        objective,
        dataset,
        ImageTransform(model.image_size, data),
        identity=latents_identity(objective, data.train),
        variants=data.latent_variants,
        num_workers=data.num_workers,
        seed=config.seed,
        device=cache_device(config),
    )
    model.to("cpu")
    store.wait()
    return LatentDataset(folder, verify=False)  # just made or checked


def prepare_generator(config: ExperimentConfig, check: Check) -> Run:
    assert config.tokenizer is not None, "the config is checked"
    tokenizer, folder = load_tokenizer(config), Path(config.output_dir)
    derived: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "num_tokens": tokenizer.num_tokens,
        "conditioner": {"name": "class"},
    }
    spec = {**derived, **config.model}
    spec["conditioner"] = named_spec(spec["conditioner"], "conditioner", list(CONDITIONERS))
    check_length(model_config(GENERATORS, spec).num_tokens, tokenizer)
    sources = {"train": token_source(config.data.train, tokenizer)}
    if config.data.validation:
        sources["validation"] = token_source(config.data.validation, tokenizer)
    class_names = list(sources["train"].class_names)
    by_class = spec["conditioner"]["name"] == "class"
    if by_class:
        spec["conditioner"] = {"num_classes": len(class_names), **spec["conditioner"]}
        check_classes(class_names, spec["conditioner"]["num_classes"])
        check_classes_of_run(config, class_names)
        if "validation" in sources:
            check_known(sources["validation"], class_names)
    known = {"class_names": class_names, "codes_id": tokenizer.codes_id}
    objective = build_objective(config, spec, known)
    model = objective.model
    remember_tokenizer(model, folder, tokenizer, config.tokenizer)
    callbacks = evaluation(config, tokenizer, model)
    if isinstance(model.conditioner, TextConditioner):
        for found in sources.values():
            check_any_captions(found, tokenizer.image_size)
    torch.manual_seed(config.seed)
    objective.prepare()
    check(objective)
    cache = Path(config.data.token_cache or folder / "tokens")
    tokens = {
        part: cached_tokens(config, tokenizer, cache / part, part, found)
        for part, found in sources.items()
    }
    train_set, validation_set = tokens["train"], tokens.get("validation")
    if by_class and validation_set is not None:
        check_known(validation_set, class_names)
        validation_set.count_classes_in(class_names)
    number = config.trainer.num_pictures
    if isinstance(model.conditioner, TextConditioner):
        pinned = model.conditioner.pinned(model.config.conditioner)
        model.config = replace(model.config, conditioner=pinned)
        for part, captioned in tokens.items():
            add_text(model.conditioner, cache / part / "text", captioned, cache_device(config))
        load_encoder.cache_clear()  # from here on the cached rows do
    if validation_set is not None and number:
        cond: Tensor | Text = torch.arange(number) % max(1, len(class_names))
        names = None
        if validation_set.text is not None:
            names = list(dict.fromkeys(validation_set.captions))[:number]
            cond = Text.pad([validation_set.text[name] for name in names])
        callbacks.append(Images(folder / "pictures", draw_generations(tokenizer, cond, names)))
    seen: Any = train_set
    if config.data.class_balance:
        seen = Subset(train_set, balanced(train_set.labels, config.data.class_balance))
    return Run(objective, seen, validation_set, callbacks)


def build_objective(
    config: ExperimentConfig, spec: Mapping[str, Any], known: Mapping[str, Any] | None = None
) -> Objective:
    """The experiment's objective, of the model that `spec` names and the trained models that
    config.start names, which the model's metadata then hold. known: other metadata."""
    start = {name: load_for(f"start.{name}", path) for name, path in config.start.items()}
    torch.manual_seed(config.seed)  # the first weights depend on nothing else
    model = build_model(TASKS[config.task], like_start(spec, start))
    model.metadata.update(known or {})
    sets = config.data.train if isinstance(config.data.train, list) else [config.data.train]
    paths = [str(some["path"]) for some in sets if some.get("name") == "huggingface"]
    if hub_sets := [path for path in dict.fromkeys(paths) if not Path(path).exists()]:
        model.metadata["datasets"] = hub_sets
    if start:
        model.metadata["start"] = {
            name: f"{path} (weights {fingerprint(start[name])})"
            for name, path in config.start.items()
        }
    return make_objective(model, config.objective, start)


def load_for(key: str, path: str) -> Any:
    """The model that a config's `key` names. Raises CheckpointError naming the key."""
    try:
        return load(path)
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}") from error


def load_tokenizer(config: ExperimentConfig) -> Tokenizer:
    assert config.tokenizer is not None, "the config is checked"
    tokenizer = load_for("tokenizer", config.tokenizer)
    if not isinstance(tokenizer, Tokenizer):
        raise ConfigError(f"tokenizer={config.tokenizer!r} holds a {tokenizer.model_type} model")
    if not tokenizer.vocab_size:
        raise ConfigError(
            f"tokenizer={config.tokenizer!r} is continuous (KL): it has no indices to generate"
        )
    if isinstance(tokenizer.config, TiTokConfig) and tokenizer.config.stage == "proxy":
        raise ConfigError(
            f"tokenizer={config.tokenizer!r} is a first stage, without pixels: train the second one"
        )
    return tokenizer


def check_classes(class_names: list[str], num_classes: int) -> None:
    """Refuse a class generator whose data has other classes than it, or pictures without one."""
    if num_classes != len(class_names):
        raise ConfigError(
            f"model.conditioner.num_classes={num_classes}, but the data has the "
            f"{list_names(class_names)}: leave num_classes out, or name the data's class_names"
        )
    if UNLABELLED in class_names and len(class_names) > 1:
        raise ConfigError(
            f"some pictures of data.train have no class ({UNLABELLED}) and others one of the "
            f"{list_names(class_names)}: give all a class, or choose another model.conditioner"
        )


def check_length(num_tokens: int, tokenizer: Any) -> None:
    """Refuse a generator whose sequences its tokenizer cannot decode."""
    whole = tokenizer.num_tokens
    if not 1 <= num_tokens <= whole or (num_tokens < whole and not tokenizer.ordered):
        wanted = f"at most {whole} and at least 1" if tokenizer.ordered else f"{whole}"
        raise ConfigError(
            f"model.num_tokens={num_tokens} must be {wanted}, as the tokenizer has it"
        )


def token_source(spec: Any, tokenizer: Tokenizer) -> Any:
    """The images that `spec` names; or their tokens, where it names a cache of those."""
    if isinstance(spec, dict) and spec.get("name") == "tokens":
        return ready_tokens(spec, tokenizer)
    return make_dataset(spec)


def check_known(source: Any, class_names: list[str]) -> None:
    """Refuse validation images of a class that the training images lack, where their classes are
    known before they are read."""
    try:
        renumbering(classes_in(source), class_names)
    except ValueError as error:
        raise ConfigError(
            f"data.validation: {error}; or name images of the training classes, or set "
            "data.validation=null"
        ) from None


def classes_in(source: Any) -> list[str]:
    """The names of the classes that a data set's items have, as far as it knows without reading
    them."""
    found: list[str] = []
    for part in origins(source):
        labels = getattr(part, "labels", None)
        numbers = set() if labels is None else set(map(int, labels))
        found += [part.class_names[number] for number in sorted(numbers)]
    return union(found)


def check_classes_of_run(config: ExperimentConfig, class_names: list[str]) -> None:
    """Refuse to go on with a generator over other classes than it was trained on: its rows would
    stand for others."""
    folder = Path(config.output_dir)
    goes_on = config.resume and list_checkpoints(folder / "checkpoints")
    if not goes_on or not (folder / CONFIG).is_file():
        return
    known = read_json(folder / CONFIG).get("metadata", {}).get("class_names")
    if known is not None and known != class_names:
        raise ConfigError(
            f"{folder} holds a generator of the {list_names(known)}, and the data has the "
            f"{list_names(class_names)}: pass resume=false to train it anew, or name another "
            "output_dir"
        )


def check_any_captions(source: Any, size: int) -> None:
    """Refuse images without captions for a generator that reads them."""
    if isinstance(source, TokenDataset):
        found = any(source.captions)
    else:
        found = has_captions(EvaluationImages(source, size))
    if not found:
        raise ConfigError(
            "no picture has a caption: a text conditioner needs them (.txt files beside pictures, "
            "a caption column or key), or choose conditioner {name: class}"
        )


def cached_tokens(
    config: ExperimentConfig, tokenizer: Tokenizer, folder: Path, part: str, source: Any
) -> TokenDataset:
    """The tokens of a token_source, which those of images are kept in. part: train is augmented."""
    if isinstance(source, TokenDataset):
        return source
    if part == "train":
        warn_unused(config.data, config.data.token_variants, "data.token_variants")
    data, spec = config.data, getattr(config.data, part)
    transform = ImageTransform(tokenizer.image_size, data)
    store = build_token_cache(
        folder,
        tokenizer,
        source,
        transform,
        identity=cache_identity(tokenizer, spec),
        variants=data.token_variants if part == "train" else 1,
        num_workers=data.num_workers,
        seed=config.seed,
        device=cache_device(config),
    )
    tokenizer.to("cpu")
    store.wait()
    tokens = TokenDataset(folder)
    tokens.check_codes(tokenizer)
    return tokens


def ready_tokens(spec: dict[str, Any], tokenizer: Any) -> TokenDataset:
    """What flextok tokenize wrote, if with this tokenizer. spec: {name: tokens, path: folder}."""
    tokens: TokenDataset = build({"tokens": TokenDataset}, spec, "dataset")
    if not same_codes(tokens.manifest, tokenizer):
        raise ConfigError(
            f"the tokens in {spec['path']} were made by another tokenizer "
            f"({expected_codes(tokens.manifest)}, not codes {tokenizer.codes_id}): name that one, "
            "or run flextok tokenize with this one"
        )
    tokens.check_codes(tokenizer)
    return tokens


def cache_device(config: ExperimentConfig) -> str:
    """Where tokenizer and text encoder fill the caches: this process's GPU, if it trains on one."""
    if config.trainer.accelerator == "cpu":
        return "cpu"
    devices, found = str(config.trainer.devices), local_device()
    if "," not in devices or not found.startswith("cuda"):
        return found
    numbers = devices.split(",")
    return f"cuda:{int(numbers[this_process().local_rank % len(numbers)])}"


def add_text(conditioner: TextConditioner, folder: Path, tokens: TokenDataset, device: str) -> None:
    """Give a token data set the rows of its captions, cached in `folder`."""
    if without := tokens.captions.count(""):
        log.warning("%d of %d pictures have no caption: null text", without, len(tokens))
    sided = sum(bool(re.search(r"\b(left|right)\b", caption)) for caption in tokens.captions)
    mirrored = tokens.manifest["augmentation"].get("flip") and tokens.manifest["variants"] > 1
    if mirrored and sided:
        log.warning("data.flip=true mirrors pictures, and %d captions say left or right", sided)
    tokens.text = build_text_cache(folder, conditioner.encoder, tokens.captions, device)
    conditioner.null_row = tokens.text[""]


def evaluation(config: ExperimentConfig, tokenizer: Any, generator: Any | None) -> list[L.Callback]:
    """The callback that evaluates at validations; none where none is asked. One of the two models
    is the one that is trained."""
    asked = config.evaluation
    if asked is None:
        return []
    assert config.data.validation is not None, "the config is checked"
    images = take(make_dataset(config.data.validation), asked.limit)
    options = Options(networks=tuple(asked.networks), batch_size=asked.batch_size, seed=config.seed)
    trained = generator or tokenizer
    cells = [Cell(k) for k in asked.num_tokens or [trained.num_tokens]]
    job = make_job(trained, cells, options, tokenizer)  # raises for mistakes and missing weights
    check_enough(job, len(images))
    check_captions(job, EvaluationImages(images, job.tokenizer.image_size))
    names = {"model": config.output_dir, "data": json.dumps(config.data.validation)}

    def measure(model: Any, folder: Path) -> dict[str, Any]:
        tokenizer.to(next(model.parameters()).device)
        return evaluate(model, images, cells, options, folder, names, tokenizer)

    every = asked.every * config.trainer.validate_every
    return [Evaluation(Path(config.output_dir) / "evaluation", measure, every)]


def fill_auto(config: ExperimentConfig, stored: Path | None = None) -> ExperimentConfig:
    """The config with numbers for an identity VAE's `shift: auto` and `scale: auto`: those of the
    run's own config.yaml (`stored`), else of the model that it starts from, else of the training
    pictures."""
    vae = config.model.get("vae")
    if not isinstance(vae, dict) or vae.get("name") != "identity":
        return config
    keys = [key for key in ("shift", "scale") if vae.get(key) == "auto"]
    if not keys or config.task != "tokenizer":
        return config
    known: list[dict[str, Any]] = []
    if stored is not None and stored.is_file():
        known.append(load_experiment(stored).model.get("vae") or {})
    else:
        starts = [load(path).config for path in config.start.values()]
        known += [start.vae for start in starts if isinstance(start, FlexTokConfig)]
    for found in known:
        numbers = {"shift": 0.0, "scale": 1.0, **found}
        if found.get("name") == "identity" and "auto" not in numbers.values():
            filled = {key: numbers[key] for key in keys}
            break
    else:
        filled = {key: value for key, value in measured_vae(config).items() if key in keys}
    return replace(config, model={**config.model, "vae": {**vae, **filled}})


def measured_vae(config: ExperimentConfig) -> dict[str, float]:
    """shift and scale that give the training images mean 0 and deviation 1."""
    size = model_config(TOKENIZERS, config.model).image_size
    mean, deviation, count = measure_pixels(make_dataset(config.data.train), size)
    if deviation < 1e-3:
        raise ConfigError(
            f"the pixels of {count} training images deviate by {deviation:.2g} only: they are "
            "all of one colour; look at data.train, or give model.vae.scale"
        )
    found = {"shift": float(f"{mean:.3g}"), "scale": float(f"{1 / deviation:.3g}")}
    log.info(
        "pixels of %d training images: mean %.3g, deviation %.3g; model.vae: shift %g, scale %g",
        *(count, mean, deviation, found["shift"], found["scale"]),
    )
    return found
