"""Few-step decoders against their teacher: how plausible and how faithful, and the time.

    python benchmarks/few_steps.py TEACHER STUDENT [STUDENT ...] [--data emoji:validation]
        [--reference emoji:train] [--num-tokens 1 4 16 64 256] [--seeds 0 1 2] [--json FILE]

Each decodes all pictures with its own defaults; scores are means over the seeds, since that of one
seed's noise varies (the kernel distance of 154 images by a quarter). In brackets: a student's score
over the teacher's at the same number of tokens.
"""

import argparse
import os
from statistics import mean

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from flextok.cli.common import open_data
from flextok.cli.options import write_json
from flextok.evaluation import Cell, Options, evaluate
from flextok.pipeline import load

NETWORK = "efficientnet_lite0_native"
SHOWN = {
    f"kernel_to_reference_{NETWORK}": "kernel distance",
    "sharpness": "sharpness",
    f"feature_distance_squared_{NETWORK}": "feature distance",
    "psnr": "PSNR (dB)",
    "seconds_per_picture": "s/picture",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("teacher")
    parser.add_argument("students", nargs="+")
    parser.add_argument("--data", default="emoji:validation")
    parser.add_argument("--reference", default="emoji:train", help="of the kernel distance")
    parser.add_argument("--num-tokens", type=int, nargs="+", help="all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json")
    options = parser.parse_args()
    data, reference = open_data(options.data), open_data(options.reference)
    table: dict[int, dict[str, dict[str, float]]] = {}  # tokens -> model -> its mean scores
    for path in (options.teacher, *options.students):
        model = load(path)
        cells = [Cell(k) for k in options.num_tokens or [model.num_tokens]]
        how = {"networks": [NETWORK], "reference": reference}
        runs = [evaluate(model, data, cells, Options(seed=s, **how)) for s in options.seeds]
        for results in zip(*(run["results"] for run in runs), strict=True):
            rows = [
                {**r["scores"], "seconds_per_picture": r["seconds_per_picture"]} for r in results
            ]
            scores = {key: mean(row[key] for row in rows) for key in SHOWN}
            table.setdefault(results[0]["num_tokens"], {})[path] = scores
    for num_tokens, models in table.items():
        first = next(iter(models.values()))
        print(f"{f'{num_tokens} tokens':40s}" + "".join(f"{name:>20s}" for name in SHOWN.values()))
        for path, scores in models.items():
            shown = (f"{scores[key]:.4g} ({scores[key] / first[key]:.2f}x)" for key in SHOWN)
            print(f"{path:40s}" + "".join(f"{cell:>20s}" for cell in shown))
    if options.json:
        settings = {"data": options.data, "reference": options.reference, "seeds": options.seeds}
        write_json(options.json, {**settings, "rows": table})


if __name__ == "__main__":
    main()
