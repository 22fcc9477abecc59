"""A few-step decoder against its teacher: distance, PSNR and time on held-out pictures.

    python benchmarks/few_steps.py TEACHER STUDENT [STUDENT ...] [--data emoji:validation]
        [--teacher-steps 20] [--num-tokens 16 64] [--networks efficientnet_lite0] [--json FILE]

Each decodes all pictures from the same indices and noise. In brackets: a student's score over the
teacher's at the same number of tokens.
"""

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from flextok.cli.common import open_data
from flextok.cli.options import write_json
from flextok.evaluation import Cell, Options, evaluate
from flextok.pipeline import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("teacher")
    parser.add_argument("students", nargs="+")
    parser.add_argument("--data", default="emoji:validation")
    parser.add_argument("--teacher-steps", type=int, default=20)
    parser.add_argument("--num-tokens", type=int, nargs="+", help="all by default")
    parser.add_argument("--networks", nargs="+", default=["efficientnet_lite0"])
    parser.add_argument("--json")
    options = parser.parse_args()
    data, settings = open_data(options.data), Options(networks=tuple(options.networks))
    table: dict[int, dict[str, dict[str, float]]] = {}  # tokens -> model and its steps -> scores
    for path in (options.teacher, *options.students):
        model = load_model(path)
        steps = options.teacher_steps if path == options.teacher else model.config.decode.num_steps
        cells = [Cell(k, steps) for k in options.num_tokens or [model.num_tokens]]
        for result in evaluate(model, data, cells, settings)["results"]:
            seconds = {"seconds_per_picture": result["seconds_per_picture"]}
            rows = table.setdefault(result["num_tokens"], {})
            rows[f"{path}, {steps} steps"] = {**result["scores"], **seconds}
    for num_tokens, rows in table.items():
        reference = next(iter(rows.values()))
        keys = [k for k in reference if k.startswith("frechet") or k in ("psnr", *seconds)]
        print(f"{f'{num_tokens} tokens':50s}" + "".join(f"{key:>32s}" for key in keys))
        for name, scores in rows.items():
            shown = (f"{scores[key]:.4g} ({scores[key] / reference[key]:.3f}x)" for key in keys)
            print(f"{name:50s}" + "".join(f"{cell:>32s}" for cell in shown))
    if options.json:
        write_json(options.json, {"data": options.data, "rows": table})


if __name__ == "__main__":
    main()
