"""benchmarks/tree_search.py with tiny models: its figures are those of the images found."""

import importlib.util
from pathlib import Path

import pytest
import torch
from helpers.models import tiny_gpt, tiny_tokenizer

from flextok.emoji.probe import train_probe
from flextok.emoji.scenes import EmojiScenes

SCRIPT = Path(__file__).parent.parent / "benchmarks/tree_search.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("tree_search_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_more_decodes_score_more_with_the_verifier(script):
    encoder = {"name": "bytes", "dim": 16, "depth": 1, "num_heads": 2}
    gpt = tiny_gpt(conditioner={"name": "text", "encoder": encoder})
    tokenizer = tiny_tokenizer(decode={"num_steps": 1, "guidance_scale": 1.0})
    train = EmojiScenes(prompts="train", **script.KNOWN)
    verifier, judge = (
        train_probe(train, 16, steps=8, num_scenes=64, seed=seed, width=8) for seed in (0, 1)
    )
    searches = {
        "none": {"lengths": [8], **script.ONE},
        "best-of-8": {"lengths": [8], "budget": 8},
        "uniform-beam": {"lengths": [1, 2], "budget": 4},
    }
    scenes = EmojiScenes(prompts="held_out", **script.KNOWN)
    models = (gpt, tokenizer, tokenizer, verifier, judge, scenes)
    table = script.measure(*models, searches, 6, [0, 1])
    assert [row["decodes"] for row in table.values()] == [1, 8, 4]
    for seed in (0, 1):
        none, best = (table[name]["seeds"][seed] for name in ("none", "best-of-8"))
        assert best["verifier"] > none["verifier"]
        # the same decoder shows the same images
        assert best["shown"]["by_fact"] == best["by_fact"]
    lines = script.format_table(table).splitlines()
    assert len(lines) == 5
    assert lines[3].startswith("| best-of-8 | 8 | -")


def test_the_searches_of_the_table_are_valid(script):
    """Each of them, checked as search() does before the work."""
    from flextok.tree_search import check_budget

    for name, options in script.SEARCHES.items():
        levels = len(options["lengths"])
        rest = options.get("beams", 2), options.get("lookahead", 0), levels
        assert sum(check_budget(options["budget"], *rest)) == options["budget"], name
    assert torch.tensor(script.SEARCHES["best-of-64"]["lengths"]).max() == 64
