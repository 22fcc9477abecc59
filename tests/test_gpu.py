"""On a real GPU: the same numbers as on a CPU, and a training run as `precision: auto` makes it.
`make gpu` runs these and measures; on a machine without a GPU its dry run is tested here."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import tiny_gpt, tiny_tokenizer
from safetensors.torch import load_file

from flextok.config import load_experiment
from flextok.training.run import train

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import gpu

ROOT = Path(__file__).parent.parent
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def on_both(build, use):
    results = []
    for device in ("cpu", "cuda"):
        results.append(use(build().to(device)))
        assert results[-1].device.type == device
    return results[0], results[1].cpu()


class TestGPU:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("drop_mode", ["mask", "truncate"])
    def test_decoding_and_encoding_agree_with_the_cpu(self, images, drop_mode):
        indices = torch.arange(24).view(3, 8) % 200
        rng = torch.Generator()

        def decode(model):
            options = {"keep": torch.tensor([1, 4, 8]), "num_steps": 4}
            return model.decode(indices, **options, generator=rng.manual_seed(0))

        def build():
            return tiny_tokenizer(drop_mode=drop_mode)

        torch.testing.assert_close(*on_both(build, decode), rtol=1e-3, atol=1e-3)
        ours, theirs = on_both(build, lambda model: model.encode(images))
        assert (ours == theirs).float().mean() > 0.9  # rounding decides a few

    @pytest.mark.parametrize("options", [{}, {"top_k": 20, "top_p": 0.9}, {"temperature": 0.0}])
    def test_generation_agrees_with_the_cpu(self, options):
        rng = torch.Generator()

        def generate(model):
            return model.generate(torch.arange(5), generator=rng.manual_seed(0), **options)

        ours, theirs = on_both(tiny_gpt, generate)
        assert (ours == theirs).all(dim=1).float().mean() > 0.5  # a row may part at a rounding
        assert (ours[:, 0] == theirs[:, 0]).float().mean() > 0.5

    @pytest.mark.parametrize("optimizer", ["adamw", "muon"])
    def test_a_run_in_bf16_with_clipping_takes_its_steps(self, tmp_path, optimizer):
        config = load_experiment(
            ROOT / "configs" / "quickstart_tokenizer.yaml",
            [
                f"output_dir={tmp_path}",
                f"optim.name={optimizer}",
                *("optim.grad_clip=1.0", "trainer.accelerator=gpu", "trainer.devices=1"),
                *("trainer.precision=bf16-mixed", "trainer.max_steps=3"),
            ],
        )
        assert (train(config) / "model.safetensors").exists()

    def test_a_run_by_cuda_graphs_comes_to_the_same_weights(self, tmp_path):
        weights = []
        for graphs in ("false", "true"):
            folder = tmp_path / graphs
            options = [
                f"output_dir={folder}",
                f"trainer.cuda_graphs={graphs}",
                *("trainer.accelerator=gpu", "trainer.devices=1", "trainer.precision=32-true"),
                "trainer.max_steps=6",
            ]
            train(load_experiment(ROOT / "configs" / "quickstart_tokenizer.yaml", options))
            weights.append(load_file(folder / "model.safetensors"))
        torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("size", gpu.published())
    def test_every_published_size_takes_a_step_in_bf16(self, size):
        take_steps(gpu.read(size), torch.device("cuda"))


def take_steps(config, device):
    """Two steps of batches of two: finite, and other weights after each."""
    module = gpu.plan.build(config, device)
    step = gpu.make_step(module, config, 2)
    trained = [p for p in module.parameters() if p.requires_grad]
    sums = []
    for _ in range(2):
        assert step().isfinite().all()
        sums.append(sum(p.detach().double().abs().sum() for p in trained))
    assert torch.stack(sums).isfinite().all()
    assert sums[0] != sums[1]


@pytest.mark.parametrize("size", ["quickstart_tokenizer", "quickstart_titok_stage1", "vae_emoji"])
def test_a_small_size_takes_a_step_in_bf16_here(size):
    take_steps(gpu.read(size), torch.device("cpu"))


@pytest.mark.parametrize("size", ["titok_s128_stage1", "ar_class_49M", "vae_f8_c16"])
def test_the_dry_run_finds_nothing_to_wait_for(tmp_path, size):
    result = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--dry", "--sizes", size],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{size:24s} 0 waits" in result.stdout
