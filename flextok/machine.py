"""What a machine can do, and what a call costs on it: seconds, memory, and the FLOPs that torch's
counter does not know. Rates on a CPU are per CPU second and thread."""

import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from flextok.cpu import ONEDNN_LINEAR, cpuinfo, linear


@dataclass
class Machine:
    device: str
    processor: str
    torch: str
    threads: int
    dtype: str
    matmul_flops: float  # a second
    bandwidth: float  # bytes read a second


def linear_flops(x: Any, weight: Any, *_: object, **__: object) -> int:
    return 2 * math.prod(x) * weight[0]


def attention_flops(q: Any, k: Any, v: Any, *_: object, **__: object) -> int:
    return sdpa_flop_count(q, k, v)


def attention_backward_flops(grad: Any, q: Any, k: Any, v: Any, *_: object, **__: object) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


aten = torch.ops.aten
# what torch's counter does not know, in every version
FLOPS: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
    **({} if ONEDNN_LINEAR is None else {ONEDNN_LINEAR: linear_flops}),
}


def measure(run: Callable[[], object], device: torch.device, repeats: int) -> tuple[float, float]:
    """Wall and CPU seconds of a call, the best of `repeats` each."""
    best_wall = best_cpu = float("inf")
    for _ in range(repeats):
        synchronize(device)
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        synchronize(device)
        best_wall = min(best_wall, time.perf_counter() - wall)
        best_cpu = min(best_cpu, time.process_time() - cpu)
    return best_wall, best_cpu


def busy_seconds(wall: float, cpu: float, device: torch.device) -> float:
    """What rates are per: seconds of a GPU, or of a CPU's threads whoever else is on it."""
    return cpu / torch.get_num_threads() if device.type == "cpu" else wall


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Its best rates: of square and of transformer-shaped matrix products, by the better of the
    libraries that `linear` takes, and of reading memory (a dot product and a matrix-vector product
    far larger than its caches)."""
    on_gpu = device.type == "cuda"

    def seconds(run: Callable[[], object]) -> float:
        run()
        return busy_seconds(*measure(run, device, 10 if on_gpu else 5), device)

    best = 0.0
    for m, k, n in [(8192, 8192, 8192)] if on_gpu else [(2048,) * 3, (512, 768, 2048)]:
        a, b = (torch.ones(*shape, device=device, dtype=dtype) for shape in ((m, k), (n, k)))
        repeat = 1 if on_gpu else max(1, 2048**3 // (m * k * n))
        for multiply in (F.linear, linear):
            run = partial(multiply, a, b)
            took = seconds(lambda run=run, repeat=repeat: [run() for _ in range(repeat)])  # type: ignore[misc]
            best = max(best, 2.0 * m * k * n * repeat / took)
    size = 2**28 if on_gpu else 2**26
    x = torch.ones(size, device=device).to(dtype)
    matrix, vector = x.view(1024, -1), x[:1024]
    took = min(seconds(lambda: torch.dot(x[: size // 2], x[size // 2 :])),
               seconds(lambda: vector @ matrix))  # fmt: skip
    return Machine(
        str(device),
        torch.cuda.get_device_name(device) if on_gpu else processor_name(),
        torch.__version__,
        torch.get_num_threads(),
        str(dtype).removeprefix("torch."),
        best,
        x.nbytes / took,
    )


def processor_name() -> str:
    return cpuinfo("model name") or platform.processor() or platform.machine()


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew


def peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of the whole process so far
