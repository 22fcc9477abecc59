"""Images that are not finite reach the guard, which skips the step and counts it; the progress bar
of a continued run."""

import csv

import pytest
import torch
import yaml
from helpers.files import draw_pictures
from helpers.models import TINY, TITOK, VQGAN
from helpers.runs import SIX_STEPS

from flextok.config import load_experiment
from flextok.data.transforms import ImageTransform
from flextok.pipeline import load
from flextok.quantizers.vq import VQ, count_codes
from flextok.training.callbacks import CodebookUsage, Progress
from flextok.training.run import train

MODELS = {
    "flextok": {"model": {"name": "flextok", **TINY}},
    "titok": {"model": {"name": "titok", **TITOK, "stage": "single"}},
    "vqgan": {"model": {"name": "maskgit_vqgan", **VQGAN}},
}
MODELS["titok"]["objective"] = {"name": "adversarial", "start_step": 0, "dim": 32, "num_stages": 1}


def config(folder, **parts):
    draw_pictures(folder / "pictures", [f"{i}.png" for i in range(4)])
    data = {"name": "folder", "root": str(folder / "pictures")}
    spec = {
        "task": "tokenizer",
        "output_dir": str(folder / "run"),
        "data": {"train": data, "batch_size": 4},
        "optim": {"lr": 1e-3, "warmup_steps": 2},
        "trainer": {**SIX_STEPS, "max_steps": 3, "num_pictures": 1},
        **parts,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_images_that_are_not_finite_is_skipped_and_counted(tmp_path, monkeypatch, name):
    path = config(tmp_path, **MODELS[name])
    plain, calls = ImageTransform.__call__, iter(range(10_000))

    def transform(self, *args):
        return plain(self, *args) * (torch.nan if next(calls) in range(4, 8) else 1)

    monkeypatch.setattr(ImageTransform, "__call__", transform)
    folder = train(load_experiment(path))
    (log,) = folder.glob("logs/csv/version_0/metrics.csv")
    skipped = [row["train/skipped_steps"] for row in csv.DictReader(log.open())]
    assert [float(n) for n in skipped if n] == [0, 1, 1]
    state = torch.load(folder / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(value.isfinite().all() for value in state.values())
    assert all(value.isfinite().all() for value in load(folder).state_dict().values())


def test_codes_of_what_is_not_finite_are_neither_counted_nor_revived():
    assert count_codes(torch.tensor([[0, 2, -1], [2, -1, 1]]), 4).tolist() == [1, 1, 2, 0]
    quantizer = VQ(8, 3)
    z = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(0))
    z[0, 2] = torch.nan
    assert quantizer.revive(z, torch.zeros(8, dtype=torch.long)) == 8
    assert quantizer.codebook.isfinite().all()
    assert quantizer.revive(z * torch.nan, torch.zeros(8, dtype=torch.long)) == 0


def test_the_bar_of_a_continued_run_has_the_total_and_begins_where_it_continues(
    tmp_path, monkeypatch
):
    bars = []
    end = Progress.on_train_end

    def on_train_end(self, *arguments):
        bar = self.train_progress_bar
        bars.append((bar.initial, bar.n, bar.total))
        end(self, *arguments)

    monkeypatch.setattr(Progress, "on_train_end", on_train_end)
    path = config(tmp_path, **MODELS["flextok"])
    train(load_experiment(path, ["trainer.max_steps=4", "trainer.checkpoint_every=2"]))
    train(load_experiment(path, ["trainer.max_steps=6"]))
    assert bars == [(0, 4, 4), (4, 6, 6)]


def test_a_checkpoint_holds_the_counts_of_all_processes(monkeypatch):
    """The first process's were loaded by all, and codes that the others alone had chosen were moved
    as dead ones."""
    counts = [torch.tensor([3, 0, 1]), torch.tensor([0, 2, 1])]
    usages = [CodebookUsage(VQ(3, 2), every=10) for _ in counts]
    distributed = "flextok.training.callbacks.distributed"
    monkeypatch.setattr(f"{distributed}.is_initialized", lambda: True)
    monkeypatch.setattr(f"{distributed}.all_reduce", lambda some: some.copy_(sum(counts)))
    for usage, own in zip(usages, counts, strict=True):
        usage.counts = own.clone()
    saved = usages[0].state_dict()
    assert saved["counts"].tolist() == [3, 2, 2]
    assert torch.equal(usages[0].counts, counts[0])
    for rank, usage in enumerate(usages):
        monkeypatch.setattr(f"{distributed}.get_rank", lambda rank=rank: rank)
        usage.load_state_dict(saved)
    assert sum(usage.counts for usage in usages).tolist() == [3, 2, 2]
