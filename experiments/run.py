"""The base recipe, and with one change each: the same steps, batch and seeds, measured alike.

    python experiments/run.py --steps 600 --seeds 0 1 [--only base paper ifsq]
    python experiments/run.py --base generator --steps 1000 --batch-size 32 --seeds 0 1

A recipe is a file of recipes/, which inherits base.yaml; those of generators are in
generator_recipes/ and inherit generator.yaml. Every run has a folder
<output>/<recipe>/seed-<n> with result.json. What is finished is skipped, what was interrupted goes
on; another budget wants another --output. <output>/table.md is written anew after each run, from
all that is finished there. Several of these may run side by side, each with its own --only.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from study import score_tables, spread, train_and_measure

from flextok.config import ExperimentConfig, load_experiment

HERE = Path(__file__).parent
FOLDERS = {"base": HERE / "recipes", "generator": HERE / "generator_recipes"}
RECIPES = {
    base: sorted(path.stem for path in folder.glob("*.yaml")) for base, folder in FOLDERS.items()
}
LENGTHS = [1, 4, 16, 64, 256]


def recipe_config(base: str, name: str, overrides: list[str]) -> ExperimentConfig:
    return load_experiment(FOLDERS[base] / f"{name}.yaml", overrides)


def finished(output: Path) -> dict[str, list[dict[str, Any]]]:
    """Recipe -> the results of its seeds, base and paper first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(output.glob("*/seed-*/result.json")):
        found.setdefault(path.parent.parent.name, []).append(json.loads(path.read_text("utf-8")))
    order = sorted(found, key=lambda name: (name != "paper", name != "base", name))
    return {name: found[name] for name in order}


def budget_of(run: dict[str, Any]) -> tuple[int, int]:
    """Steps, and images in each."""
    return run["config"]["trainer"]["max_steps"], run["config"]["data"]["batch_size"]


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: budget, scores by number of tokens, use of codes and cost."""
    first = next(iter(results.values()))[0]
    steps, batch = budget_of(first)
    count = first["report"]["results"][0]["count"]
    text = [
        f"{steps} steps of {batch}, {count} pictures; ± half the range over seeds.",
        "",
        score_tables(results),
        "**Codes and cost**",
        "",
        "| recipe | codes used (%) | perplexity | CPU s a step |",
        "|---|---|---|---|",
    ]
    for name, runs in results.items():
        codes = [run["report"]["codes"] for run in runs]
        seconds = [s for run in runs if (s := run["cpu_seconds_per_step"]) is not None]
        cells = [
            spread([100 * c["usage"] for c in codes], 1),
            spread([c["perplexity"] for c in codes], 0),
            spread(seconds, 3) if seconds else "unknown",
        ]
        text.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", choices=FOLDERS, default="base", help="what the recipes change")
    parser.add_argument("--only", nargs="+", metavar="RECIPE", help="all by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--networks", nargs="+", default=["efficientnet_lite0"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("outputs/experiments"))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="for all recipes")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    asked = {(options.steps, options.batch_size)}
    runs = (run for runs in finished(options.output).values() for run in runs)
    if others := set(map(budget_of, runs)) - asked:
        steps, batch = min(others)
        parser.error(
            f"{options.output} holds runs of {steps} steps of {batch}, with which a table "
            "cannot compare these: name another --output"
        )
    known = RECIPES[options.base]
    for name in options.only or []:
        if name not in known:
            parser.error(f"no recipe {name!r}; known: {', '.join(known)}")
    for seed in options.seeds:  # all recipes with the first seed come first
        for name in options.only or known:
            budget = [
                f"seed={seed}",
                f"output_dir={options.output / name / f'seed-{seed}'}",
                f"trainer.max_steps={options.steps}",
                f"trainer.validate_every={options.steps}",
                f"data.batch_size={options.batch_size}",
            ]
            config = recipe_config(options.base, name, [*options.set, *budget])
            longest = config.model.get("num_registers", config.model.get("num_tokens"))
            lengths = [k for k in LENGTHS if k <= longest]
            print(f"== {name}, seed {seed}", flush=True)
            train_and_measure(config, lengths, options.networks)
            (options.output / "table.md").write_text(table(finished(options.output)), "utf-8")
    print(table(finished(options.output)))


if __name__ == "__main__":
    main()
