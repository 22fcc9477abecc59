"""The whole package on fake CUDA tensors, on a machine without a GPU: nothing mixes devices, and
nothing makes the CPU wait for the GPU in a training step, a solver's loop or a token loop."""

import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from fake_gpu import DEVICE, FakeGPU, autocast
from helpers.models import TINY, TITOK, VQGAN

from flextok.generators import GENERATORS
from flextok.objectives import make_objective
from flextok.pipeline import grow_images, reconstruct_prefixes
from flextok.quantizers import VQ
from flextok.registry import build_model
from flextok.tokenizers import TOKENIZERS
from flextok.training.callbacks import CodebookUsage

KL_VAE = {"name": "kl", "channels": 4, "block_channels": [32, 32]}
TOKENIZER_SPECS = {
    "mask": {"name": "flextok", **TINY},
    "truncate": {"name": "flextok", **TINY, "drop_mode": "truncate"},
    "cross-length": {"name": "flextok", **TINY},
    "x0": {"name": "flextok", **TINY, "prediction": "x0"},
    "vae": {"name": "flextok", **TINY, "image_size": 32, "vae": KL_VAE},
    "posterior": {
        **{"name": "flextok", **TINY, "image_size": 32},
        "vae": {**KL_VAE, "sample_posterior": True},
    },
    "grid": {"name": "flextok", **TINY, "token_grid": [2, 4], "ordered": False},
    "titok": {"name": "titok", **TITOK},
    "one-d-piece": {"name": "titok", **TITOK, "ordered": True},
    "titok-kl": {"name": "titok", **TITOK, "quantizer": {"name": "kl", "dim": 4}},
    "vqgan": {"name": "maskgit_vqgan", **VQGAN},
}
SMALL = {"vocab_size": 40, "num_tokens": 6, "depth": 2, "dim": 32, "num_heads": 2}
ENCODER = {"dim": 16, "depth": 1, "num_heads": 2}
GENERATOR_SPECS = {
    "gpt": {"name": "gpt", **SMALL},
    "gpt-bytes": {"name": "gpt", **SMALL, "conditioner": {"name": "text", "encoder": "bytes"}},
    "gpt-words": {
        **{"name": "gpt", **SMALL},
        "conditioner": {"name": "text", "encoder": {"name": "words", **ENCODER}},
    },
    "gpt-free": {"name": "gpt", **SMALL, "conditioner": {"name": "none"}},
    "bert": {"name": "maskgit", **SMALL},
    "uvit": {"name": "maskgit", **SMALL, "backbone": "uvit", "depth": 3},
}
OBJECTIVES = {  # where not the model's own with its defaults
    "cross-length": {"name": "cross_length", "weight": 0.5},
    "x0": {"loss_space": "x0"},
    "vqgan": {"name": "adversarial", "start_step": 0, "dim": 32, "num_stages": 1},
    "gpt": {"context_noise": 0.2},
}
BATCH = 4


@pytest.fixture
def gpu():
    with FakeGPU() as gpu:
        yield gpu


def build(spec):
    with DEVICE:
        return build_model({**TOKENIZERS, **GENERATORS}, spec)


def draws():
    return torch.Generator().manual_seed(0)


def on_gpu(*tensors):
    assert all(x.device == DEVICE for x in tensors)
    return tensors[0]


def ready(model):
    """Training's checks of who has weights are not what is tested here."""
    for module in model.modules():
        if hasattr(module, "has_weights"):
            module.has_weights = True
    return model


def conditions(model, where):
    if hasattr(model.conditioner, "encoder"):
        return model.conditioner.prepare(["a red heart", "", "fish", "a"], torch.device(where))
    return torch.zeros(BATCH, dtype=torch.long, device=where)


BF16, FP32 = torch.bfloat16, None


@pytest.mark.parametrize(("name", "dtype"), [*((n, BF16) for n in TOKENIZER_SPECS), ("mask", FP32)])
def test_a_tokenizer_trains_without_waiting(gpu, name, dtype):
    model = ready(build(TOKENIZER_SPECS[name]))
    with DEVICE:
        objective = make_objective(model, OBJECTIVES.get(name)).train()
    images = torch.zeros(BATCH, 3, model.image_size, model.image_size, device=DEVICE)
    with autocast(dtype) if dtype else nullcontext():
        objective({"image": images}, draws())  # constants reach the device once
        del gpu.waits[:]
        losses = objective({"image": images, "row": range(4, 8)}, draws())
    assert gpu.waits == []
    assert on_gpu(*losses.values()).dtype == torch.float32


@pytest.mark.parametrize(("name", "dtype"), [*((n, BF16) for n in GENERATOR_SPECS), ("gpt", FP32)])
def test_a_generator_trains_without_waiting(gpu, name, dtype):
    model = build(GENERATOR_SPECS[name])
    objective = make_objective(model, OBJECTIVES.get(name)).train()
    indices = torch.zeros(BATCH, model.num_tokens, dtype=torch.long, device=DEVICE)
    cond = conditions(model, DEVICE)
    with autocast(dtype) if dtype else nullcontext():
        objective({"indices": indices, "label": cond}, draws())
        del gpu.waits[:]
        losses = objective({"indices": indices, "label": cond}, draws())
    assert gpu.waits == []
    assert on_gpu(*losses.values()).dtype == torch.float32


@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("name", TOKENIZER_SPECS)
def test_encode_and_decode_take_inputs_from_anywhere(gpu, name, where):
    model = build(TOKENIZER_SPECS[name]).eval()
    images = torch.zeros(BATCH, 3, model.image_size, model.image_size, device=where)

    indices = torch.zeros(BATCH, model.num_tokens, dtype=torch.long, device=where)
    codes = torch.zeros(BATCH, model.num_tokens, model.quantizer.dim, device=where)

    def around():
        if not model.vocab_size:
            return on_gpu(model.decode_codes(codes), model.encode_codes(images))
        options = {"num_steps": 1} if model.model_type == "flextok" else {}
        made = model.decode(indices, generator=draws(), **options)
        return on_gpu(made, model.encode(images))

    around()
    del gpu.waits[:]
    assert around().shape == images.shape
    # each way reads whether its result is finite, and the range of what is on the GPU already
    assert len(gpu.waits) <= (4 if where == "cuda" else 2), gpu.waits
    assert all(re.search(r"(devices|base)\.py:", wait) for wait in gpu.waits), gpu.waits


WAYS = [
    ("euler", "apg", 3.0, None),
    ("euler", "cfg", 1.0, None),
    ("heun", "apg", 3.0, (0.3, 0.8)),
    ("heun", "cfg", 3.0, None),
    ("ab2", "apg", 3.0, None),
    ("ab2", "cfg", 3.0, (0.3, 0.8)),
]


@pytest.mark.parametrize(("solver", "guidance", "scale", "interval"), WAYS)
def test_no_solver_waits_in_its_loop(gpu, solver, guidance, scale, interval):
    model = build(TOKENIZER_SPECS["truncate"]).eval()
    at_step = []
    options = {
        **{"num_steps": 2, "solver": solver, "guidance": guidance, "guidance_scale": scale},
        **{"guidance_interval": interval, "generator": draws(), "keep": torch.tensor([1, 2, 3, 4])},
    }
    indices = torch.zeros(BATCH, model.num_tokens, dtype=torch.long)
    model.decode(indices, **options)
    del gpu.waits[:]
    model.decode(indices, **options, callback=lambda n, _: at_step.append(len(gpu.waits)))
    assert len(at_step) >= 2
    assert at_step[0] == at_step[-1] == 0, gpu.waits
    assert len(gpu.waits) <= 1  # at the end, whether all pixels were finite
    before = len(gpu.waits)
    keep = torch.ones(BATCH, dtype=torch.long, device=DEVICE)  # lengths on the GPU are read, once
    model.decode(indices, **{**options, "keep": keep})
    assert len(gpu.waits) == 2 * before + 1, gpu.waits


def test_a_guidance_scale_may_depend_on_the_time(gpu):
    model, at_step = build(TOKENIZER_SPECS["mask"]).eval(), []
    indices = torch.zeros(BATCH, model.num_tokens, dtype=torch.long)
    options = {"num_steps": 2, "guidance_scale": lambda t: 1 + float(t)}
    model.decode(indices, **options)
    del gpu.waits[:]
    model.decode(indices, **options, callback=lambda n, _: at_step.append(len(gpu.waits)))
    assert at_step == [0, 0], gpu.waits


TOKEN_OPTIONS = [
    ("gpt", {"guidance_scale": 3.0}),
    ("gpt", {"guidance_scale": 1.0, "temperature": 0.7}),
    ("gpt", {"top_k": 5, "top_p": 0.8}),
    ("gpt", {"temperature": 0.0}),
    ("gpt", {"generator": "rows"}),
    ("gpt", {"prefix": 2}),
    ("gpt-words", {"guidance_scale": 3.0, "top_p": 0.8}),
    ("gpt-free", {}),
]


@pytest.mark.parametrize(("name", "options"), TOKEN_OPTIONS, ids=str)
def test_the_token_loop_does_not_wait(gpu, name, options):
    model = build(GENERATOR_SPECS[name]).eval()
    cond, after = conditions(model, "cpu"), []
    options = {"generator": draws(), **options}
    if options["generator"] == "rows":
        options["generator"] = [draws() for _ in range(BATCH)]
    if "prefix" in options:
        options["prefix"] = torch.zeros(BATCH, options["prefix"], dtype=torch.long)
    model.generate(cond, **options)
    del gpu.waits[:]
    on_gpu(model.generate(cond, **options, callback=lambda n, _: after.append(len(gpu.waits))))
    assert len(after) >= 4
    assert after[0] == after[-1] == 0, gpu.waits
    assert len(gpu.waits) <= 1  # at the end, whether all logits were finite


@pytest.mark.parametrize("name", ["bert", "uvit"])
def test_the_steps_of_maskgit_do_not_wait(gpu, name):
    model = build(GENERATOR_SPECS[name]).eval()
    cond, after = conditions(model, "cpu"), []
    model.generate(cond, generator=draws())
    del gpu.waits[:]
    on_gpu(
        model.generate(cond, generator=draws(), callback=lambda n, _: after.append(len(gpu.waits)))
    )
    assert len(after) == 8
    assert after[0] == after[-1] == 0, gpu.waits
    assert len(gpu.waits) <= 1


def test_the_pipeline_runs_from_labels_to_pictures(gpu):
    tokenizer = build(TOKENIZER_SPECS["mask"]).eval()
    generator = build({**GENERATOR_SPECS["gpt"], "vocab_size": tokenizer.vocab_size}).eval()
    for _, pictures in grow_images(
        generator, tokenizer, conditions(generator, "cpu"), [1, 2], decoding={"num_steps": 1}
    ):
        on_gpu(pictures)
    images = torch.zeros(BATCH, 3, 16, 16)
    assert all(
        on_gpu(x).shape == images.shape
        for x in reconstruct_prefixes(tokenizer, images, [1, 8]).values()
    )


def plant(kind):
    def hook(module, inputs, output):
        if kind == "item":
            output.sum().item()
        elif kind == "cpu":
            output.cpu()
        elif kind == "branch" and output.mean() > 0:
            raise AssertionError("a fake GPU's values are 0")
        elif kind == "copy":
            output.add_(torch.ones(2).sum().expand(2).to(output.device).sum())
        elif kind == "mask":
            output[output > 0] = 0.0
        elif kind == "mixed":
            return output + torch.ones(output.shape[-1])
        return None

    return hook


@pytest.mark.parametrize("kind", ["item", "cpu", "branch", "copy", "mask"])
def test_a_planted_wait_is_found_with_its_line(gpu, kind):
    with DEVICE:
        model = torch.nn.Linear(3, 3)
        x = torch.randn(2, 3)
    model(x)
    assert gpu.waits == []
    model.register_forward_hook(plant(kind))
    model(x)
    (wait,) = gpu.waits
    assert wait.startswith(f"{__file__}:")


def test_a_planted_tensor_of_the_cpu_is_refused(gpu):
    with DEVICE:
        model = torch.nn.Linear(3, 3)
        x = torch.randn(2, 3)
    model.register_forward_hook(plant("mixed"))
    with pytest.raises(RuntimeError, match=r"same device|two devices"):
        model(x)


def test_planted_waits_in_the_loops_of_the_package_are_counted(gpu):
    tokenizer, generator = (
        build(TOKENIZER_SPECS["mask"]).eval(),
        build(GENERATOR_SPECS["gpt"]).eval(),
    )
    for model in (tokenizer.decoder, generator):
        model.head.register_forward_hook(plant("item"))
    tokenizer.decode(torch.zeros(1, 8, dtype=torch.long), num_steps=3, guidance_scale=1.0)
    planted = [wait for wait in gpu.waits if wait.startswith(__file__)]
    assert len(planted) == 3
    generator.generate(torch.zeros(1, dtype=torch.long), num_tokens=5)
    assert len([wait for wait in gpu.waits if wait.startswith(__file__)]) == 3 + 5


def test_tensors_of_the_cpu_are_real_and_copies_from_pinned_memory_do_not_wait(gpu):
    x = torch.arange(3.0)
    assert x.tolist() == [0, 1, 2]
    pinned = x.pin_memory()
    assert pinned.is_pinned()
    assert pinned.to(DEVICE, non_blocking=True).device == DEVICE
    assert gpu.waits == []
    x.to(DEVICE, non_blocking=True)  # not pinned
    pinned.to(DEVICE)  # blocks
    torch.tensor([1.0], device=DEVICE)
    assert len(gpu.waits) == 3


def test_revived_codes_are_sent_from_the_cpu_and_land_on_each_process_own_device(gpu, monkeypatch):
    """What is sent is pickled with its device: others got the first process's GPU."""
    with DEVICE:
        quantizer = VQ(8, 3).train()
        z = torch.randn(1, 5, 3)
    sent, taken = [], []

    def broadcast(x):
        sent.append(x.device.type)
        return x

    def revive(x, counts, generator):
        taken.append(x.device)
        return 0

    monkeypatch.setattr(quantizer, "revive", revive)
    monkeypatch.setattr(CodebookUsage, "log_usage", lambda *_: (1.0, 1.0))
    usage = CodebookUsage(quantizer, every=1, revive=True)
    usage.count(quantizer, (z,), (z, torch.zeros(1, 5, dtype=torch.long, device=DEVICE)))
    strategy = SimpleNamespace(broadcast=broadcast, reduce=lambda x, reduce_op: x)
    trainer = SimpleNamespace(strategy=strategy, global_step=1)
    usage.on_train_batch_end(trainer, SimpleNamespace(log=lambda *_: None))
    assert (sent, taken) == (["cpu"], [DEVICE])
