"""Training from Python: fit(), and an objective in whatever wraps it."""

import functools
import importlib.util
import re
import shutil
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from helpers.files import draw_pictures
from helpers.models import AUTOENCODER, TINY, tiny_gpt, tiny_tokenizer
from helpers.processes import finish, start_ranks
from PIL import Image
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

import flextok
from flextok import FitOptions, FlexTok, FlexTokConfig, fit
from flextok.autoencoder import Autoencoder, AutoencoderConfig
from flextok.config import OptimConfig
from flextok.objectives import make_objective
from flextok.schema import ConfigError, from_mapping
from flextok.training.checkpoints import list_checkpoints
from flextok.training.trainer import make_trainer

STEPS, WHOLE = 4, 8  # a batch of eight, or two of four
SETTINGS = {
    "flow": {"batch_lengths": 4, "nested_dropout": "uniform", "null_prob": 0.3},
    "next_token": {"cond_drop": 0.4},
}


def make(name):
    """A tiny model's objective, the same in every process."""
    torch.manual_seed(0)
    model = tiny_tokenizer(drop_mode="truncate") if name == "flow" else tiny_gpt()
    objective = make_objective(model, {"name": name, **SETTINGS[name]})
    objective.prepare()
    return objective.train()


def batches(name):
    """The whole batch of each step."""
    draws = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        if name == "flow":
            yield {"image": torch.rand(WHOLE, 3, 16, 16, generator=draws) * 2 - 1}
        else:
            labels = torch.randint(0, 5, (WHOLE,), generator=draws)
            yield {"indices": torch.randint(0, 200, (WHOLE, 8), generator=draws), "label": labels}


def take_steps(name, objective, optimizer, rank=0, world_size=1, backward=torch.Tensor.backward):
    """A loop as anybody may write it: each process takes its rows of the batch."""
    share = WHOLE // world_size
    for step, whole in enumerate(batches(name)):
        mine = range(rank * share, (rank + 1) * share)
        batch = {key: value[mine.start : mine.stop] for key, value in whole.items()}
        draws = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        backward(objective({**batch, "row": mine}, draws)["loss"])
        optimizer.step()


def save(objective, path):
    torch.save(objective.model.state_dict(), path)


def optimizer_of(objective):
    return torch.optim.AdamW((p for p in objective.parameters() if p.requires_grad), lr=1e-3)


def by_hand(name, path):
    distributed.init_process_group("gloo")
    objective = DistributedDataParallel(make(name))
    rank = distributed.get_rank()
    take_steps(name, objective, optimizer_of(objective), rank, 2)
    if rank == 0:
        save(objective.module, path)
    distributed.destroy_process_group()
    sys.exit(0)


def by_accelerate(name, path):
    accelerator = accelerate.Accelerator(cpu=True)
    objective = make(name)
    wrapped, optimizer = accelerator.prepare(objective, optimizer_of(objective))
    rank = accelerator.process_index
    take_steps(name, wrapped, optimizer, rank, accelerator.num_processes, accelerator.backward)
    assert accelerator.num_processes == 2
    if rank == 0:
        save(accelerator.unwrap_model(wrapped), path)
    accelerator.end_training()
    sys.exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flow", "next_token"])
@pytest.mark.parametrize("train", [by_hand, by_accelerate])
def test_two_processes_end_where_one_with_the_whole_batch_does(tmp_path, name, train):
    one = make(name)
    before = {key: value.clone() for key, value in one.model.state_dict().items()}
    take_steps(name, one, optimizer_of(one))
    path = tmp_path / "weights"
    work = functools.partial(train, name, path)
    codes = finish(*start_ranks(2, [], tmp_path / "log", work), timeout=120)
    text = "\n".join(p.read_text()[-3000:] for p in tmp_path.glob("log.*"))
    assert codes == [0, 0], text
    two = torch.load(path)
    moved = 0.0
    for key, value in one.model.state_dict().items():
        torch.testing.assert_close(two[key], value, atol=1e-5, rtol=0, msg=key)
        moved = max(moved, float((value - before[key]).abs().max()))
    assert moved > 1e-3


class Drawn(Dataset):
    """Items as a user may have them: of a tokenizer in any of four forms."""

    def __init__(self, name, form="tuple"):
        self.name, self.form = name, form

    def __len__(self):
        return 24

    def __getitem__(self, i):
        draws = torch.Generator().manual_seed(i)
        if self.name == "next_token":
            return {"indices": torch.randint(0, 200, (8,), generator=draws), "label": i % 5}
        levels = torch.randint(0, 256, (3, 16, 16), generator=draws)
        image = Image.fromarray(levels.byte().permute(1, 2, 0).numpy())
        tensor = levels / 127.5 - 1
        forms = {
            "tuple": (image, 3),
            "dict": {"image": image},
            "tensor": (tensor, 3),
            "alone": image,
            "tensors": {"image": tensor, "label": 3, "caption": "a cat"},
        }
        return forms[self.form]


def options(folder, **changes):
    common = {"max_steps": STEPS, "accelerator": "cpu", "devices": 1, "num_pictures": 2}
    common["precision"] = "32-true"  # the same numbers on every processor
    return FitOptions(**{"output_dir": folder, "batch_size": WHOLE, **common, **changes})


def by_fit(name, folder):
    fit(make(name), Drawn(name), options=options(folder, batch_size=4, devices=2, strategy="ddp"))
    sys.exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flow", "next_token"])
def test_two_processes_of_fit_end_where_one_with_the_whole_batch_does(tmp_path, name):
    fit(make(name), Drawn(name), options=options(tmp_path / "one"))
    work = functools.partial(by_fit, name, tmp_path / "two")
    codes = finish(*start_ranks(2, [], tmp_path / "log", work), timeout=120)
    text = "\n".join(p.read_text()[-3000:] for p in tmp_path.glob("log.*"))
    assert codes == [0, 0], text
    one, two = (flextok.load(tmp_path / part).state_dict() for part in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-5, rtol=0, msg=key)


def test_items_in_any_form_train_alike(tmp_path):
    """PIL images or tensors, in mappings or tuples, alone or with label and caption."""
    results = [
        fit(make("flow"), Drawn("flow", form), options=options(tmp_path / form, max_steps=2))
        for form in ("tuple", "dict", "tensor", "tensors", "alone")
    ]
    first = results[0].state_dict()
    for model in results[1:]:
        assert all(torch.equal(value, first[key]) for key, value in model.state_dict().items())


def test_what_is_no_image_is_refused_by_name(tmp_path, caplog):
    class Numbers(Drawn):
        def __getitem__(self, i):
            return 7, 0

    with pytest.raises(ValueError, match="none of the 24 samples can be read"):
        fit(make("flow"), Numbers("flow"), options=options(tmp_path))
    assert "int" in caplog.text


def test_fit_returns_the_model_and_leaves_a_folder_that_loads(tmp_path):
    objective = make("flow")
    ema = OptimConfig(lr=1e-3, warmup_steps=1, ema_decay=0.5)
    asked = options(tmp_path, optim=ema, validate_every=2)
    model = fit(objective, Drawn("flow"), Drawn("flow"), options=asked)
    assert model is objective.model
    assert not model.training
    saved = FlexTok.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    assert {p.name for p in (tmp_path / "pictures").iterdir()} == {
        "step-0000002.png",
        "step-0000004.png",
    }
    # again: nothing is to do, and the fresh model gets the trained weights
    checkpoints = {
        p: p.stat().st_mtime_ns for p in list_checkpoints(tmp_path / "checkpoints").values()
    }
    again = fit(make("flow"), Drawn("flow"), Drawn("flow"), options=asked)
    assert all(torch.equal(value, saved[key]) for key, value in again.state_dict().items())
    assert checkpoints == {p: p.stat().st_mtime_ns for p in checkpoints}


def test_a_folder_with_another_program_s_model_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    objective = make("flow")
    before = [p.clone() for p in objective.parameters()]
    with pytest.raises(ValueError, match="would be lost: name another folder"):
        fit(objective, Drawn("flow"), options=options(tmp_path))
    assert all(map(torch.equal, before, objective.parameters()))
    assert not list_checkpoints(tmp_path / "checkpoints")


def test_a_run_of_another_objective_is_passed_over_and_then_refused(tmp_path):
    fit(make("flow"), Drawn("flow"), options=options(tmp_path))
    smaller = make_objective(FlexTok(FlexTokConfig(**{**TINY, "decoder_depth": 1})))
    for steps in (STEPS, 9):
        with pytest.raises(
            ConfigError, match=r"run of another model \(model\.decoder_depth=2 there"
        ):
            fit(smaller, Drawn("flow"), options=options(tmp_path, max_steps=steps))
    shutil.rmtree(tmp_path / "starts")  # as copied without
    with pytest.raises(ValueError, match="is of another model"):
        fit(smaller, Drawn("flow"), options=options(tmp_path, max_steps=9))
    with pytest.raises(ValueError, match="holds a finished run of another model"):
        fit(smaller, Drawn("flow"), options=options(tmp_path))


def flow(vae=None, **spec):
    model = tiny_tokenizer(drop_mode="truncate", **({"vae": vae} if vae else {}))
    return make_objective(model, {"name": "flow", **SETTINGS["flow"], **spec})


CHANGES = {
    "vae": (
        lambda: flow(vae={"name": "identity", "shift": 0.5}),
        {},
        "another model (model.vae.shift=None there, 0.5 now)",
    ),
    "objective": (
        lambda: make_objective(tiny_tokenizer(drop_mode="truncate"), {"name": "cross_length"}),
        {},
        "another model (objective.name='flow' there, 'cross_length' now",
    ),
    "parts": (
        lambda: flow(train=["decoder"]),
        {},
        "another model (objective.train=None there, ['decoder'] now)",
    ),
    "optimizer": (
        flow,
        {"optim": OptimConfig(name="muon", warmup_steps=1)},
        "another optimizer (optim.name='adamw' there, 'muon' now)",
    ),
    "augmentation": (
        flow,
        {"flip": True},
        "other data (data.flip=False there, True now)",
    ),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_what_a_run_from_python_cannot_change_is_refused_by_name(tmp_path, changed):
    """It went on with the old weights, or ended in a KeyError of Muon's."""
    optim = OptimConfig(warmup_steps=1)
    common = {"checkpoint_every": 1, "optim": optim}
    fit(flow(), Drawn("flow"), options=options(tmp_path, max_steps=1, **common))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    make_other, settings, named = CHANGES[changed]
    for steps in (1, 3):
        asked = options(tmp_path, max_steps=steps, **{**common, **settings})
        with pytest.raises(ConfigError) as told:
            fit(make_other(), Drawn("flow"), options=asked)
        assert named in str(told.value)
        assert "choose another output_dir, or pass resume=false" in str(told.value)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}


def test_a_finished_run_from_python_takes_no_other_settings_but_more_steps(tmp_path, caplog):
    common = {"optim": OptimConfig(lr=1e-3, warmup_steps=1), "log_every": 1}
    model = fit(flow(), Drawn("flow"), options=options(tmp_path, max_steps=2, **common))
    for name, changes in {
        "optim.lr=0.001 there, 0.5 now": {"optim": OptimConfig(lr=0.5, warmup_steps=1)},
        "seed=0 there, 3 now": {"seed": 3},
        "data.batch_size=8 there, 4 now": {"batch_size": 4},
        "trainer.accumulate=1 there, 2 now": {"accumulate": 2},
    }.items():
        asked = options(tmp_path, max_steps=2, **{**common, **changes})
        with pytest.raises(ConfigError) as told:
            fit(flow(), Drawn("flow"), options=asked)
        assert f"{name} would change nothing: raise trainer.max_steps" in str(told.value)
    caplog.clear()
    again = options(tmp_path, max_steps=2, **{**common, "log_every": 2})  # which changes no weight
    same = fit(flow(), Drawn("flow"), options=again)
    assert [r.levelname for r in caplog.records if "nothing to do" in r.message] == ["WARNING"]
    assert all(torch.equal(v, same.state_dict()[k]) for k, v in model.state_dict().items())
    longer = fit(flow(), Drawn("flow"), options=options(tmp_path, max_steps=3, **common))
    assert longer.metadata["step"] == 3


def test_an_objective_in_memory_trains_on(tmp_path):
    """What an export measured of an autoencoder is no change of its settings."""

    def run(objective, steps):
        optim = OptimConfig(warmup_steps=1)
        fit(objective, Drawn("flow"), options=options(tmp_path, max_steps=steps, optim=optim))

    torch.manual_seed(0)
    autoencoder = Autoencoder(from_mapping(AutoencoderConfig, AUTOENCODER))
    objective = make_objective(autoencoder, {"name": "autoencoder", "perceptual": {}})
    run(objective, 1)
    assert objective.model.config.latents_mean is not None
    run(objective, 2)
    assert objective.model.metadata["step"] == 2


def test_a_learning_rate_that_only_rises_is_warned_of(tmp_path, caplog):
    fit(flow(), Drawn("flow"), options=options(tmp_path / "a", max_steps=1))
    assert "optim.warmup_steps=1000 is not below trainer.max_steps=1: " in caplog.text
    assert "to 0.1% of optim.lr" in caplog.text
    caplog.clear()
    enough = options(tmp_path / "b", max_steps=2, optim=OptimConfig(warmup_steps=1))
    fit(flow(), Drawn("flow"), options=enough)
    assert "warmup_steps" not in caplog.text


def test_a_training_gives_the_warnings_of_its_objective(tmp_path, caplog):
    middle = {"name": "flow", "time_sampler": {"name": "logit_normal"}}
    objective = make_objective(tiny_tokenizer(), middle)
    fit(objective, Drawn("flow"), options=options(tmp_path / "a", max_steps=1))
    assert caplog.text.count("and decoding begins at 1, where a decoder") == 1
    caplog.clear()
    fit(flow(), Drawn("flow"), options=options(tmp_path / "b", max_steps=1))
    assert "decoding begins" not in caplog.text


def test_a_damaged_image_costs_a_run_from_python_one_sample(tmp_path, caplog):
    """Pillow's error ended the run."""
    draw_pictures(tmp_path / "images", [f"{i}.png" for i in range(6)])
    broken = tmp_path / "images" / "3.png"
    broken.write_bytes(broken.read_bytes()[:200])

    class Files(Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, i):
            label = (None, {"a": 1}, "cat", 2, 1.5, torch.tensor([1, 2]))[i]
            return Image.open(tmp_path / "images" / f"{i}.png").convert("RGB"), label

    asked = options(tmp_path / "run", max_steps=2, optim=OptimConfig(warmup_steps=1))
    model = fit(flow(), Files(), Files(), options=asked)
    assert model.metadata["step"] == 2
    assert re.search(r"skipped an unreadable sample \(1 so far\): item 3 of Files: ", caplog.text)


@pytest.mark.parametrize(("before", "now"), [(0.5, 0.0), (0.0, 0.5)])
def test_an_average_neither_begins_nor_ends_in_a_run(tmp_path, before, now):
    """It ended in torch's list of keys that are left over."""

    def run(steps, decay):
        optim = OptimConfig(warmup_steps=1, ema_decay=decay)
        asked = options(tmp_path, max_steps=steps, optim=optim, checkpoint_every=1)
        return fit(make("flow"), Drawn("flow"), options=asked)

    run(1, before)
    with pytest.raises(ConfigError, match=rf"not fit optim.ema_decay={before} there, {now} now"):
        run(2, now)
    shutil.rmtree(tmp_path / "starts")  # as copied without
    with pytest.raises(ConfigError, match=rf"optim\.ema_decay .*, not {now:g}: change it"):
        run(2, now)
    run(2, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flow", "next_token"])
def test_a_compiled_objective_has_the_same_gradients(name):
    batch = next(iter(batches(name)))

    def gradients(objective, call):
        call(batch, torch.Generator().manual_seed(0))["loss"].backward()
        return torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None])

    plain, objective = make(name), make(name)
    compiled = torch.compile(objective, backend="aot_eager")
    expected = gradients(plain, plain)
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradients(objective, compiled), expected, atol=1e-5, rtol=1e-4)


def test_the_documented_way_to_train_from_python(tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs/train.md").read_text("utf-8")
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", page, re.S) if "fit(" in c]
    assert len([line for line in code.splitlines() if line.strip()]) < 14
    warmup, steps = (int(re.search(rf"{n}=(\d+)", code)[1]) for n in ("warmup_steps", "max_steps"))
    assert 10 * warmup < steps
    draws = torch.Generator().manual_seed(0)
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        levels = torch.randint(0, 256, (40, 30, 3), generator=draws).byte()
        Image.fromarray(levels.numpy()).save(tmp_path / "pictures" / f"{i}.jpg")
    monkeypatch.chdir(tmp_path)
    short = re.sub(r"max_steps=[\d_]+", "max_steps=2", code)
    assert short != code
    monkeypatch.setattr(
        "flextok.training.fit.check_devices", lambda given: setattr(given, "accelerator", "cpu")
    )
    exec(compile(short, "train.md", "exec"), {})
    assert list(list_checkpoints(tmp_path / "outputs/mine/checkpoints")) == [2]


def test_loggers_are_those_that_are_asked_for(tmp_path):
    def names(*asked):
        options = FitOptions(
            output_dir=tmp_path, max_steps=1, accelerator="cpu", loggers=list(asked)
        )
        return [type(logger).__name__ for logger in make_trainer(options, False, []).loggers]

    assert names() == []
    assert names("tensorboard", "csv", "csv") == ["Events", "Rows"]
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(ConfigError, match=r"trainer\.loggers=wandb.*pip install wandb"):
            names("wandb")
    with pytest.raises(ConfigError, match="loggers"):
        from_mapping(FitOptions, {"output_dir": "x", "max_steps": 1, "loggers": ["paper"]})
