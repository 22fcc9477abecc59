"""The base recipe's models, decoded in several steps, with guidance at all times or at some.

    python experiments/guidance.py --models outputs/experiments/base/seed-*

Needs no training: the models are those of run.py. <output>/guidance.md and guidance.json sum up, by
setting and number of tokens, over the models.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from run import LENGTHS, score_tables

from flextok import FlexTok
from flextok.config import load_experiment
from flextok.evaluation.evaluate import evaluate_tokenizer
from flextok.evaluation.job import Cell, Options
from flextok.training.run import make_dataset
from flextok.training.study import write_json

SETTINGS: dict[str, dict[str, Any]] = {
    "one step": {"num_steps": 1, "guidance_scale": 1.0},
    "20 steps": {"num_steps": 20, "guidance_scale": 1.0},
    "20 steps, guided": {"num_steps": 20, "guidance_scale": 2.0},
    "20 steps, guided in [0.2, 0.8]": {
        "num_steps": 20,
        "guidance_scale": 2.0,
        "guidance_interval": [0.2, 0.8],
    },
    "20 steps, guided in [0, 0.5]": {
        "num_steps": 20,
        "guidance_scale": 2.0,
        "guidance_interval": [0.0, 0.5],
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", type=Path, required=True, help="folders of runs")
    parser.add_argument("--networks", nargs="+", default=["efficientnet_lite0"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("outputs/experiments"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in SETTINGS}
    for folder in options.models:
        config = load_experiment(folder / "config.yaml")
        dataset = make_dataset(config.data.validation)
        model = FlexTok.from_pretrained(folder)
        cells = [Cell(k) for k in LENGTHS if k <= model.num_tokens]
        for name, changes in SETTINGS.items():
            for key, value in ({"guidance_interval": None} | changes).items():
                setattr(model.config.decode, key, value)
            how = Options(networks=tuple(options.networks), seed=config.seed)
            report = evaluate_tokenizer(model, dataset, cells, how)
            results[name].append({"seed": config.seed, "decode": changes, "report": report})
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(results, options.output / "guidance.json")
    text = score_tables(results)
    (options.output / "guidance.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
