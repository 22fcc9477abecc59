"""Validation over two processes ends, and averages exactly, however unequal their shares are."""

import csv

import pytest
import torch
import yaml
from helpers.files import draw_pictures
from helpers.models import DRAWER, TINY, TITOK, VQGAN, randomize
from helpers.processes import finish, start_ranks
from helpers.runs import SIX_STEPS

from flextok.config import load_experiment
from flextok.data.datamodule import DataModule, Shares, collate_shares
from flextok.data.datasets import ImageFolder
from flextok.data.stream import EvaluationSet
from flextok.data.transforms import ImageTransform
from flextok.draws import VALIDATION, derived_generator
from flextok.objectives import make_objective
from flextok.pipeline import load
from flextok.registry import build_model
from flextok.tokenizers import TOKENIZERS
from flextok.training.run import train

PICTURES = [f"{i}.png" for i in range(9)]
DAMAGED = {"9 pictures": [], "a damaged batch": [1, 3, 5, 7], "all but one damaged": range(1, 9)}


def pictures(folder, count=9, damaged=()):
    draw_pictures(folder, PICTURES[:count])
    for i in damaged:
        (folder / PICTURES[i]).write_bytes(b"no picture")
    return folder


def spec_of(folder, kind):
    titok = {"name": "titok", **TITOK, "stage": "single"}
    spec = {
        "task": "tokenizer",
        "output_dir": str(folder / "run"),
        "model": titok if kind != "flextok" else {"name": "flextok", **TINY},
        "data": {
            "train": {"name": "folder", "root": str(pictures(folder / "train"))},
            "validation": {"name": "folder", "root": str(folder / "validation")},
            "batch_size": 4,
        },
        "optim": {"lr": 1e-3, "warmup_steps": 2, "ema_decay": 0},
        "trainer": {**SIX_STEPS, "max_steps": 2, "validate_every": 1, "num_pictures": 1},
    }
    if kind == "adversarial":
        spec["objective"] = {
            **{"name": "adversarial", "start_step": 0, "dim": 32, "num_stages": 1},
            "lecam_decay": 0.5,
        }
    return spec


def run_on_two(folder, spec, strategy):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(spec))
    command = ["train", path, f"trainer.strategy={strategy}", "trainer.devices=2"]
    codes = finish(*start_ranks(2, command, folder / "log"), timeout=90)
    assert codes == [0, 0], "\n".join(p.read_text()[-3000:] for p in folder.glob("log*"))
    return folder / "run"


def validation_losses(run):
    (log,) = run.glob("logs/csv/version_0/metrics.csv")
    rows = [row for row in csv.DictReader(log.open()) if row.get("val/loss")]
    assert [float(row["step"]) for row in rows] == [1, 2]
    return [float(row["val/loss"]) for row in rows]


def readable(folder):
    samples = EvaluationSet(ImageFolder(folder), ImageTransform(16).prepare)
    return [item["image"] for i in range(len(samples)) if (item := samples[i])]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["titok", "adversarial"])
@pytest.mark.parametrize("case", [7, 8, *DAMAGED])
def test_any_number_of_pictures_and_damaged_ones_ends_with_the_exact_average(tmp_path, kind, case):
    pictures(tmp_path / "validation", case if isinstance(case, int) else 9, DAMAGED.get(case, ()))
    strategy = "ddp" if kind == "adversarial" else "fsdp2"
    run = run_on_two(tmp_path, spec_of(tmp_path, kind), strategy)
    model = load(run)
    images = readable(tmp_path / "validation")
    assert len(images) == {7: 7, 8: 8, "9 pictures": 9}.get(case, 9 - len(DAMAGED.get(case, ())))
    with torch.no_grad():
        objective = make_objective(model).eval()
        expected = [float(objective({"image": image[None]})["loss"]) for image in images]
    assert validation_losses(run)[-1] == pytest.approx(sum(expected) / len(expected), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("task", ["tokenizer", "generator"])
def test_a_tokenizer_and_its_generator_end_too(tmp_path, task, strategy):
    pictures(tmp_path / "validation", damaged=DAMAGED["a damaged batch"])
    spec = spec_of(tmp_path, "flextok")
    if task == "generator":
        path = tmp_path / "tokenizer.yaml"
        path.write_text(yaml.safe_dump(spec))
        train(load_experiment(path, [f"output_dir={tmp_path / 'tokenizer'}"]))
        spec |= {"task": "generator", "tokenizer": str(tmp_path / "tokenizer")}
        spec["model"] = {"name": "gpt", "depth": 2, "dim": 32}
    assert all(loss > 0 for loss in validation_losses(run_on_two(tmp_path, spec, strategy)))


@pytest.mark.slow
def test_lecam_moves_once_a_step_by_the_logits_of_all_processes_and_micro_batches(tmp_path):
    """One process with two micro-batches ends where two processes end."""
    pictures(tmp_path / "validation")
    spec = spec_of(tmp_path, "adversarial")
    two = run_on_two(tmp_path, spec, "ddp")
    one = train(
        load_experiment(
            tmp_path / "config.yaml", [f"output_dir={tmp_path / 'one'}", "trainer.accumulate=2"]
        )
    )
    states = [
        torch.load(folder / "checkpoints" / "last.ckpt")["state_dict"] for folder in (one, two)
    ]
    for name in ("real", "fake"):
        a, b = (float(state[f"objective.lecam.{name}"]) for state in states)
        assert a != 0
        assert a == pytest.approx(b, rel=1e-4)
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], atol=1e-5, rtol=1e-3, msg=key)


ORDERED = {
    "titok": {"name": "titok", **TITOK, "ordered": True},
    "flextok": {"name": "flextok", **TINY, "drop_mode": "truncate"},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["titok", "flextok"])
def test_sharded_processes_with_unequally_many_lengths_end_with_the_exact_average(tmp_path, kind):
    """Four pictures of four lengths and three of three: each length ran the model once more."""
    pictures(tmp_path / "validation", 7)
    spec = spec_of(tmp_path, kind) | {"model": ORDERED[kind]}
    spec["objective"] = {"nested_dropout": "uniform", "batch_lengths": 4}
    run = run_on_two(tmp_path, spec, "fsdp2")
    objective = make_objective(load(run), spec["objective"]).eval()
    images = readable(tmp_path / "validation")
    total, seed = 0.0, load_experiment(tmp_path / "config.yaml").seed
    for rank, share in enumerate((images[::2], images[1::2])):
        batch = {"image": torch.stack(share), "row": range(rank, 7, 2)}
        with torch.no_grad():
            losses = objective(batch, derived_generator(seed, VALIDATION))
        total += len(share) * float(losses["loss"])
    assert validation_losses(run)[-1] == pytest.approx(total / 7, rel=1e-4)


VQ = {"name": "vq", "codebook_size": 32, "dim": 4}


@pytest.mark.parametrize(
    ("model", "spec"),
    [
        (ORDERED["flextok"], {}),
        ({**ORDERED["flextok"], "quantizer": VQ}, {"prefix_alignment": {"size": 32}}),
        (ORDERED["flextok"], {"name": "cross_length"}),
        (ORDERED["flextok"], {"name": "distillation"}),
        ({**ORDERED["flextok"], "drawer": DRAWER}, {"name": "drawing"}),
        (ORDERED["titok"], {}),
        ({**ORDERED["titok"], "stage": "proxy", "proxy": VQGAN}, {}),
    ],
    ids=["flow", "vq", "cross_length", "distillation", "drawing", "titok", "proxy"],
)
def test_validation_runs_once_what_training_runs_for_each_length(model, spec):
    """With the same losses."""
    tokenizer = randomize(build_model(TOKENIZERS, model))
    if tokenizer.model_type == "titok" and tokenizer.config.stage == "proxy":
        tokenizer.attach_proxy(build_model(TOKENIZERS, {"name": "maskgit_vqgan", **VQGAN}))
    start = {"distillation": "teacher", "drawing": "weights"}.get(spec.get("name"))
    trained = {start: randomize(build_model(TOKENIZERS, model), 1)} if start else None
    spec = {**spec, "nested_dropout": "uniform", "batch_lengths": 5}
    objective = make_objective(tokenizer, spec, trained)
    objective.prepare(pretrained=False)
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    calls = []
    for part in (tokenizer.encoder, tokenizer.decoder):
        part.register_forward_hook(lambda part, *_: calls.append(part))
    found = []
    objective.eval()
    for apart in (False, True):
        objective.training = apart  # and not its networks
        with torch.no_grad():
            found.append(objective({"image": images}, torch.Generator().manual_seed(2)))
        if not apart:
            once = len(calls)
    assert len(calls) - once > once
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], atol=1e-6, rtol=1e-5, msg=name)


class Rank:
    """What a data module asks of a trainer."""

    def __init__(self, rank, world_size):
        self.global_rank, self.world_size = rank, world_size


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 5, 8, 9])
def test_every_process_gets_as_many_batches_and_every_picture_counts_once(
    tmp_path, count, world_size
):
    dataset = ImageFolder(pictures(tmp_path, count))
    batches = []
    for rank in range(world_size):
        data = DataModule(dataset, dataset, ImageTransform(16).prepare, batch_size=2)
        data.trainer = Rank(rank, world_size)
        batches.append(list(data.val_dataloader()))
    assert len({len(share) for share in batches}) == 1
    every = [batch for share in batches for batch in share]
    assert sum(batch["count"] for batch in every) == count
    assert all(len(batch["image"]) == max(1, batch["count"]) for batch in every)
    counted = torch.cat([b["image"] for b in every if b["count"]])
    assert len({tuple(image.flatten().tolist()) for image in counted}) == count


def test_a_set_without_a_readable_picture_is_refused(tmp_path):
    samples = EvaluationSet(
        ImageFolder(pictures(tmp_path, 3, damaged=range(3))), ImageTransform(16).prepare
    )
    with pytest.raises(ValueError, match="none of the 3 validation samples can be read"):
        collate_shares([Shares(samples)[0]])
