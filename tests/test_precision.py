"""The precision and the number of processes follow the device that trains."""

import csv
import os

import lightning as L
import pytest
import torch
import yaml
from helpers.files import draw_pictures
from helpers.models import DRAWER, TINY, TITOK, tiny_gpt, tiny_tokenizer
from helpers.runs import SIX_STEPS
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.optim.optimizer import register_optimizer_step_post_hook

from flextok.config import TrainerConfig, load_experiment
from flextok.generators import MaskGIT, MaskGITConfig
from flextok.nn.attention import SHORT, attend
from flextok.nn.blocks import transformer_blocks
from flextok.objectives import make_objective
from flextok.schema import ConfigError
from flextok.tokenizers import TiTok, TiTokConfig
from flextok.training.run import train
from flextok.training.sharding import gather, shard
from flextok.training.trainer import check_devices, choose_precision


@pytest.fixture
def gpu(monkeypatch):
    """gpu(bf16) lets torch report a GPU that multiplies bf16, or one that emulates it."""

    def report(bf16: bool) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr(
            "torch.cuda.is_bf16_supported",
            lambda including_emulation=True: bf16 or including_emulation,
        )

    return report


@pytest.fixture
def processor(monkeypatch):
    """processor(instructions) lets torch report a CPU with or without those for bf16."""

    def report(avx512_bf16: bool = False, amx_tile: bool = False) -> None:
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx512_bf16)
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx_tile)

    return report


def precision(accelerator: str, asked: str = "auto") -> str:
    return choose_precision(TrainerConfig(1, accelerator, precision=asked))


def test_a_cpu_trains_in_bf16_where_it_has_instructions_for_it(processor):
    processor()
    assert precision("auto") == precision("cpu") == "32-true"
    processor(avx512_bf16=True)
    assert precision("auto") == precision("cpu") == "bf16-mixed"
    assert precision("cpu", "32-true") == "32-true"
    processor(amx_tile=True)
    assert precision("cpu") == "bf16-mixed"


def test_precision_follows_the_device_that_trains_not_the_machine(gpu, processor):
    processor()
    assert precision("auto") == precision("cpu") == "32-true"
    gpu(bf16=True)
    assert precision("auto") == precision("gpu") == precision("cuda") == "bf16-mixed"
    assert precision("cpu") == "32-true"
    assert precision("cpu", "bf16-mixed") == "bf16-mixed"
    assert precision("gpu", "32-true") == "32-true"


def test_a_gpu_that_only_emulates_bf16_trains_in_fp32(gpu, processor):
    processor(avx512_bf16=True)  # the CPU's say nothing of the GPU
    gpu(bf16=False)
    assert precision("auto") == "32-true"


def test_more_processes_than_cores_are_refused(monkeypatch):
    cores = os.cpu_count()
    check_devices(TrainerConfig(1, "cpu", devices=cores))
    for devices in (cores + 1, str(cores + 1), 99_999):
        with pytest.raises(ConfigError, match=rf"trainer.devices={devices} .*at most {cores}"):
            check_devices(TrainerConfig(1, "cpu", devices=devices))
    # torchrun's processes are already there
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(cores + 1))
    check_devices(TrainerConfig(1, "cpu", devices=cores + 1))


def test_what_was_launched_and_is_not_what_the_config_states_is_refused(monkeypatch, gpu):
    """Before the caches are filled: Lightning finds it when the training itself begins."""
    variables = {"RANK": 0, "WORLD_SIZE": 8, "LOCAL_RANK": 0, "GROUP_RANK": 0}
    for name, value in {**variables, "TORCHELASTIC_RUN_ID": "one"}.items():
        monkeypatch.setenv(name, str(value))
    gpu(bf16=True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    check_devices(TrainerConfig(1, "gpu", devices=8))
    for devices in ("auto", "0,1,2,5"):
        check_devices(TrainerConfig(1, "gpu", devices=devices, num_nodes=2))
    for devices, nodes in ((8, 16), ("auto", 1), ("0,1", 1), (4, 1)):
        with pytest.raises(ConfigError, match=rf"trainer.num_nodes={nodes} .*world size \(8\)"):
            check_devices(TrainerConfig(1, "gpu", devices=devices, num_nodes=nodes))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    slurm = {"NTASKS": 8, "JOB_NAME": "mine", "NTASKS_PER_NODE": 4, "NNODES": 2}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    check_devices(TrainerConfig(1, "gpu", devices=4, num_nodes=2))
    with pytest.raises(ConfigError, match=r"trainer.num_nodes=1 .*Set `num_nodes=2`"):
        check_devices(TrainerConfig(1, "gpu", devices=4))


def test_what_the_device_cannot_do_is_refused(gpu):
    with pytest.raises(ConfigError, match="16-mixed does not work on a CPU"):
        check_devices(TrainerConfig(1, "cpu", precision="16-mixed"))
    gpu(bf16=True)
    check_devices(TrainerConfig(1, "gpu", devices=8, precision="16-mixed"))
    with pytest.raises(ConfigError, match=r"does not work with trainer\.strategy=fsdp2"):
        check_devices(TrainerConfig(1, "gpu", strategy="fsdp2", precision="16-mixed"))


@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "mps"])
def test_an_accelerator_that_is_not_there_is_refused(accelerator, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(ConfigError, match=f"trainer.accelerator={accelerator}: there is none"):
        check_devices(TrainerConfig(1, accelerator))


@pytest.fixture
def gradients():
    """The norms of the gradients that each optimizer step gets: of the tokenizer's parameters and
    of the discriminator's, told apart by their group's learning rate."""
    norms = []

    def note(optimizer, args, kwargs):
        parts = {}
        for group in optimizer.param_groups:
            found = [p.grad for p in group["params"] if p.grad is not None]
            parts.setdefault(group["initial_lr"], []).extend(found)
        norms.append([float(torch.nn.utils.get_total_norm(found)) for found in parts.values()])

    handle = register_optimizer_step_post_hook(note)
    yield norms
    handle.remove()


def in_fp16(monkeypatch):
    """Train in fp16 with a scaler on the CPU, which Lightning by itself does not offer."""

    class Trainer(L.Trainer):
        def __init__(self, **options):
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            plugin = MixedPrecision("16-mixed", "cpu", scaler)
            super().__init__(**{**options, "precision": None, "plugins": [plugin]})

    monkeypatch.setattr("flextok.training.trainer.L.Trainer", Trainer)


@pytest.mark.parametrize("adversarial", [False, True])
def test_fp16_gradients_are_unscaled_before_they_are_measured_and_clipped(
    tmp_path, monkeypatch, gradients, adversarial
):
    """A scale of 1,024 that was still in them would show in the logs and defeat the clipping."""
    draw_pictures(tmp_path / "pictures", [f"{i}.png" for i in range(4)])
    spec = {
        "task": "tokenizer",
        "output_dir": str(tmp_path / "run"),
        "model": {"name": "flextok", **TINY},
        "data": {"train": {"name": "folder", "root": str(tmp_path / "pictures")}, "batch_size": 4},
        "optim": {"warmup_steps": 0, "grad_clip": 1e6, "ema_decay": 0},
        "trainer": {**SIX_STEPS, "max_steps": 2},
    }
    if adversarial:
        spec["model"] = {"name": "titok", **TITOK, "stage": "single"}
        spec["objective"] = {
            "name": "adversarial",
            "start_step": 0,
            "dim": 32,
            "num_stages": 1,
            "lr": 3e-4,
        }
    path = tmp_path / "config.yaml"

    def run(name, clip):
        gradients.clear()
        spec["optim"]["grad_clip"] = clip
        spec["output_dir"] = str(tmp_path / name)
        path.write_text(yaml.safe_dump(spec))
        train(load_experiment(path))
        (log,) = (tmp_path / name).glob("logs/csv/version_0/metrics.csv")
        rows = [row for row in csv.DictReader(log.open()) if row.get("train/grad_norm")]
        assert [float(row["train/skipped_steps"]) for row in rows] == [0, 0]
        return [list(step) for step in gradients], [float(row["train/grad_norm"]) for row in rows]

    expected, logged = run("fp32", 1e6)
    assert len(expected) == 2
    with monkeypatch.context() as patch:
        in_fp16(patch)
        found, logged_fp16 = run("fp16", 1e6)
        clipped, _ = run("clipped", 1e-3)
    assert logged_fp16 == pytest.approx(logged, rel=0.05)
    assert len(found[0]) == 1 + adversarial
    for ours, theirs, small in zip(found, expected, clipped, strict=True):
        assert ours == pytest.approx(theirs, rel=0.05)
        assert min(theirs) > 2e-3
        assert small == pytest.approx([1e-3] * len(small), rel=1e-2)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_optimizer_may_be_clipped_in_mixed_precision(tmp_path, name, gradients):
    draw_pictures(tmp_path / "pictures", [f"{i}.png" for i in range(4)])
    spec = {
        "task": "tokenizer",
        "output_dir": str(tmp_path / "run"),
        "model": {"name": "flextok", **TINY},
        "data": {"train": {"name": "folder", "root": str(tmp_path / "pictures")}, "batch_size": 4},
        "optim": {"name": name, "grad_clip": 1e-3},
        "trainer": {**SIX_STEPS, "max_steps": 2, "precision": "bf16-mixed"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(spec))
    train(load_experiment(path))
    assert gradients[-1][0] == pytest.approx(1e-3, rel=1e-2)


def tiny_maskgit(backbone: str) -> MaskGIT:
    sizes = {"vocab_size": 200, "num_tokens": 8, "depth": 3, "dim": 32, "num_heads": 2}
    return MaskGIT(MaskGITConfig(**sizes, backbone=backbone, conditioner={"name": "none"}))


@pytest.mark.parametrize("shared", [False, True], ids=["", "sharded"])
@pytest.mark.parametrize(
    ("make", "spec"),
    [
        (lambda: tiny_tokenizer(drop_mode="mask"), {}),
        (lambda: tiny_tokenizer(drop_mode="truncate"), {"name": "cross_length"}),
        (lambda: tiny_tokenizer(drawer=DRAWER), {"name": "drawing"}),
        (lambda: TiTok(TiTokConfig(**TITOK)), {}),
        (tiny_gpt, {}),
        (lambda: tiny_maskgit("bert"), {}),
        (lambda: tiny_maskgit("uvit"), {}),
    ],
    ids=["mask", "truncate", "drawer", "titok", "gpt", "bert", "uvit"],
)
def test_the_residual_stream_is_float32_in_mixed_precision(alone, make, spec, shared):
    """Half of it would round away what blocks add while their gates are near zero: of twelve
    blocks with gates of 0.001, 87 percent. Sharded, the losses and gradients are those without."""
    torch.manual_seed(0)
    model = make().train()
    found = {}

    def note(block, inputs, output):
        found[block] = (output if isinstance(output, torch.Tensor) else output[0]).dtype

    for block in transformer_blocks(model):
        block.register_forward_hook(note)
    batch = {"indices": torch.zeros(4, 8, dtype=torch.long), "label": torch.arange(4)}
    if hasattr(model, "image_size"):
        batch = {"image": torch.rand(4, 3, model.image_size, model.image_size) * 2 - 1}
    start = {"weights": make()} if spec.get("name") == "drawing" else None
    objective = make_objective(model, spec or None, start)
    results = []
    for _ in range(1 + shared):
        found.clear()
        objective.zero_grad()
        torch.manual_seed(0)  # of dropout
        with torch.autocast("cpu", torch.bfloat16):
            losses = objective(batch, torch.Generator().manual_seed(0))
        assert set(found.values()) == {torch.float32}
        assert len(found) > 1
        losses["loss"].backward()
        gradients = {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}
        results.append(({n: x.detach() for n, x in losses.items()}, gather(gradients, keep=True)))
        if shared and len(results) == 1:
            shard(objective, alone, bf16=True)
    for name, loss in results[0][0].items():
        torch.testing.assert_close(results[-1][0][name], loss, rtol=2e-3, atol=1e-4, msg=name)
    assert results[0][1].keys() == results[-1][1].keys()
    for name, gradient in results[0][1].items():
        assert results[-1][1][name].dtype is torch.float32
        error = (results[-1][1][name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < 0.05, (name, error)
    assert {p.dtype for p in objective.parameters()} == {torch.float32}  # what is exported


@pytest.mark.parametrize("mask", ["none", "bool", "additive", "causal"])
def test_attention_to_few_positions_is_trained_in_fp32_on_a_cpu(mask):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 8).bfloat16().requires_grad_() for _ in "qkv")
    seen = torch.rand(7, 7) < 0.7
    seen.fill_diagonal_(True)
    masks = {"bool": seen, "additive": torch.randn(7, 7).bfloat16()}
    options = {"mask": masks.get(mask), "is_causal": mask == "causal", "scale": 0.5}
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(q, k, v, **options)
        without = attend(q.detach(), k.detach(), v.detach(), **options)
    if mask == "additive":
        options["mask"] = masks[mask].float()
    wanted = attend(q.float(), k.float(), v.float(), **options)
    assert found.equal(wanted.bfloat16())
    assert not without.equal(found)  # without gradients bf16 is as fast
    torch.testing.assert_close(without, found, rtol=0.03, atol=0.03)
    ours, theirs = (torch.autograd.grad(y.float().sum(), (q, k, v)) for y in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=0.03, atol=0.03)


def test_attention_to_many_positions_stays_in_bf16():
    q, k, v = (torch.randn(1, 1, SHORT + 1, 8).bfloat16().requires_grad_() for _ in "qkv")
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert attend(q, k, v).equal(plain)
