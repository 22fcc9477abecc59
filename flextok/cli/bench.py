"""`flextok bench`: what models cost on this machine."""

import argparse
from typing import Any

from flextok.cli.common import add_command, pick_device


def add_commands(commands: Any) -> None:
    bench = add_command(
        commands,
        "bench",
        run_bench,
        "seconds, FLOP/s, memory of encoding, decoding, generating and a training step",
        "Random weights at named sizes, beside the machine's own best rates; on a CPU, "
        "compare CPU seconds with --threads 1.",
        "flextok bench quickstart\nflextok bench d12-d12 ar-49M --threads 1 --json bench.json",
        *("--device", "--json"),
    )
    bench.add_argument("sizes", nargs="*", metavar="SIZE", help="names, all, or config files")
    bench.add_argument("--only", default="", metavar="TEXT", help="rows whose name holds this")
    bench.add_argument("--batch", type=int, nargs="+", help="in place of a size's own")
    bench.add_argument("--steps", type=int, default=4, help="of FlexTok's decoder")
    bench.add_argument("--repeats", type=int, default=3, help="the best of these counts")
    bench.add_argument("--compare-mkl", action="store_true", help="also without oneDNN, on a CPU")
    bench.add_argument("--threads", type=int, help="of the CPU")
    bench.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")


def run_bench(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from flextok.bench import (
        DEFAULT_SIZES,
        HEADER,
        PUBLISHED_ON,
        SIZES,
        bench,
        format_machine,
        format_result,
    )

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
    if any(result["published_cpu"] for result in report["results"]):
        print(f"published: a ratio to CPU seconds on {PUBLISHED_ON}, so of the machines too")
    return report
