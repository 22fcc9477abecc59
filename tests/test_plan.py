"""The calculator's figures against formulas and against steps that are really taken."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from helpers.models import AUTOENCODER, DRAWER, TINY, TITOK, VQGAN
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from flextok.bench import FLOPS
from flextok.cli import main
from flextok.config import load_experiment
from flextok.generators import GENERATORS
from flextok.objectives import make_objective
from flextok.registry import TASKS, build_model
from flextok.schema import ConfigError
from flextok.training.plan import GPUS, Assumptions, as_text, measure, plan, starts

GPT = {"name": "gpt", "vocab_size": 500, "num_tokens": 64, "depth": 4, "dim": 128, "num_heads": 4}


def experiment(folder, model, overrides=(), **changes):
    task = next(task for task, models in TASKS.items() if model["name"] in models)
    spec = {
        "task": task,
        "output_dir": str(folder / "run"),
        "tokenizer": str(folder / "none") if task == "generator" else None,
        "model": model,
        "data": {"train": {"name": "emoji"}, "batch_size": 4},
        "trainer": {"max_steps": 1000, "precision": "32-true"},
        **changes,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(spec))
    return load_experiment(path, list(overrides))


def gpt(folder, *overrides):
    model = {**GPT, "conditioner": {"name": "class", "num_classes": 10}}
    return experiment(folder, model, overrides)


def test_arithmetic_of_a_gpt_is_that_of_the_formula(tmp_path):
    """2 operations a weight and token forward, 4 backward; attention 7 products, halved."""
    step = measure(gpt(tmp_path))
    model = build_model(GENERATORS, gpt(tmp_path).model)
    assert step.trained == sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "emb" not in n)
    matrices -= model.positions.numel()
    attention = 7 * 2 * 64 * 64 * 128 * 4 / 2
    # the loss reads 64 positions, the last index is only predicted
    assert step.flops == pytest.approx(6 * matrices * 64 + attention, rel=0.01)
    assert step.block == sum(p.numel() for p in model.blocks[0].parameters())


def test_recomputing_costs_a_forward_pass_and_saves_most_of_the_memory(tmp_path):
    """But for the last product of each block, which the backward pass does not need."""
    plain, recomputed = (
        measure(gpt(tmp_path, f"trainer.checkpoint_blocks={on}")) for on in ("false", "true")
    )
    blocks = build_model(GENERATORS, gpt(tmp_path).model).blocks
    again = sum(p.numel() for p in blocks.parameters() if p.ndim == 2)
    again -= sum(block.mlp.fc2.weight.numel() for block in blocks)
    attention = 2 * 2 * 64 * 64 * 128 * 4 / 2
    assert recomputed.flops - plain.flops == pytest.approx(2 * 64 * again + attention, rel=0.02)
    assert recomputed.saved < 0.6 * plain.saved


def real_step(config, registry, count) -> tuple[float, float]:
    model = build_model(registry, config.model).train()
    objective = make_objective(model, config.objective, starts(model, config.objective)).train()
    objective.prepare()
    draws = torch.Generator().manual_seed(0)
    if config.task != "generator":
        batch = {"image": torch.rand(count, 3, model.image_size, model.image_size, generator=draws)}
    else:
        indices = torch.randint(0, 500, (count, 64), generator=draws)
        batch = {"indices": indices, "label": torch.zeros(count, dtype=torch.long)}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor
        return tensor

    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = objective(batch, draws)["loss"]
        loss.backward()
    return counter.get_total_flops(), sum(t.untyped_storage().nbytes() for t in kept.values())


CLASSES = {"conditioner": {"name": "class", "num_classes": 10}}
SMALL = {
    "gpt": {**GPT, **CLASSES},
    # dropout keeps floats on a CPU, bools elsewhere
    "maskgit": {**GPT, **CLASSES, "name": "maskgit", "dropout": 0.0},
    "flextok": {"name": "flextok", **TINY},
    "three draws": {"name": "flextok", **TINY},
    "drawer": {"name": "flextok", **TINY, "drawer": DRAWER},
    "student": {"name": "flextok", **TINY, "drawer": DRAWER},
    "titok": {"name": "titok", **TITOK},
    "autoencoder": {"name": "autoencoder", **AUTOENCODER},
    "decoder": {"name": "autoencoder", **AUTOENCODER},
    "maskgit_vqgan": {"name": "maskgit_vqgan", **VQGAN},
}


ASKED = {
    "three draws": {"draws_per_image": 3},
    "student": {"name": "drawing_distillation", "num_steps": 1},
    "decoder": {"train": ["post_quant_conv", "decoder"], "latent_noise": 0.2},
}


@pytest.mark.parametrize("kind", SMALL)
def test_the_plan_agrees_with_a_step_really_taken(tmp_path, kind):
    config = experiment(tmp_path, SMALL[kind], objective=ASKED.get(kind, {}))
    registry = TASKS[config.task]
    (flops_1, saved_1), (flops_2, saved_2) = (real_step(config, registry, n) for n in (8, 16))
    step = measure(config)
    model = build_model(registry, config.model)
    assert step.trained + step.frozen == sum(p.numel() for p in model.parameters())
    assert step.flops == pytest.approx((flops_2 - flops_1) / 8, rel=0.1)
    assert step.saved == pytest.approx((saved_2 - saved_1) / 8, rel=0.15)


def test_the_alignment_of_the_prefixes_counts(tmp_path):
    """It was left out: for a small model it is most of the arithmetic."""
    asked = {"prefix_alignment": {"size": 64}}
    config = experiment(tmp_path, SMALL["flextok"], objective=asked)
    (one, _), (two, _) = (real_step(config, TASKS["tokenizer"], n) for n in (8, 16))
    plain = measure(experiment(tmp_path, SMALL["flextok"])).flops
    assert measure(config).flops == pytest.approx((two - one) / 8, rel=0.1)
    assert measure(config).flops > 2 * plain


@pytest.mark.parametrize("recomputes", ["false", "true"])
def test_each_draw_of_an_image_costs_and_keeps_as_much(tmp_path, recomputes):
    """Of a model in pixels, which has no VAE that runs once."""
    asked = [f"trainer.checkpoint_blocks={recomputes}"]
    one, three = (
        measure(experiment(tmp_path, SMALL["flextok"], asked, objective={"draws_per_image": n}))
        for n in (1, 3)
    )
    assert three.flops == pytest.approx(3 * one.flops)
    assert three.saved == pytest.approx(3 * one.saved)


COUNTED = json.loads((Path(__file__).parent / "golden" / "plan.json").read_text())
SLOW = ("d18", "stage2", "bl128", "ll32", "sl256", "vqgan")  # the networks of convolutions


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * any(s in n for s in SLOW)) for n in COUNTED],
)
def test_the_formulas_agree_with_what_was_counted(name):
    """A step of each config, run on the meta device by a program that noted all products and all
    tensors kept. Of distillation it counted the teacher without guidance."""
    found, counted = asdict(measure(load_experiment(f"configs/{name}.yaml"))), COUNTED[name]
    for key in ("trained", "frozen", "beside", "block", "rest"):
        assert found[key] == counted[key]
    if "saved" in counted:  # of some only the products were counted
        assert found["saved"] == pytest.approx(counted["saved"], rel=0.2)
    if "teacher" not in load_experiment(f"configs/{name}.yaml").start:
        assert found["flops"] == pytest.approx(counted["flops"], rel=0.03)


def test_sharding_divides_what_training_holds(tmp_path):
    whole = plan(gpt(tmp_path), 8)
    shared = plan(gpt(tmp_path, "trainer.strategy=fsdp2"), 8)
    for part in ("weights", "gradients", "optimizer", "average"):
        assert shared.memory[part] == whole.memory[part] / 8 > 0
    assert shared.memory["activations"] == whole.memory["activations"]
    assert whole.memory["weights"] == 4 * whole.trained
    no_average = plan(gpt(tmp_path, "optim.ema_decay=0"), 8)
    assert no_average.memory["average"] == 0


def test_more_gpus_take_less_time_for_the_same_samples(tmp_path):
    one, eight = plan(gpt(tmp_path), 1), plan(gpt(tmp_path), 8)
    assert one.batch_size * 8 == eight.batch_size
    assert one.seconds_per_step == pytest.approx(eight.seconds_per_step)
    assert eight.samples_per_second == pytest.approx(8 * one.samples_per_second)
    assert eight.dollars == pytest.approx(8 * one.dollars)
    assert one.traffic == 0
    assert eight.data_per_second == pytest.approx(eight.samples_per_second * (2 * 64 + 8))
    with pytest.raises(ConfigError, match="unknown gpu 'h10'"):
        Assumptions(gpu="h10")
    with pytest.raises(ConfigError, match="gpus=0"):
        plan(gpt(tmp_path), 0)


def test_the_hours_are_those_of_the_batch_that_the_config_means(tmp_path):
    """On one GPU a config of 2 x 8 GPUs was given the hours of a batch of 4, for as many steps."""
    wide = ("trainer.devices=8", "trainer.num_nodes=2", "trainer.accumulate=3")
    whole, one = plan(gpt(tmp_path, *wide), 16), plan(gpt(tmp_path, *wide), 1)
    assert whole.batch_size == one.batch_size == one.config_batch_size == 4 * 8 * 2 * 3
    assert (whole.accumulate, one.accumulate) == (3, 48)
    assert one.hours == pytest.approx(16 * whole.hours)
    assert one.memory["activations"] == whole.memory["activations"]
    assert "assumed" not in as_text(one)
    more = plan(gpt(tmp_path, *wide), 64)  # each GPU still takes its 4, so a step is a larger one
    assert (more.batch_size, more.config_batch_size) == (4 * 64 * 3, 192)
    assert "a batch of 768; the config's own is 192, whose steps take 0.25 times" in as_text(more)
    assert plan(gpt(tmp_path, "trainer.devices='4'"), 2).batch_size == 16
    listed = ("trainer.devices='0,1'", "trainer.num_nodes=2")  # two GPUs of each machine
    assert plan(gpt(tmp_path, *listed), 1).batch_size == 16
    assert plan(gpt(tmp_path, "trainer.devices=auto", "trainer.num_nodes=2"), 3).batch_size == 12
    uneven = plan(gpt(tmp_path, "trainer.devices=8"), 3)
    assert (uneven.batch_size, uneven.config_batch_size) == (4 * 3 * 3, 32)


def test_another_batch_than_the_published_one_is_named():
    config = load_experiment("configs/flextok_d12_d12.yaml", ["data.batch_size=8"])
    text = as_text(plan(config, 1, Assumptions("rtx4090")))
    assert "batch 1,024: 8 a GPU, trainer.accumulate=128" in text
    assert "the published models' is 2,048, whose steps take 2 times as long" in text
    assert "assumed" not in as_text(plan(load_experiment("configs/flextok_d12_d12.yaml"), 1))


def test_cards_of_one_s_own_have_24_gb_and_no_price(tmp_path):
    config = gpt(tmp_path)
    big, small = plan(config, 1), plan(config, 1, Assumptions("rtx3090"))
    assert small.hours == pytest.approx(big.hours * 989 / 71)  # GA102's white paper: 71 TFLOP/s
    assert small.dollars is None
    assert "$" not in as_text(small)
    assert plan(config, 1, Assumptions("rtx3090", price=0.3)).dollars == pytest.approx(
        0.3 * small.hours
    )
    capacities = {name: GPUS[name].memory / 1e9 for name in GPUS}
    assert (capacities["rtx3090"], capacities["rtx4090"], capacities["rtx5090"]) == (24, 24, 32)
    sample = sum(small.memory.values()) - small.memory["activations"]
    fitting = int((0.92 * 24e9 - sample) / (small.memory["activations"] / 4))
    for batch, fits in ((fitting, True), (fitting + 1, False)):
        sized = gpt(tmp_path, f"data.batch_size={batch}")
        assert plan(sized, 1, Assumptions("rtx4090")).fits is fits
        assert plan(sized, 1).fits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "trained", "frozen"),
    [  # in millions, as the papers and tests/test_golden.py have them
        ("flextok_d12_d12_paper", 265.3, 83.8 + 304.8),  # the VAE, the teacher of the alignment
        ("ar_text_3.06B", 3362.3, 0),  # with embedding and head
        ("titok_l32_stage1", 610.3, 54.5),
        ("titok_l32_stage2", 339.5, 353.7),  # with the discriminator
    ],
)
def test_published_sizes_fit_the_gpus_that_their_configs_name(name, trained, frozen):
    config = load_experiment(f"configs/{name}.yaml")
    found = plan(config, int(config.trainer.devices) * config.trainer.num_nodes)
    assert found.fits
    assert found.trained / 1e6 == pytest.approx(trained, abs=0.05)
    assert found.frozen / 1e6 == pytest.approx(frozen, abs=0.05)


def test_the_command_prints_the_plan(capsys):
    config = "configs/quickstart_tokenizer.yaml"
    assert main(["plan", config, "--gpus", "128", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["batch_size"] == 128 * load_experiment(config).data.batch_size
    assert main(["plan", config, "data.batch_size=10000000", "--gpus", "1", "--gpu", "a100"]) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["data.batch_size=3", "--gpus", "2"],
        ["--gpus", "2", "data.batch_size=3"],
        ["--gpus", "2", "data.batch_size=3", "--gpu", "a100", "trainer.accumulate=1"],
    ],
)
def test_changes_of_the_config_stand_before_and_after_the_options(capsys, arguments):
    assert main(["plan", "configs/quickstart_tokenizer.yaml", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["batch_size"] == 6
    options = ["--gpus", "1", "data.batch_size=3"]
    assert main(["plan", *options[:2], "configs/quickstart_tokenizer.yaml", options[2]]) == 0
    with pytest.raises(SystemExit):
        main(["plan", "configs/quickstart_tokenizer.yaml", *options, "--gpux", "2"])


@pytest.mark.parametrize(
    "wrong",
    [{"price": -1.0}, {"price": math.nan}, {"picture_kb": -2.0}, {"picture_kb": math.inf}],
)
def test_assumptions_that_no_run_can_have_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}=.* must be a number from 0"):
        Assumptions(**wrong)
