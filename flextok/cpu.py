"""`accelerate(model)`: a model's matrix products at the rate that a CPU has for them.

torch gives fp32 products to MKL, which keeps its AVX-512 code to Intel's processors. oneDNN comes
with torch too and runs it on any: twice the rate on AMD's Zen 5, equal to rounding (1e-6). A
generator that draws index by index multiplies few rows by all its weights, which then lie column
by column.
"""

import copy
import platform
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flextok.generators import GPT
from flextok.nn.frozen import Frozen

M = TypeVar("M", bound=nn.Module)

# torch's own name for the product, which torch.compile uses: private, so it may be missing from
# some version, which then does without it
ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)

# Below these oneDNN's 15 us a call outweigh what it saves (measured on Zen 5). They depend on
# shapes alone, never on a timing, so that a run repeats and resumes bit for bit.
MIN_ROWS = 8  # generation's few rows are matrix-vector products, bound by memory
MIN_WIDTH = 32
MIN_PRODUCTS = 2**21
# With up to about four rows a product reads weights that lie column by column at 1.5 to 1.7 times
# the rate (MKL, AVX2); 32 steps are worth the copy of a layer at least as wide as its input.
FEW_ROWS = 4
MANY_STEPS = 32


def multiplies_bf16(device: str) -> bool:
    """Whether a type of device ("cpu", "cuda", ...) multiplies bf16 faster than fp32: a CPU by
    AVX512-BF16 or AMX at twice the rate, where others take up to 50 times as long as for fp32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    fast_cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device == "cpu" and fast_cpu


def accelerate(model: M) -> M:
    """Returns `model` itself, faster on a CPU and the same elsewhere: its weights, state dict and
    files do not change, and its results do so only by rounding."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDNNLinear
        elif isinstance(module, GPT):
            module.lay_out = column_major_if_worth
        for value in vars(module).values():
            if isinstance(value, Frozen):
                accelerate(value.network)
    return model


def column_major_if_worth(layers: nn.Module, rows: int, steps: int) -> nn.Module:
    """The layers that take `steps` with so many rows of input each: the same, or a twin."""
    on_cpu = next(layers.parameters()).device.type == "cpu"
    return column_major(layers) if on_cpu and rows <= FEW_ROWS and steps >= MANY_STEPS else layers


def column_major(module: nn.Module) -> nn.Module:
    """A twin of `module` for inference that shares all its tensors except the weights of Linear
    layers at least as wide as their input, which lie column by column."""
    shared: dict[int, object] = {id(x): x for x in (*module.parameters(), *module.buffers())}
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and layer.out_features >= layer.in_features:
            weight = layer.weight.detach().t().contiguous().t()
            shared[id(layer.weight)] = nn.Parameter(weight, requires_grad=False)
    return copy.deepcopy(module, shared)


class OneDNNLinear(nn.Linear):
    """nn.Linear in all but the library that multiplies."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear. x: (..., D); weight: (E, D); bias: (E,). Returns (..., E)."""
    if takes_onednn(x, weight):
        return _OneDNNLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def takes_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` gives this product to oneDNN; torch.backends.mkldnn.flags(enabled=False)
    keeps it from all."""
    rows = x.numel() // max(1, weight.shape[1])
    return (
        not torch.compiler.is_compiling()  # the compiler chooses better itself
        and x.shape[-1:] == weight.shape[1:]  # a misfit gets torch's own error
        and rows >= MIN_ROWS
        and min(weight.shape) >= MIN_WIDTH
        and rows * weight.numel() >= MIN_PRODUCTS
        and all(_is_plain(tensor) for tensor in (x, weight))
        and onednn_is_faster()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and torch._C._functorch.peek_interpreter_stack() is None  # no torch.func transform
    )


def _is_plain(x: Tensor) -> bool:
    """A dense fp32 tensor of a CPU, not a subclass with rules of its own (FakeTensor, DTensor)."""
    ordinary = type(x) is Tensor or type(x) is nn.Parameter
    return ordinary and x.is_cpu and x.dtype is torch.float32 and x.layout is torch.strided


@cache
def onednn_is_faster() -> bool:
    """Whether this machine has AVX-512 that MKL leaves unused."""
    return (
        ONEDNN_LINEAR is not None
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and processor_vendor() not in ("GenuineIntel", "")
    )


def processor_vendor() -> str:
    """As Linux names it, "" elsewhere."""
    return cpuinfo("vendor_id") if platform.system() == "Linux" else ""


def cpuinfo(key: str) -> str:
    """What Linux's /proc/cpuinfo states of the first processor, "" where there is none."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    values = [line.partition(":")[2].strip() for line in lines if line.startswith(key)]
    return values[0] if values else ""


class _OneDNNLinear(torch.autograd.Function):
    """The product of `linear` with its gradients, which torch has no formula for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        assert ONEDNN_LINEAR is not None
        return ONEDNN_LINEAR(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows, x_rows = grad.flatten(0, -2), x.flatten(0, -2)
        return (
            linear(grad, weight.t()) if needs_x else None,
            linear(rows.t(), x_rows.t()) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )
