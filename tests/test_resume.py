"""A run that is started again: what may change, what may not, and what lies in its folder."""

import copy
import csv
import functools
import json
import logging
import shutil
import threading
import time
import zipfile
from itertools import chain
from pathlib import Path

import pytest
import torch
from helpers.files import draw_pictures
from helpers.models import TINY, tiny_tokenizer
from helpers.processes import CONTEXT, finish, start
from helpers.runs import SIX_STEPS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flextok import files
from flextok.config import ExperimentConfig, OptimConfig, save_experiment
from flextok.files import only_one
from flextok.hub import CheckpointError
from flextok.objectives import make_objective
from flextok.pipeline import load
from flextok.schema import ConfigError, from_mapping
from flextok.training.checkpoints import (
    WholeFiles,
    find_checkpoint,
    list_checkpoints,
    verify,
)
from flextok.training.module import TrainingModule
from flextok.training.options import FitOptions
from flextok.training.prepare import prepare
from flextok.training.run import fit_options, train
from flextok.training.saving import Checkpoints


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    draw_pictures(folder / "a", [f"{c}/{i}.png" for c in ("cats", "dogs") for i in range(3)])
    draw_pictures(folder / "b", [f"{c}/{i}.png" for c in ("ants", "bees") for i in range(3)])
    return folder


@pytest.fixture
def make(place, tmp_path):
    """make("optim.lr", 0.1, ...): the tiny run's config with these changes."""

    def config(*changes, **trainer) -> ExperimentConfig:
        decode = {"num_steps": 1, "guidance_scale": 1.0}
        values = {
            "task": "tokenizer",
            "output_dir": str(tmp_path / "run"),
            "model": {"name": "flextok", **copy.deepcopy(TINY), "decode": decode},
            "data": {"train": {"name": "folder", "root": str(place / "a")}, "batch_size": 4},
            "optim": {"lr": 1e-3, "warmup_steps": 2, "ema_decay": 0.9},
            "trainer": {**SIX_STEPS, "max_steps": 4, "validate_every": 100, **trainer},
        }
        for key, value in zip(changes[::2], changes[1::2], strict=True):
            *parents, last = key.split(".")
            inner = values
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[last] = value
        return from_mapping(ExperimentConfig, values)

    return config


class Stop(Exception):
    pass


@pytest.fixture
def stop_after(monkeypatch):
    """stop_after(step, config) trains, but dies in the step after it, without goodbye."""

    def run(step, config):
        def training_step(module, batch, index, original):
            if module.global_step == step:
                raise Stop
            return original(module, batch, index)

        with monkeypatch.context() as patch:
            name = "flextok.training.module.TrainingModule.training_step"
            original = TrainingModule.training_step
            patch.setattr(name, lambda m, b, i: training_step(m, b, i, original))
            with pytest.raises(Stop):
                train(config)

    return run


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file()
    }


def adamw(folder: Path) -> list[dict]:
    """The groups of the optimizer in the newest checkpoint."""
    content = torch.load(find_checkpoint(folder / "checkpoints"), weights_only=True)
    return content["optimizer_states"][0]["param_groups"]


def test_a_finished_run_started_again_is_left_as_it_is(make, place, caplog):
    """It once wrote the new config and class names beside the old weights."""
    caplog.set_level("INFO")
    folder = train(make())
    before = snapshot(folder)
    assert train(make()) == folder
    assert f"nothing to do: {folder} is trained to its end, step 4" in caplog.text
    # what changes no weight is no reason to refuse, and none to write either
    train(make(log_every=2, keep_last=5, max_steps=3))
    for key, value, named in (
        ("data.train", {"name": "folder", "root": str(place / "b")}, "data.train.root="),
        ("data.flip", True, "other data (data.flip=False there, True now)"),
        ("model.decoder_depth", 1, "another model (model.decoder_depth=2 there, 1 now)"),
        ("optim.lr", 0.5, "optim.lr=0.001 there, 0.5 now would change nothing"),
        ("optim.betas", [0.8, 0.9], "optim.betas=[0.9, 0.95] there, [0.8, 0.9] now"),
        ("seed", 3, "seed=0 there, 3 now"),
        ("data.batch_size", 2, "data.batch_size=4 there, 2 now"),
    ):
        with pytest.raises(ConfigError) as told:
            train(make(key, value))
        assert named in str(told.value)
        assert "resume=false to start over" in str(told.value)
    assert snapshot(folder) == before
    assert load(folder).metadata["class_names"] == ["cats", "dogs"]


def test_data_named_by_another_path_are_the_same(make, place, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    train(make())
    before = snapshot(tmp_path / "run")
    (tmp_path / "link").symlink_to(place / "a")
    for root in (f"{place / 'a'}/", str(place / "b" / ".." / "a"), str(tmp_path / "link")):
        caplog.clear()
        train(make("data.train", {"name": "folder", "root": root}))
        assert "nothing to do" in caplog.text
        assert snapshot(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("data.train", {"name": "folder", "root": "b"}, "other data (data.train.root="),
        ("data.validation", {"name": "folder", "root": "b"}, "other data (data.validation=None"),
        ("data.shift", 0.1, "other data (data.shift=0.0 there, 0.1 now)"),
        ("model.num_registers", 4, "another model (model.num_registers=8 there, 4 now)"),
        ("model.vae.shift", 0.5, "another model (model.vae.shift=None there, 0.5 now)"),
        ("start", {"weights": "b"}, "another model (start.weights=None there, 'b' now)"),
        ("optim.name", "muon", "another optimizer (optim.name='adamw' there, 'muon' now)"),
        ("optim.ema_decay", 0.0, "do not fit optim.ema_decay=0.9 there, 0.0 now"),
        ("trainer.strategy", "fsdp2", "do not fit trainer.strategy='auto' there, 'fsdp2' now"),
    ],
)
def test_what_an_interrupted_run_cannot_change_is_refused_by_name(
    make, stop_after, key, value, named
):
    stop_after(3, make())
    folder = Path(make().output_dir)
    before = snapshot(folder)
    with pytest.raises(ConfigError) as told:
        train(make(key, value))
    assert named in str(told.value)
    assert snapshot(folder) == before


CHANGES = [
    {"optim.lr": 0.5, "optim.betas": [0.5, 0.6], "optim.warmup_steps": 100, "optim.final_lr": 0.5},
    {"optim.weight_decay": 0.0},  # one group of parameters then, not two
    {"optim.no_decay": ["head", "wq"], "optim.lr_scale": {"encoder": 0.1}, "trainer.max_steps": 9},
]


@pytest.mark.parametrize("changes", CHANGES, ids=["rates", "decay", "groups"])
def test_changed_settings_apply_from_the_next_step_on(make, stop_after, caplog, changes):
    """Changed rates were once written into config.yaml, and the checkpoint's used."""
    caplog.set_level("INFO")
    stop_after(3, make())  # with a checkpoint of step 2
    rates = {}

    def spy(module, batch, index, original):
        groups = module.trainer.optimizers[0].param_groups
        names = {p: name for name, p in module.named_parameters()}
        rates[module.global_step] = {
            names[p]: (g["lr"], g["weight_decay"], tuple(g["betas"]), len(state[p]))
            for g in groups
            for p in g["params"]
            for state in [module.trainer.optimizers[0].state]
        }
        return original(module, batch, index)

    with pytest.MonkeyPatch.context() as patch:
        original = TrainingModule.training_step
        patch.setattr(TrainingModule, "training_step", lambda m, b, i: spy(m, b, i, original))
        flat = [part for change in changes.items() for part in change]
        train(make(*flat))
        continued = rates
        rates = {}
        train(make(*flat, "output_dir", make().output_dir + "-fresh"))
    (line,) = [m for m in caplog.messages if m.startswith("with other settings from here on: ")]
    assert all(key in line for key in changes)
    # the rates of a run that had these settings from its first step on
    assert {s: {n: r[:3] for n, r in step.items()} for s, step in continued.items()} == {
        s: {n: r[:3] for n, r in step.items()} for s, step in rates.items() if s >= 2
    }
    # and what the optimizer had learned
    assert all(learned == 3 for *_, learned in continued[2].values())


def test_a_saved_steps_row_is_logged_before_and_once(make, tmp_path, monkeypatch):
    """A run that ended at a checkpoint lost its step's row: Lightning logs it after the hook that
    saves."""
    save = Checkpoints.save

    def save_and_die(self, trainer):
        save(self, trainer)
        if trainer.global_step == 2:
            raise Stop

    config = make(max_steps=4, checkpoint_every=1, log_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_die)
        with pytest.raises(Stop):
            train(config)
    train(config)
    logs = tmp_path / "run" / "logs"
    rows = [
        row["step"]
        for path in sorted(logs.glob("csv/version_*/metrics.csv"))
        for row in csv.DictReader(path.open())
        if row.get("train/loss")
    ]
    assert rows == ["0", "1", "2", "3"]
    events = EventAccumulator(str(logs / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2, 3]


def test_other_groups_keep_each_parameters_state_with_it():
    def module(**optim):
        options = FitOptions(output_dir="unused", max_steps=1, optim=OptimConfig(**optim))
        return TrainingModule(make_objective(tiny_tokenizer()), options)

    def states(optimizer, names):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return {n: optimizer.state[p] for n, p in zip(names, parameters, strict=True)}

    first, second = module(), module(lr_scale={"encoder": 0.1}, no_decay=["wq", "head"])
    before, after = (m.configure_optimizers()["optimizer"] for m in (first, second))
    for i, parameter in enumerate(first.trained()):
        parameter.grad = torch.full_like(parameter, i + 1)
    before.step()
    checkpoint = {"optimizer_states": [before.state_dict()]}
    checkpoint["optimizer_names"] = first.names_in(before)
    second.on_load_checkpoint(checkpoint)
    after.load_state_dict(checkpoint["optimizer_states"][0])
    names = second.names_in(after)
    assert names != first.names_in(before)
    expected, found = states(before, first.names_in(before)), states(after, names)
    assert expected.keys() == found.keys()
    for name, state in expected.items():
        assert torch.equal(state["exp_avg"], found[name]["exp_avg"]), name


def test_training_on_after_the_end(make):
    folder = train(make())
    train(make(max_steps=7))
    assert load(folder).metadata["step"] == 7
    starts = [json.loads(p.read_text()) for p in sorted((folder / "starts").glob("*.json"))]
    assert [(s["step"], s["config"]["trainer"]["max_steps"]) for s in starts] == [(0, 4), (4, 7)]


def test_a_mistake_sets_no_checkpoints_aside(make):
    folder = train(make())
    before = snapshot(folder)
    with pytest.raises(ValueError, match="nowhere"):
        train(make("data.train", {"name": "folder", "root": "/nowhere"}, "resume", False))
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("trainer.strategy", "dpp", "dpp"),
        ("trainer.accelerator", "CPU", "CPU"),
        ("trainer.devices", "0,1", "devices=0,1 numbers GPUs"),
        ("trainer.revive_every", 5, "revive_every=5"),
        ("optim.lr_scale", {"encodr": 0.1}, "'encodr'.*Did you mean 'encoder'"),
        ("evaluation", {"networks": [], "num_tokens": [2, 99]}, r"num_tokens=99 must be in \[1, "),
    ],
)
def test_a_mistake_that_a_run_meets_late_is_told_before_anything_is_written(
    make, key, value, message
):
    """Neither is the config of a run replaced, nor does a new one take its steps first."""
    validation = make().data.train
    folder = train(make("data.validation", validation))
    before = snapshot(folder)
    with pytest.raises(ValueError, match=message):
        train(make("data.validation", validation, "trainer.max_steps", 8, key, value))
    assert snapshot(folder) == before


def test_a_damaged_config_beside_checkpoints_is_refused(make, stop_after):
    stop_after(3, make())
    path = Path(make().output_dir) / "config.yaml"
    for content in ("", "[1, 2]", "task: [", "task: tokenizer\n", "\0"):
        path.write_text(content)
        with pytest.raises(ConfigError, match=r"config\.yaml cannot be read .*resume=false"):
            train(make())
    save_experiment(make(), path)
    train(make())


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_of_an_older_version_is_refused_clearly(make, stop_after, finished):
    """Its checkpoints hold a model, not an objective, and its config.yaml has keys elsewhere."""
    config = make()
    if finished:
        train(config)
    else:
        stop_after(3, config)
    folder = Path(config.output_dir)
    for path in list_checkpoints(folder / "checkpoints").values():
        content = torch.load(path, weights_only=True)
        del content["run_format"]
        states = content["state_dict"].items()
        content["state_dict"] = {key.removeprefix("objective."): v for key, v in states}
        WholeFiles().save_checkpoint(content, path)
    written = folder / "config.yaml"
    written.write_text(written.read_text().replace("model:\n", "model:\n  null_prob: 0.2\n"))
    before = snapshot(folder)
    for again in (config, make(max_steps=9)):
        with pytest.raises(ConfigError, match=r"of another version .*cannot continue: .*resume=fa"):
            train(again)
    assert snapshot(folder) == before
    train(make("resume", False))
    assert load(folder).metadata["step"] == 4


# Checkpoints: every damage is found, and the one before is taken.


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << place % 8
    path.write_bytes(data)


@pytest.fixture(scope="module")
def two_checkpoints(place, tmp_path_factory):
    """A folder with the checkpoints of steps 2 and 4, and the run's LightningModule."""
    folder = tmp_path_factory.mktemp("two")
    values = {
        "task": "tokenizer",
        "output_dir": str(folder),
        "model": {"name": "flextok", **TINY},
        "data": {"train": {"name": "folder", "root": str(place / "a")}, "batch_size": 2},
        "trainer": {**SIX_STEPS, "max_steps": 4},
    }
    config = from_mapping(ExperimentConfig, values)
    train(config)
    return folder / "checkpoints", TrainingModule(prepare(config).objective, fit_options(config))


@pytest.mark.parametrize("region", ["start", "middle", "directory"])
def test_a_flipped_bit_anywhere_is_found(two_checkpoints, tmp_path, region):
    """The zip directory has no checksum of its own: 37 of 666 flips there went unnoticed."""
    for name in ("step-0000004.ckpt", "step-0000004.ckpt.sum"):
        shutil.copy(two_checkpoints[0] / name, tmp_path)
    path = tmp_path / "step-0000004.ckpt"
    verify(path)
    whole, size = path.read_bytes(), path.stat().st_size
    with zipfile.ZipFile(path) as file:
        directory = file.start_dir
    first = {"start": 0, "middle": size // 2, "directory": directory}[region]
    for place in range(first, min(first + 4000, size), 37):
        flip(path, place)
        with pytest.raises(CheckpointError, match=r"is damaged: .* fails its checksum"):
            verify(path)
        path.write_bytes(whole)
    verify(path)


def put_zip_of_text(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("hello.txt", "hello")


def put_other_model(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    other = tiny_tokenizer(num_registers=4).state_dict()
    content["state_dict"] = {f"objective.model.{key}": value for key, value in other.items()}
    torch.save(content, path)


def put_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


STRANGERS = {
    "a zip of text": put_zip_of_text,
    "another model": put_other_model,
    "an empty file": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "weights alone": lambda path: torch.save(tiny_tokenizer().state_dict(), path),
    "a folder": put_folder,
}


@pytest.mark.parametrize("with_sum", [True, False])
@pytest.mark.parametrize("put", STRANGERS.values(), ids=STRANGERS)
def test_what_is_no_checkpoint_of_this_run_is_passed_over(
    two_checkpoints, tmp_path, caplog, put, with_sum
):
    source, module = two_checkpoints
    shutil.copytree(source, tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints" / "step-0000004.ckpt"
    assert find_checkpoint(newest.parent, module) == newest
    put(newest)
    if not with_sum:  # as copied from somewhere
        newest.with_name(newest.name + ".sum").unlink()
    found = find_checkpoint(newest.parent, module)
    assert found == newest.with_name("step-0000002.ckpt")
    assert "step-0000004.ckpt" in caplog.text
    assert "looking for an older one" in caplog.text


@pytest.mark.parametrize("put", [put_other_model, put_folder])
def test_a_run_continues_before_what_is_not_its_own(make, stop_after, caplog, put):
    caplog.set_level("INFO")
    stop_after(5, make(max_steps=6))  # with checkpoints of steps 2 and 4
    checkpoints = Path(make().output_dir) / "checkpoints"
    put(checkpoints / "step-0000004.ckpt")
    (checkpoints / "step-0000004.ckpt.sum").unlink()
    train(make(max_steps=6))
    assert "step-0000002.ckpt, step 2" in caplog.text
    assert set(list_checkpoints(checkpoints)) == {4, 6}
    for path in list_checkpoints(checkpoints).values():
        verify(path)
        assert path.with_name(path.name + ".sum").exists()


def test_a_damaged_checksum_alone_costs_one_checkpoint_not_the_run(two_checkpoints, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints[0], checkpoints)
    record = '{"world_size": 1, "files": {"step-0000004.ckpt": "x"}}'
    for content in ("", "[]", "null", record, '{"world_size": 2, "files": {}}', '{"files": {}}'):
        (checkpoints / "step-0000004.ckpt.sum").write_text(content)
        assert find_checkpoint(checkpoints).name == "step-0000002.ckpt"
    (checkpoints / "step-0000004.ckpt.sum").unlink()
    assert find_checkpoint(checkpoints).name == "step-0000002.ckpt"


@pytest.mark.parametrize(
    "content",
    [
        *("", "no JSON", "[]", "null", '{"step": 2}', '{"step": null, "loss": 1}'),
        *('{"step": "2", "loss": 0.5}', '{"step": true, "loss": 0.5}', '{"step": 2, "loss": []}'),
    ],
)
def test_a_damaged_record_of_the_best_is_passed_over(tmp_path, caplog, content):
    checkpoints = Checkpoints(tmp_path, FitOptions(output_dir=tmp_path, max_steps=9))
    (tmp_path / "best.json").write_text(content)
    assert checkpoints.read_best(5) is None
    assert "best.json is damaged" in caplog.text
    assert "the next validation counts as the best" in caplog.text
    (tmp_path / "best.json").write_text('{"step": 2, "loss": 0.5}')
    assert checkpoints.read_best(5) == {"step": 2, "loss": 0.5}
    assert checkpoints.read_best(1) is None


def test_a_damaged_record_of_the_best_is_made_again(make, stop_after, place):
    changes = ("data.validation", {"name": "folder", "root": str(place / "a")})
    config = make(*changes, validate_every=2, num_pictures=1)
    stop_after(3, config)
    best = Path(config.output_dir) / "checkpoints" / "best.json"
    best.write_text("[]")
    train(config)
    found = json.loads(best.read_text())
    assert found["step"] == 4
    assert 0 < found["loss"] < 100


# One folder, one run.


def test_a_second_run_in_one_folder_is_refused(make, tmp_path):
    folder = Path(make().output_dir)
    path = tmp_path / "config.yaml"
    save_experiment(make(max_steps=10_000, checkpoint_every=10_000), path)
    process = start(["train", path], tmp_path / "log")
    while not list(folder.glob("starts/*.json")):
        assert process.is_alive(), (tmp_path / "log").read_text()
        time.sleep(0.02)
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(ValueError, match=r"another process is at work in .*run: wait"):
        train(make())
    assert finish(start(["train", path], tmp_path / "second")) == [1]
    last = (tmp_path / "second").read_text().splitlines()[-1]
    assert last.startswith("flextok: another process is at work in")
    assert (folder / "config.yaml").read_bytes() == before
    assert process.is_alive()
    process.kill()
    process.join()
    train(make())  # a dead run holds nothing


def hold(folder, ready, done):
    with only_one(folder):
        ready.set()
        done.wait(60)


def test_a_lock_is_given_back(tmp_path):
    ready, done = CONTEXT.Event(), CONTEXT.Event()
    process = CONTEXT.Process(target=hold, args=(tmp_path / "new", ready, done))
    process.start()
    assert ready.wait(60)
    with pytest.raises(ValueError, match="another process"), only_one(tmp_path / "new"):
        pass
    done.set()
    process.join()
    with only_one(tmp_path / "new"):
        with only_one(tmp_path / "new"):  # as train() and fit()
            pass
        refused = []

        def second():
            try:
                with only_one(tmp_path / "new"):
                    pass
            except ValueError:
                refused.append(True)

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert refused
    with pytest.raises(ZeroDivisionError), only_one(tmp_path / "new"):
        1 // 0  # noqa: B018
    with only_one(tmp_path / "new"):
        pass


def test_a_second_run_is_refused_before_it_fills_the_caches(make, monkeypatch):
    """Both tokenized into one folder, and only then was one refused."""
    monkeypatch.setattr("flextok.training.run.prepare", lambda config: pytest.fail("prepared"))
    ready, done = CONTEXT.Event(), CONTEXT.Event()
    process = CONTEXT.Process(target=hold, args=(Path(make().output_dir), ready, done))
    process.start()
    assert ready.wait(60)
    with pytest.raises(ValueError, match="another process is at work in"):
        train(make())
    done.set()
    process.join()


def test_without_locks_there_is_a_warning(tmp_path, monkeypatch, caplog):
    def lock(file):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files, "lock", lock)
    with caplog.at_level(logging.WARNING), only_one(tmp_path):
        pass
    assert "no locks here" in caplog.text


# What a run says.


def test_a_run_says_what_it_trains_and_what_came_of_it(make, place, tmp_path, caplog):
    """max_steps below validate_every once meant no validation and no pictures, without a word."""
    caplog.set_level("INFO")
    changes = {"data.validation": {"name": "folder", "root": str(place / "a")}}
    changes["output_dir"] = str(tmp_path / "my run")
    folder = train(make(*chain(*changes.items()), max_steps=3, num_pictures=1))
    whole = sum(p.numel() for p in load(folder).parameters())
    text = caplog.text
    assert f"flextok: {whole:,} parameters" in text
    assert "data: 6 images of 2 classes (cats, dogs), 6 for validation" in text
    assert "device: cpu, 1 in all, precision 32-true; 3 steps of 4 images each, 2.0 epochs" in text
    best = json.loads((folder / "checkpoints" / "best.json").read_text())
    assert best["step"] == 3
    loss = f"{best['loss']:.4g}"
    assert f"step 3: val/loss {loss}, the best {loss} at step 3" in text
    assert f"model: {folder}; next: flextok reconstruct PICTURE --model '{folder}'" in text
    assert [p.name for p in (folder / "pictures").iterdir()] == ["step-0000003.png"]


def limit_files(size: int) -> None:
    """Let this process write no larger file: as a full disk, but without one."""
    resource = pytest.importorskip("resource")
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_checkpoint_that_finds_no_room_ends_the_run_in_one_line(make, tmp_path):
    path, log = tmp_path / "config.yaml", tmp_path / "log"
    save_experiment(make(), path)
    assert finish(start(["train", path], log, functools.partial(limit_files, 100_000))) == [1]
    text = log.read_text()
    assert "Traceback" not in text
    line = text[text.index("flextok: could not write") :]
    assert line.count("\n") == 1
    assert "step-0000002.ckpt: File too large (" in line
    assert "start the same command again: it continues" in line
    assert finish(start(["train", path], log)) == [0]
    assert load(make().output_dir).metadata["step"] == 4
