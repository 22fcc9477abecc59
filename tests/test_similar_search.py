"""experiments/similar_search.py with tiny models: more decodes find images that are more alike."""

import json
import sys
from pathlib import Path

import torch
from helpers.files import write_idx
from helpers.models import tiny_gpt, tiny_tokenizer
from safetensors.torch import save_file

from flextok.pipeline import remember_tokenizer
from flextok.tree_search import check_budget

sys.path.append(str(Path(__file__).parent.parent / "experiments"))

import similar_search
from classifier import Classifier


def test_an_image_is_most_like_itself():
    images = torch.rand(3, 1, 28, 28) * 2 - 1
    score = similar_search.likeness(Classifier().eval(), images)
    same = score(images.expand(-1, 3, -1, -1), torch.arange(3), torch.zeros(3, 1))
    other = score(images.expand(-1, 3, -1, -1), torch.tensor([1, 2, 0]), torch.zeros(3, 1))
    torch.testing.assert_close(same, torch.zeros(3))
    assert (other < -1e-6).all()


def test_more_decodes_find_images_that_are_more_alike(tmp_path, monkeypatch, capsys):
    write_idx(tmp_path / "data", {"test": 6})
    save_file(Classifier().state_dict(), tmp_path / "classifier.safetensors")
    small = {"image_size": 28, "patch_size": 7, "num_registers": 32}
    tokenizer = tiny_tokenizer(**small, decode={"num_steps": 1, "guidance_scale": 1.0})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    gpt = tiny_gpt(num_tokens=32, conditioner={"name": "none"})
    remember_tokenizer(gpt, tmp_path / "gpt", tokenizer, str(tmp_path / "tokenizer"))
    gpt.save_pretrained(tmp_path / "gpt")
    arguments = ["gpt", "classifier.safetensors", "--root", "data", "--number", "4"]
    arguments += ["--search", "none", "best-of-16", "beam-64", "--json", "found.json"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["similar_search.py", *arguments, "--picture", "found.png"])
    similar_search.main()
    rows = json.loads((tmp_path / "found.json").read_text("utf-8"))["rows"]
    assert [row["decodes"] for row in rows.values()] == [1, 16, 64]
    for one, best in zip(rows["none"]["seeds"], rows["best-of-16"]["seeds"], strict=True):
        assert best["verifier"] > one["verifier"]
    assert "| best-of-16 | 16 | -" in capsys.readouterr().out
    assert (tmp_path / "found.png").stat().st_size > 1000


def test_every_search_spends_its_budget():
    for name, options in similar_search.SEARCHES.items():
        assert name.endswith(str(options["budget"])) or options["budget"] == 1
        counts = check_budget(
            options["budget"], options.get("beams", 2), 0, len(options["lengths"])
        )
        assert sum(counts) == options["budget"], name
