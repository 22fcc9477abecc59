"""Where the package puts its tensors, and which device it picks."""

import subprocess
import sys

import pytest
import torch
from helpers.models import TINY, TITOK, VQGAN
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flextok.cli.common import pick_device
from flextok.config import load_experiment
from flextok.data.processes import local_device
from flextok.evaluation.metrics import psnr
from flextok.flow.guidance import apg
from flextok.generators import GENERATORS
from flextok.nn.devices import span, widest
from flextok.registry import build_model
from flextok.tokenizers import TOKENIZERS
from flextok.training.prepare import cache_device


@pytest.mark.parametrize(
    ("cuda", "mps", "found"), [(2, True, "cuda:1"), (0, True, "mps"), (0, False, "cpu")]
)
def test_a_gpu_comes_first_then_mps_then_the_cpu(monkeypatch, cuda, mps, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    assert local_device() == pick_device(None) == found
    monkeypatch.delenv("RANK")  # as where Lightning starts the processes
    assert local_device() == found
    assert pick_device("cpu") == "cpu"


class NoFloat64(TorchDispatchMode):
    """As MPS does it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
                raise TypeError(f"{func}: MPS has no float64")
        return result


def test_guidance_and_picture_metrics_need_no_float64_on_mps(monkeypatch, generator):
    """Projection and rounding to 8 bits took float64 everywhere: MPS refuses it."""
    c, u, a, b = torch.randn(4, 2, 3, 8, 8, generator=generator)

    def guided():
        return apg(lambda x, t: c, lambda x, t: u, scale=7.5)(c, torch.tensor(1.0))

    exact = guided(), psnr(a.tanh(), b.tanh())
    assert exact[1].dtype == torch.float64
    with pytest.raises(TypeError, match="no float64"), NoFloat64():
        guided()
    assert widest(torch.device("mps")) == torch.float32
    for module in ("flextok.flow.guidance", "flextok.evaluation.metrics"):
        monkeypatch.setattr(f"{module}.widest", lambda device: widest(torch.device("mps")))
    with NoFloat64():
        nearly = guided(), psnr(a.tanh(), b.tanh())
    for rough, fine in zip(nearly, exact, strict=True):
        torch.testing.assert_close(rough, fine.float(), rtol=1e-5, atol=1e-5)


GPT = {"vocab_size": 200, "num_tokens": 8, "depth": 2, "dim": 32, "num_heads": 2}
MODELS = {
    "flextok": {"name": "flextok", **TINY},
    "spread": {"name": "flextok", **TINY, "register_start": "spread"},
    "titok": {"name": "titok", **TITOK, "init": "spread"},
    "vqgan": {"name": "maskgit_vqgan", **VQGAN},
    "gpt": {"name": "gpt", **GPT},
    "maskgit": {"name": "maskgit", **GPT},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_built_where_torch_is_told_to(name):
    """Positions come from the CPU: without moving them a model would lie on two devices."""
    with torch.device("meta"):
        model = build_model({**TOKENIZERS, **GENERATORS}, MODELS[name])
    assert {x.device.type for x in (*model.parameters(), *model.buffers())} == {"meta"}
    assert model.device == torch.device("meta")


def test_loading_a_model_does_not_import_the_compiler_of_torch(tmp_path):
    """An arange on the meta device did: 1.3 of 3.3 seconds of a load."""
    folders = []
    for name, spec in MODELS.items():
        model = build_model({**TOKENIZERS, **GENERATORS}, spec)
        folders.append(str(model.save_pretrained(tmp_path / name)))
    code = (
        "import sys; from flextok.pipeline import load\n"
        "for folder in sys.argv[1:]: load(folder)\n"
        "print([name for name in ('torch._inductor', 'torch._dynamo') if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_span_reads_both_ends_exactly():
    assert span(torch.tensor([[3, -7], [12, 0]])) == [-7, 12]
    assert span(torch.tensor([0.1, -0.3])) == [torch.tensor(-0.3).item(), torch.tensor(0.1).item()]


@pytest.mark.parametrize(
    ("devices", "rank", "expected"),
    [("2,3", 0, 2), ("2,3", 1, 3), ("auto", 1, 1), ("2", 1, 1), ("0,2", 3, 2)],
)
def test_caches_are_filled_on_the_gpus_that_train(monkeypatch, devices, rank, expected):
    """Those that the environment counts first were taken, whoever was at work there."""
    config = load_experiment("configs/quickstart_generator.yaml", [f"trainer.devices='{devices}'"])
    config.trainer.accelerator = "auto"
    found = f"cuda:{rank % 4}"
    monkeypatch.setattr("flextok.training.prepare.local_device", lambda: found)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert cache_device(config) == f"cuda:{expected}"
