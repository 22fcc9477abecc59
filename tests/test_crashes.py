"""Whatever moment a run is killed at, started again it ends with all that one never killed has."""

import csv
import functools
import json
import os
from pathlib import Path

import pytest
import yaml
from helpers.files import draw_pictures
from helpers.models import TINY
from helpers.processes import die_before, finish, start
from helpers.runs import SIX_STEPS

from flextok.training.checkpoints import list_checkpoints


def write_config(folder: Path) -> Path:
    """A run of four steps with two validations; the second one's loss is the best."""
    draw_pictures(folder / "pictures", [f"{c}/{i}.png" for c in ("cats", "dogs") for i in range(3)])
    pictures = {"name": "folder", "root": str(folder / "pictures")}
    config = {
        "task": "tokenizer",
        "output_dir": str(folder / "run"),
        "model": {"name": "flextok", **TINY, "decode": {"num_steps": 1, "guidance_scale": 1.0}},
        "data": {"train": pictures, "validation": pictures, "batch_size": 3},
        "optim": {"lr": 1e-2, "warmup_steps": 1, "ema_decay": 0.5},
        "trainer": {**SIX_STEPS, "max_steps": 4, "validate_every": 2, "num_pictures": 1},
        "evaluation": {"every": 1, "limit": 2},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def left(folder: Path) -> dict:
    """What a run has left: all that must not depend on kills."""
    rows = [
        row
        for path in folder.glob("logs/csv/version_*/metrics.csv")
        for row in csv.DictReader(path.open())
    ]
    logged = {
        name: {row["step"]: row[name] for row in rows if row.get(name)}
        for name in ("val/loss", "eval/psnr@8")
    }
    reports = {
        p.parent.name: [result["scores"] for result in json.loads(p.read_text())["results"]]
        for p in folder.glob("evaluation/*/report.json")
    }
    names = ("model.safetensors", "config.json", "README.md", "config.yaml")
    files = [folder / name for name in names]
    files += [folder / "checkpoints" / name for name in ("best.json", "validated.json")]
    files += folder.glob("pictures/*")
    return {
        "logged": logged,
        "reports": reports,
        "files": {p.relative_to(folder): p.read_bytes() for p in files},
        "checkpoints": set(list_checkpoints(folder / "checkpoints")),
        "leftovers": [p for p in folder.rglob("*.tmp") if "checkpoints" in p.parts],
    }


# of the changes, in percent; FLEXTOK_CRASHES=all tries each of them (scripts/kill_test.py says how)
SAMPLE = (35, 48, 75, 88, 97)


@pytest.mark.slow
def test_a_run_killed_before_any_change_of_a_file_loses_nothing(tmp_path):
    """A validation that was interrupted was once not repeated: at 41 of 90 moments its row, its
    pictures or the record of the best checkpoint were lost for good."""
    run, log = tmp_path / "run", tmp_path / "log"
    command = ["train", write_config(tmp_path)]
    assert finish(start(command, log, functools.partial(die_before, 0, run))) == [0], (
        log.read_text()
    )
    whole = left(run)
    assert set(whole["logged"]["val/loss"]) == set(whole["logged"]["eval/psnr@8"]) == {"2", "4"}
    assert len(whole["files"]) == 8
    assert whole["checkpoints"] == {2, 4}
    count = int(Path(f"{run}.changes").read_text())
    assert count > 60
    everyone = os.environ.get("FLEXTOK_CRASHES") == "all"
    moments = range(1, count + 1) if everyone else [count * part // 100 for part in SAMPLE]
    lost = {}
    for moment in moments:
        run.rename(tmp_path / f"run-{moment}")
        die = functools.partial(die_before, moment, run)
        assert finish(start(command, log, die)) == [-9], moment
        assert finish(start(command, log)) == [0], log.read_text()[-3000:]
        found = left(run)
        if different := [key for key in whole if found[key] != whole[key]]:
            lost[moment] = different
    assert not lost
