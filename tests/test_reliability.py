"""Runs that are killed, stopped, damaged or diverge lose nothing, and say what happened."""

import csv
import functools
import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from helpers.files import draw_pictures
from helpers.processes import die_before, finish, start
from helpers.runs import (
    Stop,
    generator_yaml,
    interrupt_after,
    logged_losses,
    same,
    tokenizer_yaml,
    weights,
)

from flextok.cli import main
from flextok.config import load_experiment
from flextok.data.stream import Stream
from flextok.hub import CheckpointError
from flextok.objectives import OBJECTIVES
from flextok.pipeline import load
from flextok.registry import build_model
from flextok.schema import ConfigError
from flextok.tokenizers import FlexTok
from flextok.training.callbacks import NonFiniteLoss
from flextok.training.checkpoints import find_checkpoint, list_checkpoints, verify
from flextok.training.record import check_changes
from flextok.training.run import train
from flextok.training.saving import Interrupted

FlowObjective = OBJECTIVES["flow"]


@pytest.fixture
def place(tmp_path_factory):
    """Where runs write: beside the pictures (in tmp_path), which they read."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run(picture_folder, place):
    """run(key=value, ...) trains the tiny tokenizer with those overrides. Returns its folder."""
    path = tokenizer_yaml(place, picture_folder)

    def go(*overrides, folder="run"):
        return train(load_experiment(path, [f"output_dir={place / folder}", *overrides]))

    return go


@pytest.fixture
def die_at(run, monkeypatch):
    """die_at(step, key=value, ...) runs, but dies without goodbye in that step."""

    def die(step, *overrides):
        with monkeypatch.context() as patch:
            interrupt_after(patch, step)
            with pytest.raises(Stop):
                run(*overrides)

    return die


def test_the_newest_and_the_best_are_kept(run, monkeypatch):
    losses = iter([0.5, 0.7, 0.6, 0.9])

    def validation_step(self, batch, index):
        if index == 0:
            self.current_loss = next(losses)
        self.log("val/loss", torch.tensor(self.current_loss), batch_size=1)

    monkeypatch.setattr("flextok.training.module.TrainingModule.validation_step", validation_step)
    options = ("trainer.max_steps=8", "trainer.checkpoint_every=1", "trainer.validate_every=2")
    folder = run(*options, "trainer.keep_last=3", "trainer.num_pictures=1") / "checkpoints"
    assert set(list_checkpoints(folder)) == {2, 6, 7, 8}
    assert json.loads((folder / "best.json").read_text()) == {"step": 2, "loss": 0.5}
    assert (folder / "last.ckpt").resolve().name == "step-0000008.ckpt"
    assert find_checkpoint(folder).name == "step-0000008.ckpt"


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def test_a_damaged_checkpoint_is_never_picked(run, die_at, caplog, place):
    caplog.set_level("INFO")
    uninterrupted = run("trainer.validate_every=100", folder="whole")
    die_at(5, "trainer.validate_every=100")  # with checkpoints 2 and 4
    folder = place / "run"
    newest, older = (folder / "checkpoints" / f"step-000000{n}.ckpt" for n in (4, 2))
    flip_a_bit(newest)
    with pytest.raises(CheckpointError, match=r"step-0000004\.ckpt is damaged: .* checksum"):
        verify(newest)
    leftover = folder / "checkpoints" / ".step-0000003.ckpt.abc.tmp"
    leftover.write_bytes(b"half a checkpoint")
    assert same(run("trainer.validate_every=100"), uninterrupted)
    assert "step-0000004.ckpt is damaged" in caplog.text
    assert "step-0000002.ckpt, step 2" in caplog.text
    assert not leftover.exists()
    assert set(list_checkpoints(folder / "checkpoints")) == {4, 6}
    for path in list_checkpoints(folder / "checkpoints").values():
        verify(path)
        truncate(path)
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* is intact: .*truncated"):
        run("trainer.max_steps=9")
    assert not older.exists()


def test_starting_over_sets_the_old_checkpoints_aside(run):
    folder = run("trainer.max_steps=4")
    run("trainer.max_steps=2", "resume=false")
    assert set(list_checkpoints(folder / "checkpoints-1")) == {3, 4}
    assert set(list_checkpoints(folder / "checkpoints")) == {2}


def test_every_start_is_recorded(run):
    folder = run("trainer.max_steps=2", "seed=5")
    run("trainer.max_steps=4", "seed=5")
    first, second = (json.loads(p.read_text()) for p in sorted((folder / "starts").glob("*.json")))
    assert (first["step"], second["step"]) == (0, 2)
    assert first["options"]["seed"] == first["config"]["seed"] == 5
    assert first["config"]["trainer"]["max_steps"] == 2
    assert first["versions"]["torch"] == torch.__version__.split("+")[0]
    assert first["command"]
    if first["source"]:  # a git checkout
        assert len(first["source"]["commit"]) == 40


def spoil(monkeypatch, steps, value=torch.nan):
    """Make the loss of those calls not finite; of an infinite one the gradient stays finite."""
    calls = iter(range(10_000))
    original = FlowObjective.forward

    def forward(self, *arguments, **options):
        losses = original(self, *arguments, **options)
        if self.training and next(calls) in steps:
            losses["loss"] = losses["loss"] * value if value != value else losses["loss"] + value
        return losses

    monkeypatch.setattr(FlowObjective, "forward", forward)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_steps_without_a_finite_loss_are_skipped(run, monkeypatch, value):
    spoil(monkeypatch, {0, 1}, value)
    untouched = run("trainer.max_steps=2", "optim.ema_decay=0", folder="untouched")
    start_weights = weights(untouched)
    spoil(monkeypatch, {0}, value)
    moved = run("trainer.max_steps=2", "optim.ema_decay=0", folder="moved")
    moved_weights = weights(moved)
    assert all(torch.isfinite(v).all() for v in moved_weights.values())
    assert any(not torch.equal(start_weights[k], moved_weights[k]) for k in start_weights)
    # the same initial weights, untouched by two bad steps
    torch.manual_seed(0)
    config = load_experiment(untouched / "config.yaml")
    torch.manual_seed(config.seed)
    fresh = build_model({"flextok": FlexTok}, config.model)
    assert all(torch.equal(v, start_weights[k]) for k, v in fresh.state_dict().items())


def test_too_many_in_a_row_stop_the_run_with_a_report(run, place, monkeypatch):
    spoil(monkeypatch, {1, 3, 4, 5})
    with pytest.raises(NonFiniteLoss, match=r"not finite in 3 steps in a row.*Report:"):
        run("trainer.max_steps=9", "trainer.max_nonfinite=3", "trainer.validate_every=100")
    (report,) = (place / "run").glob("nonfinite-*.json")
    facts = json.loads(report.read_text())
    assert (facts["steps_in_a_row"], facts["steps_skipped"]) == (3, 4)
    assert facts["last_losses"][-3:] == ["NaN"] * 3
    assert isinstance(facts["last_losses"][0], float)
    monkeypatch.undo()
    run("trainer.max_steps=9")  # from the last checkpoint, which is sound
    assert all(torch.isfinite(v).all() for v in weights(place / "run").values())


def test_a_resumed_run_with_accumulation_is_exact(run, die_at):
    options = ("trainer.accumulate=2", "trainer.checkpoint_every=1")
    whole = run(*options, folder="whole")
    die_at(3, *options)
    folder = run(*options)
    assert same(folder, whole)
    assert logged_losses(folder)[3] == logged_losses(whole)[3]
    assert {p.name for p in (folder / "pictures").iterdir()} == {
        p.name for p in (whole / "pictures").iterdir()
    }


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_continues_with_other_accumulation_of_the_same_batch(run, die_at, before, after):
    """Lightning's count of batches stayed that of the first part: the next step took too few, and
    validations moved."""

    def options(accumulate):
        common = {"max_steps": 8, "checkpoint_every": 1, "num_pictures": 0}
        return [
            *(f"trainer.{key}={value}" for key, value in common.items()),
            *(f"trainer.accumulate={accumulate}", f"data.batch_size={4 // accumulate}"),
        ]

    def validated(folder):
        paths = folder.glob("logs/csv/version_*/metrics.csv")
        rows = [row for path in paths for row in csv.DictReader(path.open())]
        return sorted(int(float(row["step"])) for row in rows if row.get("val/loss"))

    whole = run(*options(before), folder="whole")
    die_at(4, *options(before))
    folder = run(*options(after))
    expected, found = weights(whole), weights(folder)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=0, msg=key)
    assert validated(folder) == validated(whole) == [3, 6, 8]
    assert logged_losses(folder).keys() == set(range(8))


def test_a_run_of_another_batch_size_goes_on_with_the_next_sample(run, monkeypatch):
    run("trainer.max_steps=4")  # batches of 4
    positions, plain = [], Stream.__getitem__

    def noting(self, position):
        positions.append(position)
        return plain(self, position)

    monkeypatch.setattr(Stream, "__getitem__", noting)
    run("trainer.max_steps=6", "data.batch_size=3", "trainer.num_pictures=0")
    assert positions[:6] == [16, 17, 18, 19, 20, 21]


def test_a_run_that_goes_on_is_told_of_other_devices(run):
    folder = run("trainer.max_steps=2")
    there = load_experiment(folder / "config.yaml")
    for steps in (2, 4):  # a finished one is not refused
        trainer = replace(there.trainer, devices=8, num_nodes=2, max_steps=steps)
        found = check_changes(folder / "config.yaml", replace(there, trainer=trainer), 2)
        assert found["trainer.devices"] == (1, 8)
        assert found["trainer.num_nodes"] == (1, 2)


def test_the_first_weights_do_not_depend_on_what_the_token_cache_drew(run, place, picture_folder):
    run("trainer.max_steps=1", folder="tokenizer")
    path = generator_yaml(place, picture_folder)
    folders = [
        train(
            load_experiment(
                path,
                [
                    f"output_dir={place / name}",
                    "trainer.max_steps=1",
                    f"data.token_cache={place / 'tokens'}",
                ],
            )
        )
        for name in ("makes", "finds")
    ]
    assert same(*folders)


@pytest.fixture(scope="module")
def long_runs(tmp_path_factory):
    """Configs of a tokenizer and a generator of 40 steps, and both trained without a stop."""
    folder = tmp_path_factory.mktemp("long")
    draw_pictures(folder / "pictures", [f"{i}.png" for i in range(6)])
    options = {"max_steps": 40, "checkpoint_every": 3, "validate_every": 20, "num_pictures": 1}
    paths = [tokenizer_yaml(folder, folder / "pictures", **options)]
    paths.append(generator_yaml(folder, folder / "pictures"))
    for path in paths:
        spec = yaml.safe_load(path.read_text())
        spec["trainer"] |= options
        spec["data"]["token_cache"] = str(folder / "tokens")
        path.write_text(yaml.safe_dump(spec))
        process = start(["train", path], folder / "log")
        assert finish(process) == [0], (folder / "log").read_text()[-3000:]
    return folder


def wait_for_step(folder: Path, step: int, process) -> None:
    while not [n for n in list_checkpoints(folder / "checkpoints") if n >= step]:
        assert process.is_alive()
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["tokenizer", "generator"])
def test_a_run_killed_again_and_again_ends_as_one_never_killed(long_runs, tmp_path, task):
    """Few kills here; scripts/kill_test.py makes as many as one likes, of any command."""
    command = ["train", long_runs / f"{task}.yaml", f"output_dir={tmp_path / 'run'}"]
    draws = random.Random(task)
    reached = 0
    for _ in range(3):
        process = start(command, tmp_path / "log")
        wait_for_step(tmp_path / "run", reached + 6, process)
        time.sleep(draws.uniform(0, 0.1))
        process.kill()
        assert finish(process) == [-signal.SIGKILL]
        reached = max(list_checkpoints(tmp_path / "run" / "checkpoints"))
        for path in list_checkpoints(tmp_path / "run" / "checkpoints").values():
            verify(path)
    assert reached < 40
    assert finish(start(command, tmp_path / "log")) == [0], (tmp_path / "log").read_text()[-3000:]
    assert same(tmp_path / "run", long_runs / task)
    assert load(tmp_path / "run").metadata["step"] == 40


@pytest.mark.slow
def test_an_evaluation_killed_again_and_again_reports_as_one_never_killed(long_runs, tmp_path):
    def command(folder):
        data = ["emoji:validation", "--limit", 128, "--num-tokens", 2, 8, "--networks"]
        return ["evaluate", long_runs / "tokenizer", *data, "--output", tmp_path / folder]

    def report(folder):
        found = json.loads((tmp_path / folder / "report.json").read_text())
        assert found["settings"]["sample_count"] == 128
        return found["settings"], [(r["num_tokens"], r["scores"]) for r in found["results"]]

    def run(folder, moment):
        die = functools.partial(die_before, moment, tmp_path / folder)
        return finish(start(command(folder), tmp_path / "log", die))

    assert run("whole", 0) == [0]
    count = int((tmp_path / "whole.changes").read_text())
    for moment in (count // 2, 2):  # among the parts, and at once
        assert run("killed", moment) == [-signal.SIGKILL]
    assert finish(start(command("killed"), tmp_path / "log")) == [0]
    assert "continuing the evaluation" in (tmp_path / "log").read_text()
    assert report("killed") == report("whole")


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_that_starts_over_is_not_requeued(place, picture_folder, monkeypatch, capsys, resume):
    """With resume=false the job would begin at step 0 for ever."""

    def stop(config, only_caches):
        raise Interrupted(signal.SIGUSR1, 3)

    asked = []
    monkeypatch.setattr("flextok.cli.training.train", stop)
    monkeypatch.setattr("flextok.cli.training.requeue", asked.append)
    path = tokenizer_yaml(place, picture_folder)
    with pytest.raises(SystemExit) as ended:
        main(["train", str(path), f"resume={str(resume).lower()}"])
    assert ended.value.code == 128 + signal.SIGUSR1
    assert asked == ([signal.SIGUSR1] if resume else [])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("flextok: SIGUSR1: stopped after step 3, saved; ")
    how = "run the same command again to" if resume else "continues when run again without resume=f"
    assert how in line


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_and_slurm_gets_its_job_back(long_runs, tmp_path, name):
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "asked"}\n')
    scontrol.chmod(0o755)
    variables = {"SLURM_JOB_ID": 4711, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    long_breath = ["trainer.checkpoint_every=1000", "trainer.validate_every=1000"]
    command = ["train", long_runs / "tokenizer.yaml", f"output_dir={tmp_path / 'run'}"]
    process = start([*command, *long_breath], tmp_path / "log", **variables)
    while not list((tmp_path / "run").glob("logs/csv/*/metrics.csv")):
        assert process.is_alive()
        time.sleep(0.02)
    number = getattr(signal, name)
    os.kill(process.pid, number)
    assert finish(process) == [128 + number]
    (step,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert f"{name}: stopped after step {step}, saved" in (tmp_path / "log").read_text()
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == (
        "requeue 4711\n" if name == "SIGUSR1" else ""
    )
    assert finish(start(command, tmp_path / "log")) == [0]
    assert same(tmp_path / "run", long_runs / "tokenizer")


@pytest.mark.slow
def test_a_generator_trains_on_shards_made_beforehand(long_runs, tmp_path):
    pictures = f"{{name: folder, root: {long_runs / 'pictures'}}}"
    arguments = ["tokenize", long_runs / "tokenizer", pictures, tmp_path / "tokens", "--flip"]
    assert main([str(a) for a in [*arguments, "--variants", 3]]) == 0
    ready = f"{{name: tokens, path: {tmp_path / 'tokens'}}}"
    overrides = [f"data.train={ready}", "data.validation=null", "trainer.validate_every=1000"]
    folder = tmp_path / "run"
    train(load_experiment(long_runs / "generator.yaml", [f"output_dir={folder}", *overrides]))
    # its own cache holds the same sequences, validation changes nothing
    assert same(folder, long_runs / "generator")
    assert not (folder / "tokens").exists()
    other = tmp_path / "other"
    run_of_two_steps = [f"output_dir={other}", "trainer.max_steps=2"]
    train(load_experiment(long_runs / "tokenizer.yaml", run_of_two_steps))
    with pytest.raises(ConfigError, match="made by another tokenizer"):
        train(
            load_experiment(
                long_runs / "generator.yaml",
                [f"output_dir={tmp_path / 'no'}", *overrides, f"tokenizer={other}"],
            )
        )
