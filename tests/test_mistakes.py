"""What a user writes wrongly is one line that names it; text stays text."""

import json
import typing
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from helpers.models import TINY, TITOK, VQGAN, tiny_tokenizer
from omegaconf import OmegaConf

from flextok.cli import main
from flextok.config import ExperimentConfig, leaves, load_experiment
from flextok.generators import GENERATORS
from flextok.objectives import make_objective
from flextok.printing import one_line, printable
from flextok.registry import build_model, make_dataset
from flextok.storage import CheckpointError
from flextok.tokenizers import TOKENIZERS
from flextok.training.prepare import prepare

WRONG = ["[{x: 1}]", "{x: [1]}", "true", "1.5", "some text", "[1, 2]", "null", "-1", "0"]
GPT = {"vocab_size": 200, "num_tokens": 8, "depth": 1, "dim": 16, "num_heads": 2}
CLASS = {"conditioner": {"name": "class", "num_classes": 5}}
MODELS = {
    "flextok": {**TINY, "decode": {}},
    "titok": {**TITOK, "proxy": {}},
    "maskgit_vqgan": VQGAN,
    "gpt": {**GPT, **CLASS, "generate": {}},
    "maskgit": {**GPT, **CLASS, "generate": {}},
}
COMPONENTS = {
    "vae": {"name": "kl", "channels": 4, "block_channels": [8], "norm_groups": 4},
    "quantizer": {"name": "vq", "codebook_size": 9, "dim": 3},
    "conditioner": {"name": "text", "encoder": {"name": "words", "dim": 16, "depth": 1}},
}


def keys_of(cls: type, prefix: str = "") -> list[str]:
    """Every key of a config, also of the dataclasses in it."""
    found = []
    for name, hint in typing.get_type_hints(cls).items():
        found.append(prefix + name)
        for leaf in leaves(hint):
            if is_dataclass(leaf):
                found += keys_of(leaf, f"{prefix}{name}.")
    return found


@pytest.fixture
def experiment(tmp_path):
    """A config of a tiny model, with every section that may be left out."""

    def write(**changes: Any) -> str:
        config = {
            "task": "tokenizer",
            "output_dir": str(tmp_path / "run"),
            "model": {"name": "flextok", **TINY},
            "data": {"train": {"name": "emoji"}, "validation": {"name": "emoji"}},
            "trainer": {"max_steps": 1, "accelerator": "cpu"},
            "objective": {},
            "evaluation": {},
            **changes,
        }
        OmegaConf.save(OmegaConf.create(config), tmp_path / "config.yaml")
        return str(tmp_path / "config.yaml")

    return write


def mistake(action, *arguments) -> str | None:
    """The message of an action's ValueError on one line. Any other error passes through."""
    try:
        action(*arguments)
    except ValueError as error:
        return one_line(error)
    return None


def test_every_key_of_a_wrong_type_is_named_in_one_line(experiment, capsys):
    path = experiment()
    for key in keys_of(ExperimentConfig):
        messages = []
        for value in WRONG:
            message = mistake(load_experiment, path, [f"{key}={value}"])
            if message is not None:
                assert key.rpartition(".")[2] in message, (key, value, message)
                messages.append(message)
        text = {"output_dir", "tokenizer", "data.token_cache", "data.latent_cache"}
        free = {"trainer.accelerator", "trainer.strategy", "trainer.precision"}
        assert messages or key in text | free, f"{key} takes everything"
    assert main(["train", path, "trainer.max_steps=[1]"]) == 1
    assert capsys.readouterr().err == "flextok: trainer.max_steps=[1] must be of type int.\n"


@pytest.mark.parametrize("name", list(MODELS))
def test_every_key_of_a_model_of_a_wrong_type_is_named(experiment, name):
    """Down to the options of its components, which no dataclass states."""
    registry = TOKENIZERS if name in TOKENIZERS else GENERATORS
    path = experiment(model={"name": name, **MODELS[name]})

    def build(overrides: list[str]) -> None:
        with torch.device("meta"):
            build_model(registry, load_experiment(path, overrides).model)

    build([])
    keys = keys_of(registry[name].config_class)
    first: list[str] = []
    for component, spec in COMPONENTS.items():
        if component in {f.name for f in fields(registry[name].config_class)}:
            first += [f"model.{component}={json.dumps(spec)}"]
            build(first)
            factory = {"vae": "vae", "quantizer": "quantizer", "conditioner": "conditioner"}
            keys += [f"{factory[component]}.{key}" for key in spec if key != "name"]
    for key in keys:
        assert any(
            mistake(build, [*first, f"model.{key}={value}"]) is not None for value in WRONG
        ), f"model.{key} takes everything"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.conditioner=7", "conditioner=7 must be a mapping"),
        ("model.conditioner={name: klass}", "unknown conditioner 'klass'. Did you mean 'class'"),
        ("model.conditioner={name: class, num_classes: many}", "conditioner.num_classes='many'"),
        ("model.conditioner={name: class, num_classes: 5, dim: 7}", "conditioner.dim=7 must be"),
        ("model.num_heads=two", "model.num_heads='two' must be of type int"),
    ],
)
def test_mistakes_in_a_generator_s_model(experiment, override, message):
    path = experiment(model={"name": "gpt", **GPT, **CLASS})
    found = mistake(lambda: build_model(GENERATORS, load_experiment(path, [override]).model))
    assert found is not None
    assert message.removeprefix("model.") in found


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "folder", "root": 7}, "dataset.root=7 must be of type"),
        (
            {"name": "folder", "root": ".", "class_names": [1, 2]},
            r"class_names[0]=1 must be of type",
        ),
        ({"name": "emoji", "size": "big"}, "dataset.size='big' must be of type int"),
        ({"name": ["emoji"]}, "unknown dataset ['emoji']"),
        ({"root": "."}, "dataset needs a name"),
        ({"name": "emoji", 3: 4}, "unknown key 3"),
    ],
)
def test_mistakes_in_a_data_set(spec, message):
    assert message in (mistake(make_dataset, spec) or "")


@pytest.mark.parametrize(
    "text",
    [
        "outputs/run #1",
        "007",
        "on",
        "no",
        "1e3",
        "null",
        "[",
        "{a",
        "a: b",
        "- a",
        "'x",
        "12:30:00",
    ],
)
def test_text_stays_text(experiment, text):
    """Nothing that YAML would read as a comment, a number, a truth or a structure changes it."""
    path = experiment()
    assert load_experiment(path, [f"output_dir={text}"]).output_dir == text
    config = load_experiment(
        path, ["data.train={name: folder, root: x}", f"data.train.root={text}"]
    )
    assert config.data.train["root"] == text
    assert load_experiment(path, [f"start.weights={text}"]).start["weights"] == text
    vae = load_experiment(path, ["model.vae={name: kl}", f"model.vae.weights={text}"]).model["vae"]
    assert vae["weights"] == (None if text == "null" else text)  # which may be null


def test_other_values_are_read_by_their_type(experiment):
    path = experiment()
    overrides = ["trainer.devices=2", "optim.lr=1e-3", "data.flip=yes", "data.token_cache=null"]
    overrides += ["optim.no_decay=[a, b]", "evaluation.limit=null", "model.vae.scale=1e-1"]
    config = load_experiment(path, [*overrides, "data.train={name: emoji, size: 16}"])
    assert (config.trainer.devices, config.optim.lr, config.data.flip) == (2, 1e-3, True)
    assert (config.data.token_cache, config.optim.no_decay) == (None, ["a", "b"])
    assert config.data.train == {"name": "emoji", "size": 16}
    assert build_model(TOKENIZERS, config.model).vae.scale == 0.1
    assert load_experiment(path, ["trainer.devices=auto"]).trainer.devices == "auto"


@pytest.mark.parametrize(
    "override",
    ["data.train=[]", "data.validation=[]", "trainer.devices=many", "trainer.devices=-1"],
)
def test_values_that_no_run_can_use(experiment, override):
    assert override.partition("=")[0] in (mistake(load_experiment, experiment(), [override]) or "")


@pytest.mark.parametrize("name", ["repa", "prefix_alignment"])
@pytest.mark.parametrize("spec", [{"model": "nothing"}, {"modl": "a"}, {"weight": "big"}])
def test_mistakes_in_the_alignment(name, spec):
    model = build_model(TOKENIZERS, {"name": "flextok", **TINY})
    message = mistake(make_objective(model, {name: spec}).prepare) or ""
    assert next(iter(spec)) in message
    assert str(next(iter(spec.values()))) in message or "unknown key" in message


def test_a_long_override_is_no_file(experiment, capsys):
    assert main(["train", experiment(), f"trainer.strategie={'x' * 300}"]) == 1
    assert "unknown key 'strategie'" in capsys.readouterr().err
    assert main(["train", "x" * 300]) == 1
    assert "no config file" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "a: ${b", "\xff", "3"])
def test_a_file_that_is_no_config(tmp_path, capsys, content):
    (tmp_path / "config.yaml").write_bytes(content.encode("latin-1"))
    assert main(["train", str(tmp_path / "config.yaml")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "config.yaml" in error


def test_an_accelerator_that_is_not_there(experiment, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    path = experiment(evaluation=None, trainer={"max_steps": 1})
    assert main(["train", path, "trainer.accelerator=tpu", "data.validation=null"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("flextok: trainer")


@pytest.mark.parametrize("key", ["tokenizer", "start.weights"])
def test_a_model_that_is_not_trained_yet_is_named_with_its_key(tmp_path, key):
    """The error named a folder, and not which line of the config names that folder."""
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    tokenized = {"name": "emoji", "label": "group"}
    changes = {"tokenizer": str(tmp_path / "tokenizer"), "output_dir": str(tmp_path / "out")}
    changes |= {"data.train": json.dumps(tokenized), key: str(tmp_path / "gone")}
    changes |= {"data.token_variants": "1", "data.validation": "null"}
    config = load_experiment(
        "configs/quickstart_generator.yaml", [f"{k}={v}" for k, v in changes.items()]
    )
    with pytest.raises(CheckpointError, match=f"^{key}: no model at"):
        prepare(config)


def test_untrusted_text_cannot_steer_the_terminal():
    assert printable("a\x1b[2Jb\nc\x9b\u202e\udce9é😀") == r"a\x1b[2Jb\nc\x9b\u202e\udce9é😀"
    assert printable("👩\u200d🚀") == "👩\u200d🚀"
