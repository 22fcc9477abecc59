"""LoRA: adapters are trained and saved in the layout of peft, and loading merges them."""

import json
import shutil
import sys

import pytest
import torch
import yaml
from helpers.files import CATS_AND_DOGS, draw_pictures
from helpers.models import randomize, tiny_gpt, tiny_tokenizer
from helpers.runs import generator_yaml
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset

import flextok
from flextok.config import OptimConfig, load_experiment
from flextok.generators import MaskGIT, MaskGITConfig
from flextok.nn.adapters import merged
from flextok.objectives import make_objective
from flextok.pipeline import remember_tokenizer
from flextok.schema import ConfigError
from flextok.storage import CheckpointError
from flextok.training.fit import fit
from flextok.training.options import FitOptions
from flextok.training.run import train as train_experiment

NAMES = ["ant", "bee", "cat", "dog", "emu"]
NEW = ["dog", "yak"]


class Indices(Dataset):
    class_names = NEW

    def __len__(self):
        return 8

    def __getitem__(self, i):
        indices = torch.randint(200, (8,), generator=torch.Generator().manual_seed(i % 2))
        return {"indices": indices, "label": i % 2}


@pytest.fixture
def base(tmp_path):
    """A trained generator beside its tokenizer."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    gpt = tiny_gpt()
    gpt.metadata["class_names"] = NAMES
    remember_tokenizer(gpt, tmp_path / "base", tokenizer, str(tmp_path / "tokenizer"))
    gpt.save_pretrained(tmp_path / "base")
    return flextok.load(tmp_path / "base")


def continued(base, **lora):
    model = tiny_gpt(conditioner={"name": "class", "num_classes": 2})
    model.metadata.update(class_names=NEW, codes_id=base.metadata["codes_id"])
    spec = {"lora": {"rank": 2, "alpha": 6.0, **lora}, "train": ["conditioner"], "cond_drop": 0.0}
    return make_objective(model, spec, {"weights": base})


def train(objective, folder, steps=3):
    optim = OptimConfig(lr=1e-2, warmup_steps=1, ema_decay=0.5)
    asked = FitOptions(
        output_dir=folder,
        optim=optim,
        max_steps=steps,
        batch_size=4,
        accelerator="cpu",
        checkpoint_every=1,
        loggers=[],
    )
    return fit(objective, Indices(), options=asked)


def test_lora_without_peft_says_what_to_install(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"needs peft: pip install 'flextok\[lora\]'"):
        continued(base)


def test_lora_needs_what_it_changes(base):
    spec = {"lora": {"rank": 2}}
    with pytest.raises(ConfigError, match=r"name one as start\.weights"):
        make_objective(tiny_gpt(), spec)
    with pytest.raises(ConfigError, match="save that one first"):
        make_objective(tiny_gpt(), spec, {"weights": tiny_gpt()})
    model = tiny_gpt()
    model.metadata["class_names"] = NAMES[::-1]
    with pytest.raises(ConfigError, match=r"its part, conditioner, in objective\.train"):
        make_objective(model, spec, {"weights": base})


def test_adapters_are_merged_into_their_layers():
    """W + alpha / rank * B A, by hand; what has no A and B is taken as it is."""
    w, a, b, e = torch.eye(3), torch.ones(1, 3), torch.tensor([[1.0], [2.0], [3.0]]), torch.ones(2)
    found = {f"base_model.model.layer.lora_{k}.weight": v for k, v in (("A", a), ("B", b))}
    found["base_model.model.e.weight"] = e
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 0.5}
    state = merged({"layer.weight": w, "e.weight": torch.zeros(2)}, found, config)
    assert torch.equal(state["layer.weight"], w + 0.5 * b @ a)
    assert torch.equal(state["e.weight"], e)
    for wrong in ({"use_dora": True}, {"r": 0}, {"peft_type": "LOHA"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            merged({"layer.weight": w}, found, config | wrong)
    with pytest.raises(ValueError, match="'layer' fits no layer"):
        merged({"layer.weight": w[:2]}, found, config)


def test_adapters_alone_are_trained_and_saved(base, tmp_path):
    peft = pytest.importorskip("peft")
    before = {key: value.clone() for key, value in base.state_dict().items()}
    objective = continued(base, targets=["wq", "fc1"])
    learn = {name for name, p in objective.model.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0].rsplit(".")[-1] for name in learn} == {"wq", "fc1", "weight"}
    assert [name for name in learn if ".lora_" not in name] == ["conditioner.embedding.weight"]
    model = train(objective, tmp_path / "run")
    assert not (tmp_path / "run" / "model.safetensors").exists()
    files = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert len(files) == 2 * 2 * 2 + 1  # A and B, of two layers in each of two blocks; the classes
    # trained, changed, plain again
    state = model.state_dict()
    assert state.keys() == before.keys()
    changed = {key for key in state if not torch.equal(state[key], before[key])}
    assert {key.rsplit(".")[-2] for key in changed} == {"wq", "fc1", "embedding"}
    assert "embedding.weight" not in changed
    # loaded with what it names, also elsewhere
    for name in ("run", "base", "tokenizer"):
        shutil.move(tmp_path / name, tmp_path / "moved" / name)
    loaded = flextok.load(tmp_path / "moved" / "run")
    assert loaded.class_names == NEW
    for key, value in loaded.state_dict().items():
        torch.testing.assert_close(value, state[key], atol=1e-6, rtol=0)
    assert loaded.metadata["codes_id"] == base.metadata["codes_id"]
    # and by peft itself, on a model that has the new classes
    indices, labels = torch.arange(8).view(2, 4), torch.tensor([1, -1])
    plain = tiny_gpt(conditioner={"name": "class", "num_classes": 2})
    make_objective(plain, start={"weights": base})
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "moved" / "run").eval()
    torch.testing.assert_close(theirs(indices, labels), loaded(indices, labels))


def test_a_lora_run_continues_and_its_end_is_taken_over(base, tmp_path):
    pytest.importorskip("peft")
    whole = train(continued(base), tmp_path / "whole", steps=3).state_dict()
    train(continued(base), tmp_path / "run", steps=2)
    on = train(continued(base), tmp_path / "run", steps=3).state_dict()
    again = train(continued(base), tmp_path / "run", steps=3).state_dict()
    for key, value in whole.items():
        torch.testing.assert_close(on[key], value, atol=1e-6, rtol=0)
        torch.testing.assert_close(again[key], value, atol=1e-6, rtol=0)
    # a second round goes on from the first, whose adapters it finds
    second = train(continued(flextok.load(tmp_path / "run")), tmp_path / "second", steps=1)
    loaded = flextok.load(tmp_path / "second").state_dict()
    for key, value in second.state_dict().items():
        torch.testing.assert_close(loaded[key], value, atol=1e-6, rtol=0)


def test_lora_from_a_config(tmp_path):
    """With validation, whose images the model draws with its adapters in place."""
    pytest.importorskip("peft")
    draw_pictures(tmp_path / "pictures", CATS_AND_DOGS)
    tiny_tokenizer(decode={"num_steps": 1}).save_pretrained(tmp_path / "tokenizer")
    train_experiment(load_experiment(generator_yaml(tmp_path, tmp_path / "pictures", "base")))
    experiment = yaml.safe_load((tmp_path / "base.yaml").read_text())
    experiment |= {
        "output_dir": str(tmp_path / "run"),
        "start": {"weights": str(tmp_path / "base")},
        "objective": {"lora": {"rank": 2}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(experiment))
    train_experiment(load_experiment(tmp_path / "run.yaml"))
    assert (tmp_path / "run" / "pictures" / "step-0000006.png").is_file()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    before, after = (flextok.load(tmp_path / name) for name in ("base", "run"))
    ours, theirs = after.state_dict(), before.state_dict()
    changed = {key.split(".")[0] for key in ours if not torch.equal(ours[key], theirs[key])}
    assert changed == {"blocks"}
    assert flextok.load_tokenizer_of(after).codes_id == before.metadata["codes_id"]
    train_experiment(load_experiment(tmp_path / "run.yaml"))  # nothing is left to do


def test_maskgit_has_adapters_too(tmp_path):
    pytest.importorskip("peft")
    sizes = {"vocab_size": 12, "num_tokens": 8, "depth": 1, "dim": 16, "num_heads": 2}
    config = MaskGITConfig(**sizes, conditioner={"name": "class", "num_classes": 5})
    randomize(MaskGIT(config)).save_pretrained(tmp_path / "base")
    base = flextok.load(tmp_path / "base")
    objective = make_objective(MaskGIT(config), {"lora": {"targets": ["qkv"]}}, {"weights": base})
    batch = {"indices": torch.zeros(2, 8, dtype=torch.long), "label": torch.tensor([0, 3])}
    objective.train()(batch, torch.Generator())["loss"].backward()
    moved = {name for name, p in objective.named_parameters() if p.grad is not None}
    assert moved
    assert all(".qkv.lora_" in name for name in moved)
    with pytest.raises(ConfigError, match="names 'wq', which is no linear layer"):
        make_objective(MaskGIT(config), {"lora": {"targets": ["wq"]}}, {"weights": base})


def test_adapters_without_their_model_are_refused(base, tmp_path):
    gpt = tiny_gpt()
    gpt.save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    adapter = {"x.lora_A.weight": torch.zeros(1, 2), "x.lora_B.weight": torch.zeros(2, 1)}
    save_file(adapter, tmp_path / "run" / "adapter_model.safetensors")
    for reference, message in (
        ("../nowhere", r"of a model that is not at '\.\./nowhere'"),
        ("../base", "its adapter of 'x' fits no layer"),
        (".", "adapters are those of themselves"),
        (7, "that is not at 7"),
    ):
        config = {
            "peft_type": "LORA",
            "r": 1,
            "lora_alpha": 1,
            "base_model_name_or_path": reference,
        }
        (tmp_path / "run" / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=message):
            flextok.load(tmp_path / "run")
