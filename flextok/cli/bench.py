"""`flextok bench`: what models cost on this machine."""

from typing import Any

import torch

from flextok.bench import (
    DEFAULT_SIZES,
    HEADER,
    SIZES,
    bench,
    format_machine,
    format_result,
)
from flextok.cli.arguments import Bench
from flextok.cli.common import pick_device


def run_bench(options: Bench) -> dict[str, Any]:
    if options.threads:
        torch.set_num_threads(options.threads)
    sizes = list(SIZES) if options.sizes == ["all"] else options.sizes or list(DEFAULT_SIZES)
    print(HEADER)
    report = bench(
        sizes,
        options.only,
        pick_device(options.device),
        options.dtype,
        options.repeats,
        options.batch,
        options.steps,
        options.compare_mkl,
        report=lambda result: print(format_result(result), flush=True),
    )
    print(format_machine(report["machine"]))
    return report
