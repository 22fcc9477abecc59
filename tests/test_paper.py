"""The study of the paper's claims on Fashion-MNIST: its recipes, and a short run of some of them on
files of the same layout."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.files import write_idx
from safetensors.torch import load_file

from flextok.config import load_experiment, save_experiment
from flextok.generators import GENERATORS
from flextok.objectives import make_objective
from flextok.registry import build_model
from flextok.schema import ConfigError
from flextok.tokenizers import TOKENIZERS

sys.path.append(str(Path(__file__).parent.parent / "experiments"))

import paper
from study import score_row


def parameters(study: paper.Study, recipe: str) -> int:
    config = study.config(recipe, 0)
    derived = {}
    if config.task == "generator":
        derived = {"vocab_size": 12800, "num_tokens": max(study.lengths(recipe))}
        if config.model["conditioner"]["name"] == "class":
            derived["conditioner"] = {"name": "class", "num_classes": 10}
    with torch.device("meta"):
        model = build_model({**TOKENIZERS, **GENERATORS}, {**config.model, **derived})
    return sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return paper.Study.load("full", tmp_path_factory.mktemp("paper"), "data")


def test_every_recipe_is_in_a_table_or_needed_by_one(full):
    rows = {recipe for table in full.file.tables for recipe in paper.recipes_of(full.file, table)}
    assert set(paper.with_needed(sorted(rows))) == set(paper.RECIPES)
    for table in full.file.tables.values():
        for row in table["rows"]:
            recipe, _, variant = row.partition(": ")
            assert not variant or variant in full.file.variants[recipe], row


@pytest.mark.parametrize("budget", ["short", "small", "half", "full"])
def test_every_recipe_is_a_checked_config_at_every_budget(budget, tmp_path):
    study = paper.Study.load(budget, tmp_path, "data")
    for recipe in paper.RECIPES:
        assert parameters(study, recipe) > 0
        more = study.measure(study.config(recipe, 1), recipe)
        assert more.data["limit"] == study.budget.images
        assert more.probe["split"] == "train"  # what is measured is not trained on


def test_every_recipe_has_an_objective_that_begins_with_what_it_takes(tmp_path):
    study = paper.Study.load("short", tmp_path, "data")
    for recipe in paper.RECIPES:
        config = study.config(recipe, 0)
        if config.task == "tokenizer":
            needed = paper.taken(load_experiment(paper.RECIPES[recipe]))
            start = {
                key.removeprefix("start."): build_model(TOKENIZERS, study.config(other, 0).model)
                for key, other in needed.items()
            }
            assert config.start.keys() == start.keys()
            make_objective(build_model(TOKENIZERS, config.model), config.objective, start)


def test_what_is_compared_has_equal_parameters_and_samples(full):
    for table in ("reconstruction", "generation"):
        recipes = paper.recipes_of(full.file, table)
        sizes = [parameters(full, recipe) for recipe in recipes]
        assert max(sizes) <= 1.1 * min(sizes), table
    images = {}
    for recipe in (*paper.recipes_of(full.file, "reconstruction"), "near_noise", "flow"):
        chain = [recipe, *full_chain(recipe)]
        configs = [full.config(name, 0) for name in chain]
        images[recipe] = sum(c.trainer.max_steps * c.data.batch_size for c in configs)
    assert set(images.values()) == {9000 * 16}


def full_chain(recipe: str) -> list[str]:
    """The recipes that a run's model was trained by before."""
    return [name for name in paper.with_needed([recipe]) if name != recipe]


def test_comparisons_have_two_seeds(full):
    compared = {*paper.recipes_of(full.file, "reconstruction")}
    compared |= {*paper.recipes_of(full.file, "generation")}
    compared -= {paper.OFF_SCALE, "flextok_once"}  # ablations of what is compared
    assert all(full.seeds(recipe) == [0, 1] for recipe in compared)
    for part, recipes in full.parts().values():
        assert all(part.seeds(recipe) == [0] for recipe in part.budget.once)
        assert set(part.budget.once) <= set(paper.with_needed(recipes))


def test_another_budget_fills_the_tables_that_are_its_own(full, tmp_path):
    parts = full.parts()
    assert list(parts) == ["full", "half"]
    (study, own), (half, ablations) = parts.values()
    assert study is full
    assert {"flextok", "published", "tokens"} <= set(own)
    assert {"tokens", "adamw", "gpt_no_alignment"} <= set(ablations)
    assert "adamw" not in own
    assert len(set(own)) == len(own)
    assert half.folder == full.folder.parent / "half"
    assert half.config("adamw", 0).trainer.max_steps == 2430
    assert full.of("token_ablations").budget == half.budget
    short = paper.Study.load("short", tmp_path, "data")
    ((only, everything),) = short.parts().values()
    assert only is short
    assert set(paper.with_needed(everything)) == set(paper.RECIPES)


def test_the_page_has_each_table_from_its_budget(tmp_path):
    study = paper.Study.load("full", tmp_path, "data", published=True)
    text = paper.write_page(study).read_text("utf-8")
    runs = study.of("token_ablations").results("nested_pow2")
    assert {run["config"]["trainer"]["max_steps"] for run in runs} == {2430}
    label = "pow2, all prefix lengths equally often"
    assert score_row(label, runs, "psnr", study.file.lengths, 2) in text
    assert "| `nested_pow2`, budget `half` | 2.72M | 2430 |" in text
    assert "| `tokens_once` | 2.72M | 5400 |" in text


def test_the_page_counts_images_that_no_length_suffices_for(tmp_path):
    study = paper.Study.load("full", tmp_path, "data", published=True)
    (row,) = [s for s in paper.adaptive_table(study).splitlines() if s.startswith("| images |")]
    counts = [int(cell) for cell in row.split("|")[2:-1]]
    found = study.results(paper.SHOWN)[0]["adaptive"]
    assert len(counts) == len(study.file.lengths) + 1
    assert sum(counts) == found["count"]
    assert sum(counts[:-1]) == found["met"]


def test_tokens_that_a_second_stage_keeps_have_one_row(tmp_path):
    study = paper.Study.load("full", tmp_path, "data", published=True)
    rows, own = paper.labelled_rows(study, "joining"), paper.own_tokens(study)
    first, second = "our first stage alone, decoded once", "our recipe, decoded once"
    assert rows[first][0]["report"]["codes"] == rows[second][0]["report"]["codes"]
    assert second in own
    assert first not in own
    assert "our recipe" in own
    assert not any("in place of two prefixes" in label for label in own)
    assert "decoded once, the encoder not frozen" in own


def test_a_curve_is_of_means_over_the_seeds(tmp_path):
    study = paper.Study.load("full", tmp_path, "data", published=True)
    runs = study.results("titok_32")
    values = [run["report"]["results"][0]["scores"]["psnr"] for run in runs]
    assert values[0] != values[1]
    assert paper.mean_points(runs, "psnr") == [(32, pytest.approx(sum(values) / 2))]


def test_a_recipe_is_measured_by_the_networks_that_its_tables_show(full):
    assert full.networks("published") == ["classifier", "efficientnet_lite0_native"]
    assert full.networks("adamw") == full.networks("tokens_early") == ["classifier"]


def test_the_published_recipe_is_what_was_published(full):
    config = full.config("published", 0)
    plain = full.config("near_noise", 0)
    assert config.model["prediction"] == "velocity"
    assert config.model["drop_mode"] == "mask"
    assert config.model["decode"]["guidance"] == {"name": "apg"}
    assert config.optim.name == "adamw"
    assert config.objective["time_sampler"] == {"name": "mode", "scale": 0.25}
    assert config.objective["repa"]["weight"] == 1.0
    # what is ours: the batch, the number of steps and the encoder's learning rate
    assert replace(config.trainer, max_steps=plain.trainer.max_steps) == plain.trainer
    small = full.config("published_16", 0)
    assert small.model == config.model
    assert small.trainer == plain.trainer
    assert small.data == plain.data


def test_published_results_are_of_the_recipes_as_they_are(tmp_path):
    for folder in (paper.PUBLISHED / "full", paper.PUBLISHED / "half"):
        study = paper.Study.load(folder.name, tmp_path, "data", published=True)
        found = [
            study.result(path.parent.name, int(path.stem.removeprefix("seed-")))
            for path in folder.glob("*/seed-*.json")
        ]
        assert found
        assert all(one["report"]["results"] for one in found)


def test_published_examples_are_of_the_same_images(tmp_path):
    study = paper.Study.load("full", tmp_path, "data", published=True)
    found = {name: paper.find_examples(study, name) for name in paper.COMPARED}
    found = {name: examples for name, examples in found.items() if examples}
    assert len(found) >= 6
    for name, examples in found.items():
        assert list(examples) == [0, *study.lengths(name)]
        assert torch.equal(examples[0], found["titok_32"][0])
        assert (examples[0].amin(), examples[0].amax()) == (-1, 1)
        assert 0.01 < (examples[study.lengths(name)[-1]] - examples[0]).abs().mean() < 0.4
    for name, (_, lengths) in paper.GENERATED.items():
        assert list(paper.find_examples(study, name)) in ([], lengths)


def test_a_published_result_of_another_recipe_is_refused(tmp_path, monkeypatch):
    path = paper.published_file("full", "tokens_once", 0)
    result = json.loads(path.read_text("utf-8"))
    result["config"]["optim"]["lr"] = 0.1
    monkeypatch.setattr(paper, "PUBLISHED", tmp_path / "results")
    changed = paper.published_file("full", "tokens_once", 0)
    changed.parent.mkdir(parents=True)
    changed.write_text(json.dumps(result), "utf-8")
    study = paper.Study.load("full", tmp_path, "data", published=True)
    told = r"seed-0.json is not of recipes/tokens_once.yaml as it is now"
    with pytest.raises(ValueError, match=told):
        study.results("tokens_once")
    # without --page only what was run here counts
    assert paper.Study.load("full", tmp_path, "data").results("tokens_once") == []


def test_a_page_of_nothing_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        paper.main(["--budget", "small", "--page", "--output", str(tmp_path)])
    assert "no results of budget small" in capsys.readouterr().err


def test_unknown_names_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="budget 'huge' must be one of short, small, half, full"):
        paper.Study.load("huge", tmp_path, "data")
    with pytest.raises(SystemExit):
        paper.main(["--budget", "short", "--only", "flextoc"])
    assert "no recipe 'flextoc'; known: adamw, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--jobs", "0"], "--jobs 0 must be at least 1"),
        (["--budget", "tiny"], "budget 'tiny' must be one of short, small, half, full"),
        (["--seeds", "5"], "--seeds 5: budget full has 0, 1"),
        (["--seeds", "-1"], "--seeds -1: budget full has 0, 1"),
        (["--output", __file__], "is a file: name a folder"),
        pytest.param(
            ["--accelerator", "gpu"],
            "PyTorch finds no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_wrong_options_are_refused_before_the_work(tmp_path, monkeypatch, capsys, asked, message):
    monkeypatch.setattr(paper, "train_classifier", lambda *_: pytest.fail("work has begun"))
    with pytest.raises(SystemExit) as error:
        paper.main(["--output", str(tmp_path / "out"), *asked])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def asked_runs(study, monkeypatch, only):
    """What run_parts runs, by budget."""
    found = {}
    monkeypatch.setattr(paper, "train_classifier", lambda *_: {"accuracy": 1.0})
    monkeypatch.setattr(
        paper, "run_all", lambda part, asked, _: found.update({part.folder.name: asked}) or []
    )
    paper.run_parts(study, only, 1)
    return found


@pytest.mark.parametrize(
    ("only", "found"),
    [
        (["flextok"], {"full": ["flextok"]}),
        (["tokens_early"], {"full": ["tokens_early"]}),  # in no table, but a row needs it
        (["adamw"], {"half": ["adamw"]}),
        (["no_prefix_alignment_once"], {"half": ["no_prefix_alignment_once"]}),
        (["tokens", "titok_8"], {"full": ["tokens", "titok_8"], "half": ["tokens"]}),
    ],
)
def test_what_is_asked_for_is_run(full, monkeypatch, only, found):
    """By each budget whose tables need it, and by no other."""
    assert asked_runs(full, monkeypatch, only) == found


def test_a_recipe_that_no_table_needs_is_refused(full, monkeypatch):
    tables = {name: table for name, table in full.file.tables.items() if name == "semantics"}
    study = full._replace(file=replace(full.file, tables=tables))
    with pytest.raises(ConfigError, match="no table of budget full needs recipe 'titok_8'"):
        asked_runs(study, monkeypatch, ["titok_8"])


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A copy of what is published, which may be written to."""
    for name in ("PAGE", "PUBLISHED"):
        monkeypatch.setattr(paper, name, tmp_path / "repository" / getattr(paper, name).name)
    shutil.copytree(paper.HERE / "results", paper.PUBLISHED)
    shutil.copy(Path(paper.__file__).parents[1] / "docs/paper.md", paper.PAGE)
    return tmp_path / "out"


def as_run(output, recipe, seed, **changes):
    """A published result where the run that made it would have put it."""
    text = paper.published_file("full", recipe, seed).read_text("utf-8")
    found = json.loads(text.replace("outputs/paper/full", str(output / "full")))
    place = output / "full" / recipe / f"seed-{seed}/result.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps(found | changes))
    return place


def test_a_result_of_another_recipe_is_told_before_the_work(published, monkeypatch):
    """Also one that is not asked for: the page would have failed at it."""
    monkeypatch.setattr(paper, "train_classifier", lambda *_: pytest.fail("work has begun"))
    place = as_run(published, "titok_8", 1)
    found = json.loads(place.read_text())
    found["config"]["optim"]["lr"] = 0.1
    place.write_text(json.dumps(found))
    study = paper.Study.load("full", published, "data")._replace(chosen=[0])
    with pytest.raises(ConfigError, match=r"is not of recipes/titok_8.yaml as it is now"):
        paper.run_parts(study, ["flow"], 1)


@pytest.mark.parametrize("options", [["--page"], ["--only", "titok_8"], ["--page", "--seeds", "0"]])
def test_publishing_a_run_keeps_all_the_others(published, monkeypatch, options):
    """By --only the page had lost all other rows, and by --seeds the other seeds."""
    monkeypatch.setattr(paper, "run_parts", lambda *_: None)
    before = {path: path.read_bytes() for path in paper.PUBLISHED.rglob("*.json")}
    page = paper.PAGE.read_text("utf-8")
    as_run(published, "titok_8", 1)
    shutil.copy(paper.PUBLISHED / "full/classifier.safetensors", published / "full")
    paper.main([*options, "--publish", "--output", str(published)])
    assert paper.PAGE.read_text("utf-8") == page
    assert {path: path.read_bytes() for path in paper.PUBLISHED.rglob("*.json")} == before
    assert (paper.PAGE.parent / "pictures/paper/curves.png").stat().st_size > 1000


def test_a_study_that_was_run_again_is_compared_with_what_is_published(
    published, monkeypatch, capsys
):
    monkeypatch.setattr(paper, "run_parts", lambda *_: None)
    place = as_run(published, "titok_8", 1)
    shutil.copy(paper.PUBLISHED / "full/classifier.safetensors", published / "full")
    command = ["--only", "titok_8", "--seeds", "1", "--output", str(published)]
    paper.main(command)
    assert "two standard deviations" not in capsys.readouterr().out  # the same
    found = json.loads(place.read_text())
    found["report"]["results"][0]["scores"]["psnr"] += 5
    place.write_text(json.dumps(found))
    paper.main([*command, "--publish"])
    shown = paper.Study.load("full", published, "data").file.tables["reconstruction"]["scores"]
    assert f"Of {len(shown)} numbers of the tables, {len(shown) - 1} (" in capsys.readouterr().out
    others = (published / "full/compared.md").read_text("utf-8").partition("The others:")[2]
    (line,) = (line for line in others.splitlines() if "titok_8" in line)
    assert line.startswith("| full, titok_8 | Faithful: PSNR (dB), higher is better | 8 | ")
    # that is published now, and no comparison with another recipe's
    paper.main(command)
    assert "two standard deviations" not in capsys.readouterr().out
    path = paper.published_file("full", "titok_8", 1)
    path.write_text(path.read_text("utf-8").replace('"max_steps": 9000', '"max_steps": 8000'))
    found["report"]["results"][0]["scores"]["psnr"] += 5
    place.write_text(json.dumps(found))
    paper.main(command)
    assert "two standard deviations" not in capsys.readouterr().out


def test_a_whole_study_takes_the_place_of_what_is_published(published, monkeypatch, capsys):
    """Second seeds that were published, measured with another classifier than the one that the run
    trained, had been an error after all of the work."""
    monkeypatch.setattr(paper, "run_parts", lambda *_: None)
    place = as_run(published, "titok_8", 0)
    (published / "full/classifier.safetensors").write_bytes(b"another")
    (published / "full/classifier.json").write_text('{"steps": 1, "accuracy": 0.5, "seed": 0}')
    found = json.loads(place.read_text())
    used = found["report"]["settings"]["networks"]["classifier"]
    used["weights"] = paper.file_hash(published / "full/classifier.safetensors")
    place.write_text(json.dumps(found))
    for added in (["--only", "titok_8"], ["--seeds", "0"]):  # before the work
        with pytest.raises(SystemExit):
            paper.main([*added, "--publish", "--output", str(published)])
        assert "no page takes rows of two" in capsys.readouterr().err
    paper.main(["--publish", "--output", str(published)])
    assert [path.parent.name for path in paper.PUBLISHED.glob("full/*/seed-*")] == ["titok_8"]
    assert not list(paper.PUBLISHED.glob("half/*/seed-*"))
    assert (paper.PUBLISHED / "full/classifier.safetensors").read_bytes() == b"another"
    page = paper.PAGE.read_text("utf-8")
    assert "| TiTok, 8 tokens | 1 |" in page
    assert "| TiTok, 16 tokens |" not in page
    paper.main(["--page", "--publish", "--output", str(published / "elsewhere")])
    assert paper.PAGE.read_text("utf-8") == page


def test_runs_that_are_added_begin_with_the_published_classifier(published, monkeypatch):
    monkeypatch.setattr(paper, "run_parts", lambda *_: None)
    paper.main(["--only", "titok_8", "--publish", "--output", str(published)])
    for budget in ("full", "half"):
        for name in ("classifier.safetensors", "classifier.json"):
            stored = paper.PUBLISHED / budget / name
            assert (published / budget / name).read_bytes() == stored.read_bytes()


@pytest.mark.parametrize("budget", ["full", "half"])
def test_runs_that_are_added_are_refused_beside_another_classifier(published, capsys, budget):
    (published / budget).mkdir(parents=True)
    (published / budget / "classifier.safetensors").write_bytes(b"another")
    with pytest.raises(SystemExit):
        paper.main(["--only", "tokens", "--publish", "--output", str(published)])
    assert f"{budget}/classifier.safetensors is another classifier" in capsys.readouterr().err


def test_a_budget_that_was_never_published_gets_a_folder(published):
    place = published / "short/classifier.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps({"steps": 20, "accuracy": 0.5, "seed": 0}))
    paper.main(["--budget", "short", "--page", "--publish", "--output", str(published)])
    assert (paper.PUBLISHED / "short/classifier.json").read_text() == place.read_text()


def test_a_page_that_lost_a_table_is_left_alone(published, capsys):
    half = paper.PAGE.read_text("utf-8").partition("<!-- table: guidance -->")[0]
    paper.PAGE.write_text(half, "utf-8")
    with pytest.raises(SystemExit):
        paper.main(["--page", "--publish", "--output", str(published)])
    assert "paper.md has no place for the table " in capsys.readouterr().err
    assert paper.PAGE.read_text("utf-8") == half


def test_results_of_different_classifiers_are_not_mixed(published, capsys):
    as_run(published, "titok_8", 0)
    (published / "full/classifier.safetensors").write_bytes(b"another")
    with pytest.raises(SystemExit):
        paper.main(["--page", "--publish", "--output", str(published)])
    assert "was measured with another classifier than" in capsys.readouterr().err
    kept = paper.HERE / "results/full/classifier.safetensors"
    assert (paper.PUBLISHED / "full/classifier.safetensors").read_bytes() == kept.read_bytes()


def test_a_model_that_goes_on_from_another_one_is_refused(published):
    as_run(published, "tokens_once", 0)
    first = paper.Study.load("full", published, "data").result("tokens_once", 0)
    made_from = paper.model_hash(first)
    place = as_run(published, "flextok_once", 0, taken={"tokens_once": made_from})
    assert paper.Study.load("full", published, "data").result("flextok_once", 0)
    place.write_text(place.read_text().replace(made_from, "0123456789abcdef"))
    study = paper.Study.load("full", published, "data")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"goes on from another tokens_once .* remove .*-0,"):
            study.result("flextok_once", 0)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"config": 3}', '{"config": {}}'])
def test_a_damaged_result_is_made_again_or_named(published, text):
    place = as_run(published, "titok_8", 0)
    place.write_text(text)
    assert paper.Study.load("full", published, "data").result("titok_8", 0) == {}
    path = paper.published_file("full", "titok_16", 0)
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"titok_16/seed-0.json is damaged .* `git checkout`"):
        paper.Study.load("full", published, "data", published=True).result("titok_16", 0)
    example = paper.published_file("full", "titok_32", 0).with_suffix(".png")
    example.write_bytes(example.read_bytes()[:300])
    study = paper.Study.load("full", published, "data", published=True)
    with pytest.raises(ConfigError, match=r"titok_32/seed-0.png is damaged .* remove it"):
        paper.find_examples(study, "titok_32")


@pytest.mark.parametrize("damage", ["classifier.json", "classifier.safetensors"])
def test_a_damaged_classifier_is_trained_again(tmp_path, damage, caplog):
    write_idx(tmp_path / "data", {"train": 64, "test": 20}, packed=True)
    arguments = (str(tmp_path / "data"), 2, tmp_path / "out")
    torch.set_num_threads(1)
    facts = paper.train_classifier(*arguments)
    weights = (tmp_path / "out/classifier.safetensors").read_bytes()
    path = tmp_path / "out" / damage
    for content in (b"", b"{", b"[]", path.read_bytes()[:20]):
        path.write_bytes(content)
        caplog.clear()
        assert paper.train_classifier(*arguments) == facts
        assert "damaged" in caplog.text
        assert (tmp_path / "out/classifier.safetensors").read_bytes() == weights


def started(tmp_path, text, *arguments):
    """A process that runs this with the study's modules at hand."""
    script = tmp_path / "parent.py"
    script.write_text(text)
    folders = [str(Path(paper.__file__).parent), *sys.path]
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
    )


@pytest.mark.parametrize("told", ["ValueError: this one fails", "KeyboardInterrupt"])
def test_a_failing_run_and_an_interrupt_end_the_others(tmp_path, told):
    """Also an interrupt that the parent alone gets: the runs went on for as long as they took."""
    text = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "import paper\n"
        "begun = Path(sys.argv[1])\n"
        "def run(study, recipe, seed):\n"
        "    if recipe == 'titok_16':\n"
        "        begun.touch()\n"
        "        time.sleep(600)\n"
        "    while not begun.exists():\n"
        "        time.sleep(0.05)\n"
        "    if sys.argv[2] == 'KeyboardInterrupt':\n"
        "        os.kill(os.getppid(), signal.SIGINT)\n"
        "        time.sleep(600)\n"
        "    raise ValueError('this one fails')\n"
        "paper.run = run\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    study = paper.Study.load('short', begun.parent, 'data')\n"
        "    list(paper.run_all(study, ['titok_8', 'titok_16'], 2))\n"
    )
    with started(tmp_path, text, tmp_path / "begun", told) as parent:
        _, errors = parent.communicate(timeout=120)
    assert parent.returncode != 0
    assert told in errors


def test_runs_end_with_the_process_that_started_them(tmp_path):
    """Also where it is killed: a run that stays would take a core, and write to its folder."""
    text = (
        "import os, sys, time\n"
        "from multiprocessing import get_context\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from paper import end_with_parent\n"
        "if __name__ == '__main__':\n"
        "    spawn = get_context('spawn')\n"
        "    pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=end_with_parent)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 600)\n"
        "    time.sleep(600)\n"
    )
    with started(tmp_path, text) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(child, 0)  # it is there
        parent.kill()
    for _ in range(300):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail(f"process {child} is still there")


@pytest.mark.parametrize("fast", [True, False])
def test_a_cpu_trains_in_bf16_where_it_multiplies_that_fast(tmp_path, monkeypatch, fast):
    monkeypatch.setattr("flextok.training.trainer.multiplies_bf16", lambda device: fast)
    study = paper.Study.load("full", tmp_path, "data", published=True)
    asked = "bf16-mixed" if fast else "32-true"
    assert study.config("tokens", 0).trainer.precision == asked
    on_gpu = paper.Study.load("full", tmp_path, "data", accelerator="gpu")
    assert on_gpu.config("tokens", 0).trainer.precision == "32-true"  # which CUDA graphs need
    # a result counts whatever it was trained in
    result = study.result("tokens", 0)
    assert result
    for precision in ("bf16-mixed", "32-true"):
        result["config"]["trainer"]["precision"] = precision
        place = study.place("tokens", 0)
        place.mkdir(parents=True, exist_ok=True)
        (place / "result.json").write_text(json.dumps(result))
        assert study._replace(known={}).result("tokens", 0)["config"] == result["config"]


@pytest.mark.parametrize("fast", [True, False])
def test_a_run_ends_in_the_precision_that_it_began_in(tmp_path, monkeypatch, fast):
    monkeypatch.setattr("flextok.training.trainer.multiplies_bf16", lambda device: fast)
    begun = "32-true" if fast else "bf16-mixed"
    study = paper.Study.load("short", tmp_path, "data")
    config = study._replace(precision=begun).config("tokens", 0)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True)
    save_experiment(config, folder / "config.yaml")
    asked = []

    def train(config, *more):
        asked.append(config.trainer.precision)
        return {}

    monkeypatch.setattr(paper, "train_and_measure", train)
    monkeypatch.setattr(paper, "draw_examples", lambda *run: None)
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    monkeypatch.setitem(paper.EVALUATORS, "classifier", None)
    paper.run(study, "tokens", 0)
    paper.run(study, "titok_8", 0)
    assert asked == [begun, "bf16-mixed" if fast else "32-true"]


@pytest.mark.slow
def test_a_short_run_trains_measures_and_writes_the_page(tmp_path, capsys, monkeypatch):
    data, output = tmp_path / "data", tmp_path / "out"
    write_idx(data, {"train": 128, "test": 40}, packed=True)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ["--budget", "short", "--root", str(data), "--output", str(output)]
    asked = ["flextok", "flextok_once", "near_noise", "titok_8", "gpt_class"]
    paper.main([*command, "--only", *asked])
    runs = set(paper.with_needed(asked))
    folder = output / "short"
    results = {n: json.loads((folder / n / "seed-0/result.json").read_text()) for n in runs}
    # the twin's classes are plain to see, and the classifier sees them
    assert json.loads((folder / "classifier.json").read_text())["accuracy"] > 0.5
    # tokens first: what comes after it leaves the encoder as it is, and the codes with it
    weights = {n: load_file(folder / n / "seed-0/model.safetensors") for n in runs - {"gpt_class"}}
    stages = {"flextok": "tokens", "flextok_once": "tokens_once"}
    for name, start in stages.items():
        for key, value in weights[start].items():
            frozen = not key.startswith("decoder.")
            assert torch.equal(weights[name][key], value) or not frozen, (name, key)
        assert results[name]["report"]["codes"] == results[start]["report"]["codes"]
    head = "decoder.head.weight"
    assert not torch.equal(weights["flextok"][head], weights["tokens"][head])
    assert [r["num_tokens"] for r in results["titok_8"]["report"]["results"]] == [8]
    for name in {*stages, *stages.values()}:
        rows = results[name]["report"]["results"]
        assert [row["num_tokens"] for row in rows] == [1, 2, 4, 8, 16, 32]
        assert all(0 <= row["faithful"]["class_kept"] <= 1 for row in rows)
        counts = results[name]["adaptive"]["images_by_tokens"].values()
        assert sum(counts) == 30
    assert set(results["gpt_class"]["variants"]) == {"guidance 1.5", "guidance 2", "guidance 3"}
    # the page has their numbers, and says of the others that they were not run
    page = (folder / "paper.md").read_text("utf-8")
    row = results["flextok"]["report"]["results"][5]["scores"]
    begin, end = "| our recipe | 1 |", f" {row['psnr']:.2f} |"
    (line,) = {s for s in page.splitlines() if s.startswith(begin) and s.endswith(end)}
    assert line.count("|") == 9
    assert "; flow alone; both times mixed" in page
    strips = (f"strips_{paper.SHOWN}", "strips_near_noise")
    for figure in ("curves", "ways", "first_token", "tokenizers", "generated", *strips):
        assert (folder / f"pictures/paper/{figure}.png").stat().st_size > 1000
    # what the figures show is kept beside the results, so that machines may share the work
    study = paper.Study.load("short", output, str(data))
    model, made = paper.load(folder / "titok_8/seed-0"), paper.find_examples(study, "titok_8")
    assert list(made) == [0, 8]
    images, _ = paper.measured_images(study)
    for image in made[0]:
        assert ((images - image).abs().amax((1, 2, 3)) < 1 / 127).sum() == 1
    again = paper.reconstruct_prefixes(model, made[0], [8])[8].clamp(-1, 1)
    assert (again - made[8]).abs().mean() < 0.02
    assert list(paper.find_examples(study, "gpt_class")) == [1, 2, 8, 32]
    assert not paper.find_examples(study, "titok_16")
    # what is done is kept
    before = {name: (folder / name / "seed-0/result.json").stat().st_mtime_ns for name in runs}
    capsys.readouterr()
    paper.main([*command, "--only", *asked])
    assert "== short, gpt_class, seed 0: done" in capsys.readouterr().out
    after = {name: (folder / name / "seed-0/result.json").stat().st_mtime_ns for name in runs}
    assert after == before
    assert (folder / "paper.md").read_text("utf-8") == page
    # published, it makes the same page where nothing was run, and names no folder of this machine
    monkeypatch.setattr(paper, "PUBLISHED", tmp_path / "results")
    paper.main([*command, "--page", "--publish"])
    other = tmp_path / "other"
    paper.main(["--budget", "short", "--page", "--output", str(other)])
    assert (other / "short/paper.md").read_text("utf-8") == page
    results = sorted((tmp_path / "results").glob("short/*/seed-0.json"))
    assert [path.parent.name for path in results] == sorted(runs)
    for path in results:
        assert str(tmp_path) not in path.read_text("utf-8")
