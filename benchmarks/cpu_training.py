"""What a CPU's training step takes where this package computes a part of it in another way than
torch would: CPU milliseconds on one thread, both in one run, at the sizes of
experiments/fashion_mnist.

    python benchmarks/cpu_training.py [--repeats 5]
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flextok.bench import measure
from flextok.cli.options import write_json
from flextok.cpu import cpuinfo, multiplies_bf16
from flextok.losses.alignment import EfficientNetFeatures
from flextok.nn.attention import attend
from flextok.nn.cross_entropy import cross_entropy
from flextok.training.muon import Muon

CPU = torch.device("cpu")
Pair = tuple[Callable[[], object], Callable[[], object]]  # as torch would, and as we do


def attention() -> Pair:
    q, k, v = (torch.randn(16, 5, 48, 32, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    return (
        lambda: F.scaled_dot_product_attention(q, k, v).sum().backward(),
        lambda: attend(q, k, v).sum().backward(),
    )


def vocabulary(dtype: torch.dtype) -> Pair:
    head, x = nn.Linear(128, 12_800), torch.randn(2048, 128, requires_grad=True)
    truth, weights = torch.randint(12_800, (2048,)), torch.ones(2048)

    def autocast(loss: Callable[[], Tensor]) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            value = loss()
        value.backward()

    return (
        lambda: autocast(lambda: F.cross_entropy(head(x).float(), truth)),
        lambda: autocast(lambda: cross_entropy(head, x, truth, weights)[0]),
    )


def muon() -> Pair:
    """The matrices of eight transformer blocks of 128 channels."""
    shapes = 8 * ([(128, 128)] * 4 + [(341, 128)] * 2 + [(128, 341), (768, 128)])
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    group = {"lr": 1e-3, "weight_decay": 0.01}
    theirs = torch.optim.Muon(parameters, **group)
    return theirs.step, Muon([{"params": parameters, **group}]).step


def teacher() -> Pair:
    """Features of 16 images of 64 px by EfficientNet-Lite0, under autocast."""
    backbone, images = EfficientNetFeatures(pretrained=False), torch.randn(16, 3, 64, 64)

    @torch.no_grad()
    @torch.autocast("cpu", torch.bfloat16)
    def theirs() -> Tensor:
        return backbone.network.forward_features(images).mean((2, 3))

    @torch.no_grad()
    @torch.autocast("cpu", torch.bfloat16)
    def ours() -> Tensor:
        return backbone.pooled(images, 64)

    return theirs, ours


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu_training.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parts = {"cross-entropy of 12,800 codes, fp32": vocabulary(torch.float32)}
    if multiplies_bf16("cpu"):
        parts |= {
            "attention and its gradient, bf16": attention(),
            "cross-entropy of 12,800 codes, bf16": vocabulary(torch.bfloat16),
            "Muon": muon(),
            "EfficientNet-Lite0, bf16": teacher(),
        }
    rows = []
    print("| part | torch, ms | here, ms | ratio |\n|---|---|---|---|")
    for name, (theirs, ours) in parts.items():
        for run in (theirs, ours):
            run()  # warms up
        before, after = (1000 * measure(run, CPU, options.repeats)[1] for run in (theirs, ours))
        rows.append({"part": name, "torch_ms": before, "here_ms": after})
        print(f"| {name} | {before:.1f} | {after:.1f} | {before / after:.1f} |", flush=True)
    facts = {"torch": torch.__version__, "processor": cpuinfo("model name"), "rows": rows}
    write_json(str(options.output), facts)


if __name__ == "__main__":
    main()
