"""Numbers that no run can mean are refused by name before anything is built."""

import math
import textwrap
import typing
from dataclasses import is_dataclass, replace

import pytest
import yaml

from flextok.config import (
    DataConfig,
    EvaluationConfig,
    ExperimentConfig,
    OptimConfig,
    TrainerConfig,
    load_experiment,
    save_experiment,
)
from flextok.schema import ConfigError, from_mapping
from flextok.training.run import train

MINIMAL = {
    "task": "tokenizer",
    "output_dir": "nowhere",
    "model": {"name": "flextok"},
    "data": {"train": {"name": "emoji"}, "validation": {"name": "emoji"}},
    "trainer": {"max_steps": 1},
    "evaluation": {},
}


def numeric_fields(cls, path=()) -> dict[tuple[str, ...], object]:
    """Path of each field that takes numbers -> its type."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        options = typing.get_args(hint) or (hint,)
        if inner := [option for option in options if is_dataclass(option)]:
            found |= numeric_fields(inner[0], (*path, name))
        elif {int, float, list[int], list[float], dict[str, float]} & {hint, *options}:
            found[(*path, name)] = hint
    return found


NUMERIC = numeric_fields(ExperimentConfig)


def read(path, value):
    values = {k: dict(v) if isinstance(v, dict) else v for k, v in MINIMAL.items()}
    place = values
    for key in path[:-1]:
        place = place.setdefault(key, {})
    place[path[-1]] = value
    return from_mapping(ExperimentConfig, values)


def test_the_walk_finds_the_numbers():
    known = {("optim", "lr"), ("trainer", "max_steps"), ("data", "shift"), ("seed",)}
    known |= {("optim", "betas"), ("optim", "lr_scale")}
    known |= {("evaluation", "num_tokens"), ("evaluation", "limit"), ("trainer", "devices")}
    assert known <= NUMERIC.keys()


@pytest.mark.parametrize("path", NUMERIC, ids=".".join)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1, "nan", True])
def test_no_number_may_be_negative_or_not_finite(path, bad):
    hint = NUMERIC[path]
    values = [bad]
    if "list" in str(hint):
        values = [[bad, bad], [0.9, bad]]
    elif "dict" in str(hint):
        values = [{"encoder": bad}]
    for value in values:
        if value == "nan" and "str" in str(hint):
            continue  # devices, which Lightning reads
        with pytest.raises(ConfigError, match=path[-1]):
            read(path, value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optim.lr", 1e30, r"optim.lr=1e\+30 must be above 0 and at most 10"),
        ("optim.lr", 0, "optim.lr=0.0 must be above 0"),
        ("optim.ema_decay", 2, "optim.ema_decay=2.0 must be at least 0 and below 1"),
        ("optim.ema_decay", 1, "must be at least 0 and below 1"),
        ("optim.weight_decay", "1e30", "must be at least 0 and at most 10"),
        ("optim.betas", [0.9, 1.0], r"optim.betas\[1\]=1.0 must be at least 0 and below 1"),
        ("trainer.max_steps", 0, "trainer.max_steps=0 must be at least 1"),
        ("trainer.validate_every", 0, "trainer.validate_every=0 must be at least 1"),
        ("trainer.devices", 0, "trainer.devices=0 must be at least 1"),
        ("data.shift", 0.5, "data.shift=0.5 must be at least 0 and below 0.5"),
        ("data.rotate", -1, "data.rotate=-1.0 must be at least 0 and at most 180"),
        ("data.scale", -0.1, "data.scale=-0.1 must be at least 0 and below 1"),
        ("data.hue", -0.1, "data.hue=-0.1 must be at least 0 and at most 0.5"),
        ("seed", 2**32, "seed=4294967296 must be"),
        ("trainer.precision", "16-true", "trainer.precision='16-true' must be one of 'auto'"),
        ("trainer.precision", "bf16-true", "trainer.precision='bf16-true' must be one of"),
        ("evaluation.num_tokens", [4, 0], r"evaluation.num_tokens\[1\]=0 must be at least 1"),
    ],
)
def test_the_message_names_key_value_and_range(key, value, message):
    with pytest.raises(ConfigError, match=message):
        read(key.split("."), value)


def test_the_ends_of_the_ranges_are_legal():
    legal = {"optim.grad_clip": 0, "optim.ema_decay": 0, "optim.warmup_steps": 0, "data.flip": True}
    legal |= {"optim.lr_scale": {"encoder": 0}, "trainer.revive_every": 0, "trainer.devices": "0,1"}
    for key, value in legal.items():
        read(key.split("."), value)


def test_a_config_made_in_python_is_checked_too(tmp_path):
    data = DataConfig(train={"name": "emoji"})
    config = ExperimentConfig("tokenizer", str(tmp_path / "x"), {}, data, TrainerConfig(1))
    with pytest.raises(ConfigError, match=r"evaluation needs data\.validation"):
        replace(config, evaluation=EvaluationConfig())
    for part in (replace(config, optim=OptimConfig(lr=math.nan)),
                 replace(config, trainer=TrainerConfig(max_steps=-1))):  # fmt: skip
        with pytest.raises(ConfigError, match=r"optim.lr=nan|trainer.max_steps=-1"):
            train(part)
    assert not (tmp_path / "x").exists()


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(textwrap.dedent(text))


def test_a_file_changes_its_base(tmp_path):
    (tmp_path / "below").mkdir()
    write(
        tmp_path,
        root="""
            task: tokenizer
            output_dir: a
            start: {weights: b, proxy: c}
            model:
              {name: flextok, quantizer: {name: fsq, levels: [8]}, vae: {name: identity, scale: 2}}
            data: {train: [{name: emoji}, {name: emoji}], validation: {name: emoji}}
            optim: {lr: 1.0e-3, lr_scale: {encoder: 0.2}, betas: [0.9, 0.99]}
            trainer: {max_steps: 5, devices: 2}
            """,
    )
    write(tmp_path / "below", middle="base: ../root.yaml\nmodel: {quantizer: {bound: ifsq}}\n")
    write(
        tmp_path,
        top="""
            base: below/middle.yaml
            output_dir: ${task}
            start: {weights: null}
            model: {vae: {name: kl}}
            data: {train: {name: folder, root: x}, validation: null}
            optim: {lr_scale: {}, betas: [0.8, 0.9]}
            trainer: {max_steps: 6}
            """,
    )
    config = load_experiment(
        tmp_path / "top.yaml", ["trainer.devices=3", "model.quantizer.levels=[4]"]
    )
    assert config.model == {
        "name": "flextok",
        "quantizer": {"name": "fsq", "levels": [4], "bound": "ifsq"},
        "vae": {"name": "kl"},  # another component: nothing of the base's is left
    }
    assert config.data.train == {"name": "folder", "root": "x"}
    assert config.data.validation is None
    assert config.start == {"proxy": "c"}
    assert (config.optim.lr, config.optim.lr_scale, config.optim.betas) == (1e-3, {}, [0.8, 0.9])
    assert (config.trainer.max_steps, config.trainer.devices) == (6, 3)
    assert (config.task, config.output_dir) == ("tokenizer", "tokenizer")
    save_experiment(config, tmp_path / "saved.yaml")
    assert load_experiment(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "base: b.yaml", "b": "base: a.yaml"}, r"a.yaml -> .*b.yaml -> .*a.yaml leads back"),
        ({"a": "base: a.yaml"}, r"a.yaml -> .*a.yaml leads back to itself"),
        ({"a": "base: c.yaml"}, r"no config file .*c.yaml' \(.*a.yaml -> .*c.yaml\)"),
        ({"a": "base: [b.yaml, 1]"}, r"a.yaml: base=\['b.yaml', 1\] must name other config files"),
        ({"a": "base: b.yaml", "b": "[1]"}, r"b.yaml must be a mapping"),
        ({"a": "base: b.yaml", "b": "{"}, r"b.yaml is not valid YAML"),
        ({"a": "base: b.yaml", "b": "nodel: 1"}, r"unknown key 'nodel'"),
    ],
)
def test_mistakes_of_a_base_name_the_files(tmp_path, files, message):
    write(tmp_path, **files)
    with pytest.raises(ConfigError, match=message):
        load_experiment(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [
        ("model", "null_prob", r"model.null_prob belongs elsewhere: objective.null_prob"),
        ("model", "cond_drop", r"model.cond_drop belongs elsewhere: objective.cond_drop"),
        ("model", "checkpoint_blocks", r"elsewhere: trainer.checkpoint_blocks"),
        ("model", "distill", r"model.distill is now objective=\{name: distillation"),
        ("model", "cross_length", r"is now objective=\{name: cross_length, weight"),
        ("objective", "decode", r"objective.decode belongs elsewhere: model.decode"),
        ("trainer", "lr", r"trainer.lr belongs elsewhere: .*optim.lr"),
        ("data", "max_steps", r"data.max_steps belongs elsewhere: trainer.max_steps"),
        (None, "adversarial", r"adversarial is now objective=\{name: adversarial"),
        (None, "batch_size", r"^batch_size belongs elsewhere: data.batch_size or evaluation"),
    ],
)
def test_a_key_in_the_wrong_section_is_told_its_place(tmp_path, section, key, message):
    """Keys that moved to the objective's section, and any other."""
    values = {k: dict(v) if isinstance(v, dict) else v for k, v in MINIMAL.items()}
    (values.setdefault(section, {}) if section else values)[key] = 1
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=message):
        load_experiment(path)


def test_a_folder_with_a_hash_in_its_name_is_that_folder(tmp_path, monkeypatch):
    """YAML took what is behind it for a comment, and the folder before it was trained on."""
    monkeypatch.chdir(tmp_path)
    for name in ("set", "set #2"):
        (tmp_path / name).mkdir()
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in MINIMAL.items() if k != "evaluation"}))
    data = load_experiment(path, ["data.train=set #2", "data.validation=null"]).data
    assert data.train == {"name": "folder", "root": "set #2"}
    assert data.validation is None
    both = load_experiment(path, ["data.train=[{name: emoji}, {name: emoji_scenes}]"]).data.train
    assert len(both) == 2
