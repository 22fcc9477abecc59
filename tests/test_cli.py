import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.files import draw_pictures, write_shard
from helpers.models import tiny_gpt, tiny_tokenizer
from PIL import Image

from flextok import viz
from flextok.cli import main, make_parser
from flextok.config import load_experiment, save_experiment
from flextok.pipeline import load, remember_tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture
def models(tmp_path):
    tokenizer, gpt = tiny_tokenizer(), tiny_gpt()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    gpt.metadata["class_names"] = ["cats", "dogs", "cows", "hens", "bees"]
    remember_tokenizer(gpt, tmp_path / "gpt", tokenizer, str(tmp_path / "tokenizer"))
    gpt.save_pretrained(tmp_path / "gpt")
    encoder = {"name": "bytes", "dim": 16, "depth": 1, "num_heads": 2, "max_length": 24}
    text = tiny_gpt(conditioner={"name": "text", "encoder": encoder})
    remember_tokenizer(text, tmp_path / "text", tokenizer, str(tmp_path / "tokenizer"))
    text.save_pretrained(tmp_path / "text")
    return tmp_path


def sample(models, *arguments) -> tuple[int, Path]:
    output = models / "out" / "grid.png"
    return main(["sample", *map(str, arguments), "--output", str(output)]), output


def test_reconstruct_named_pictures(models, picture_folder, capsys):
    one = picture_folder / "cats" / "0.png"
    code, output = sample(
        models,
        models / "tokenizer",
        "--images",
        one,
        picture_folder / "dogs",
        "--num-tokens",
        1,
        8,
        "--steps",
        1,
    )
    assert code == 0
    assert str(output) in capsys.readouterr().out
    wide = Image.open(output)
    code, _ = sample(models, models / "tokenizer", "--images", one, "--num-tokens", 1, "--steps", 1)
    small = Image.open(output)
    assert wide.height > 3 * small.height  # four rows against one
    assert wide.width > small.width


def test_the_same_seed_draws_the_same_picture(models):
    def draw(seed):
        _, output = sample(
            models,
            models / "tokenizer",
            "--data",
            "emoji:validation",
            "--limit",
            2,
            "--steps",
            2,
            "--seed",
            seed,
        )
        return output.read_bytes()

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_generate_by_class(models):
    code, output = sample(
        models,
        models / "gpt",
        "--classes",
        "dogs",
        4,
        "none",
        "--num-samples",
        2,
        "--steps",
        1,
        "--num-tokens",
        1,
        4,
        "--temperature",
        0.8,
        "--top-k",
        20,
        "--class-guidance",
        2,
    )
    assert code == 0
    assert Image.open(output).height > 6 * 128


def test_generate_by_prompt_writes_the_strip_and_the_pictures(models, caplog):
    few = ["--num-tokens", 1, 4, "--steps", 1]
    prompts = ["--prompt", "a red heart", "x" * 30, "--num-samples", 2]
    code, output = sample(models, models / "text", *prompts, *few)
    assert code == 0
    assert "1 of 2 prompts are longer than max_length=24 tokens and are cut" in caplog.text
    assert Image.open(output).height > 4 * 128
    pictures = [Image.open(output.with_name(f"grid-{i}.png")) for i in (1, 2, 3, 4)]
    assert {picture.size for picture in pictures} == {(16, 16)}
    assert len({picture.tobytes() for picture in pictures}) == 4  # samples, not copies


def test_prompts_come_from_a_file_or_a_data_set(models):
    few = ["--num-tokens", 1, "--steps", 1]
    (models / "prompts.txt").write_text("\ufeffa whale\n\n  a key \n", encoding="utf-8")
    code, output = sample(models, models / "text", "--prompts-file", models / "prompts.txt", *few)
    assert code == 0
    assert len(list(output.parent.glob("grid-*.png"))) == 2
    two = Image.open(output).height
    scenes = "{name: emoji_scenes, max_objects: 1, vocabulary: basic, prompts: held_out}"
    code, _ = sample(models, models / "text", "--data", scenes, "--limit", 1, *few)
    assert code == 0
    assert Image.open(output).height < two


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("text", ["--prompts-file", "EMPTY"], "is empty: write one prompt a line"),
        ("text", ["--prompts-file", "nowhere.txt"], "no such file"),
        ("text", ["--prompts-file", "BINARY"], "is not UTF-8 text"),
        ("text", [], "generates from prompts: name one of --prompt, --prompts-file, --data"),
        ("text", ["--prompt", "a", "--data", "emoji"], "name one of --prompt, --prompts-file"),
        ("text", ["--classes", "1"], "generates from prompts: it takes --prompt or"),
        ("text", ["--prompt", "a", "--num-samples", "0"], "num_samples=0 must be"),
        ("text", ["--prompt", "a", "--num-tokens", "64"], "--num-tokens 64 must be in [1, 8]"),
        ("text", ["--data", "{name: emoji_scenes, prompt: x}"], "unknown key 'prompt'"),
        ("text", ["--data", "{name: [}"], "is no mapping"),
        ("gpt", ["--prompt", "a heart"], "by class: it takes --classes, not --prompt"),
        ("tokenizer", ["--prompt", "a heart"], "it takes --images or --data, not --prompt"),
    ],
)
def test_mistakes_with_prompts_are_told_in_one_line(models, capsys, model, arguments, message):
    (models / "empty.txt").write_text(" \n\n")
    (models / "binary.txt").write_bytes(b"\xff\xfa\x00heart")
    places = {"EMPTY": models / "empty.txt", "BINARY": models / "binary.txt"}
    code, _ = sample(models, models / model, *(places.get(a, a) for a in arguments))
    error = capsys.readouterr().err.strip()
    assert code == 1
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("asked", "rows", "columns"),
    [
        ([], 8, 10),  # eight held-out emoji at 1, 2, 4, ... 256 tokens, and themselves
        (["--data", "emoji", "--limit", 2], 2, 10),
        (["--classes"], 16, 7),
        (["--classes", "heart", "none"], 2, 7),
        (["--prompt", "a red heart"], 1, 7),
    ],
)
def test_without_a_model_those_of_the_package_serve(releases, tmp_path, asked, rows, columns):
    code, output = sample(tmp_path, *asked)
    assert code == 0
    width, height = Image.open(output).size
    assert height // (128 + viz.GAP) == rows
    assert width // (128 + viz.GAP) in (columns, columns + 1)  # and labels


def test_info_and_reconstruct_need_no_model_either(releases, picture_folder, tmp_path, capsys):
    assert main(["info"]) == 0
    assert "tokens" in capsys.readouterr().out
    picture = str(picture_folder / "cats" / "0.png")
    assert main(["reconstruct", picture, "--output", str(tmp_path / "out.png")]) == 0
    assert main(["info", "not_there"]) == 1
    names = "emoji, emoji-class, emoji-few-step, emoji-one-step, emoji-text"
    assert names in capsys.readouterr().err


def test_align_prints_both_scores_and_writes_json(models, capsys):
    scenes = "{name: emoji_scenes, max_objects: 2, vocabulary: basic, prompts: held_out}"
    report, probe = models / "report" / "align.json", models / "report" / "probe.safetensors"
    tokenizer = tiny_tokenizer(image_size=32, patch_size=8)
    tokenizer.save_pretrained(models / "larger")
    gpt = load(models / "text")
    remember_tokenizer(gpt, models / "text", tokenizer, str(models / "larger"))
    gpt.save_pretrained(models / "text")
    command = ["align", str(models / "text"), "--data", scenes, "--limit", "8", "--steps", "1"]
    command += ["--num-tokens", "1", "8", "--probe-steps", "3", "--probe", str(probe)]
    assert main([*command, "--json", str(report)]) == 0
    assert "score (shuffled prompts)" in capsys.readouterr().out
    content = json.loads(report.read_text())
    assert [r["num_tokens"] for r in content["results"]] == [1, 8]
    assert all({"score", "shuffled", "by_count"} <= set(r) for r in content["results"])
    written = probe.stat().st_mtime_ns
    assert main(command) == 0  # takes the probe that is there
    assert probe.stat().st_mtime_ns == written
    capsys.readouterr()
    for model, data, message in [
        ("text", "emoji", "must be emoji_scenes"),
        ("larger", scenes, "not a generator"),
        ("text", "{name: emoji_scenes}", "trained for other scenes"),
    ]:
        code = main(["align", str(models / model), "--data", data, "--probe", str(probe)])
        assert code == 1
        assert message in capsys.readouterr().err


def test_bad_pictures_are_skipped_and_counted(models, picture_folder, caplog, capsys):
    broken = picture_folder / "broken.png"
    broken.write_bytes(b"nothing")
    good = picture_folder / "cats" / "0.png"
    code, output = sample(
        models,
        models / "tokenizer",
        "--images",
        broken,
        picture_folder / "gone.png",
        good,
        "--steps",
        1,
    )
    assert code == 1  # the third is done, but who asked for three must know
    assert output.is_file()
    assert "2 of 3 images could not be read" in capsys.readouterr().err
    assert "2 so far" in caplog.text
    assert "gone.png" in caplog.text
    code, _ = sample(models, models / "tokenizer", "--images", broken)
    assert code == 1
    assert "none of the images could be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("tokenizer", ["--images", "x.png", "--data", "emoji"], "name one of"),
        ("tokenizer", ["--data", "nowhere"], "neither a folder nor"),
        ("tokenizer", ["--data", __file__], "is a file: name the folder that it is in"),
        ("tokenizer", ["--data", "emoji:test"], "split='test'"),
        (
            "tokenizer",
            ["--data", "emoji", "--num-tokens", "9"],
            r"--num-tokens 9 must be in [1, 8]",
        ),
        ("tokenizer", ["--data", "emoji", "--limit", "0"], "limit=0 must be at least 1"),
        ("tokenizer", ["--data", "emoji", "--classes", "1"], "not --classes"),
        ("tokenizer", ["--data", "emoji", "--device", "abacus"], "--device abacus"),
        ("gpt", ["--classes", "unicorns"], "unknown class 'unicorns'; known: cats, dogs"),
        ("gpt", ["--classes", "5"], "unknown class '5'"),
        ("gpt", ["--images", "x.png"], "it takes --classes, not --images"),
        ("gpt", ["--num-samples", "0"], "num_samples=0 must be"),
        ("nothing/there/at/all", [], "no model at"),
    ],
)
def test_mistakes_are_told_in_one_line(models, capsys, model, arguments, message):
    code, _ = sample(models, models / model, *arguments)
    error = capsys.readouterr().err.strip()
    assert code == 1
    assert message in error
    assert "Traceback" not in error


def test_sweep_prints_a_table_and_writes_json(models, picture_folder, capsys):
    report = models / "report" / "psnr.json"
    code = main(
        [
            "sweep",
            str(models / "tokenizer"),
            "--data",
            str(picture_folder),
            "--steps",
            "1",
            "--num-tokens",
            "1",
            "4",
            "--json",
            str(report),
            "--batch-size",
            "4",
        ]
    )
    assert code == 0
    assert "PSNR" in capsys.readouterr().out
    results = json.loads(report.read_text())["results"]
    assert [(r["num_tokens"], r["count"]) for r in results] == [(1, 6), (4, 6)]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_the_scripts_explain_themselves(script):
    done = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "usage" in done.stdout


def test_every_command_that_finds_something_out_writes_it_as_json():
    """--json FILE.json was on some commands and missing on their sisters."""
    (commands,) = (a.choices for a in make_parser()._actions if isinstance(a.choices, dict))
    without = {
        name
        for name, command in commands.items()
        if not any("--json" in action.option_strings for action in command._actions)
    }
    assert without == {"train", "demo"}  # a run tells its scores in its folder, and a page serves


def test_index_and_convert_write_json(tmp_path, capsys):
    shard = write_shard(tmp_path / "a.tar", {"0.png": b"x", "0.cls": b"0"})
    facts = tmp_path / "facts.json"
    assert main(["index", shard, str(tmp_path / "index.json"), "--json", str(facts)]) == 0
    assert json.loads(facts.read_text())["samples"] == 1
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    arguments = [str(tmp_path / "model"), str(tmp_path / "out"), "--json", str(facts)]
    assert main(["convert", *arguments]) == 0
    assert json.loads(facts.read_text())["num_tokens"] == 8
    capsys.readouterr()
    assert main(["info", str(tmp_path / "model"), "--json", str(facts)]) == 0
    assert json.loads(facts.read_text())["model_type"] == "flextok"


@pytest.mark.parametrize("output", ["b.tar", "index.txt"])
def test_an_index_never_replaces_a_shard(tmp_path, capsys, output):
    """`flextok index shard-*.tar` took the last shard for the file to write."""
    shards = [write_shard(tmp_path / n, {"0.png": b"x", "0.cls": b"0"}) for n in ("a.tar", "b.tar")]
    before = [Path(shard).read_bytes() for shard in shards]
    assert main(["index", *shards[:1], str(tmp_path / output)]) == 1
    assert "name a file that ends in .json" in capsys.readouterr().err
    assert [Path(shard).read_bytes() for shard in shards] == before
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "b.tar"}
    assert main(["index", *shards, "-"]) == 0
    assert len(json.loads(capsys.readouterr().out)["shardlist"]) == 2


@pytest.mark.parametrize("to", ["published", "diffusers", "flextok"])
def test_a_model_in_another_layout_is_not_written_over(tmp_path, capsys, to):
    """Its weights were replaced under its config, or its config beside its weights."""
    if to == "diffusers":
        pytest.importorskip("diffusers")
    vae = {"name": "kl", "channels": 4, "block_channels": [32], "layers_per_block": 1}
    model = tiny_tokenizer(vae=vae)
    model.save_pretrained(tmp_path / "model")
    there = tmp_path / "there"
    if to == "flextok":
        there.mkdir()
        (there / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
        (there / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    else:
        model.save_pretrained(there)
    before = {path.name: path.read_bytes() for path in there.iterdir()}
    assert main(["convert", str(tmp_path / "model"), str(there), "--to", to]) == 1
    message = capsys.readouterr().err
    assert f"{there} holds a model" in message
    assert "name another folder" in message
    assert {path.name: path.read_bytes() for path in there.iterdir()} == before
    for _ in range(2):  # again over the same layout
        assert main(["convert", str(tmp_path / "model"), str(tmp_path / "new"), "--to", to]) == 0
    assert load(tmp_path / "new").config.num_registers == 8


def test_a_generator_is_not_measured_as_a_tokenizer(tmp_path, capsys):
    tiny_gpt().save_pretrained(tmp_path / "gpt")
    data = ["--data", "emoji:validation", "--limit", "6"]
    out = ["--output", str(tmp_path / "out")]
    for command in (["sweep"], ["adaptive", "--target", "psnr=18"], ["probe", "--train", "emoji"]):
        name, *more = command
        assert main([name, str(tmp_path / "gpt"), *more, *data, *out]) == 1
        assert f"{tmp_path / 'gpt'} is a generator: name a tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["--labels balanced", "--num-samples 9", "--tokenizer emoji"])
def test_options_of_a_generator_are_refused_for_a_tokenizer(tmp_path, capsys, given):
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    option = given.split()[0]
    arguments = [str(tmp_path / "model"), "emoji:validation", "--limit", "6", *given.split()]
    assert main(["evaluate", *arguments, "--output", str(tmp_path / "out")]) == 1
    assert f"is a tokenizer: leave {option} out" in capsys.readouterr().err
    assert not (tmp_path / "out" / "report.json").exists()


OUTPUTS = [
    *(("evaluate", "x", "emoji:validation", option) for option in ("--output", "--json")),
    ("evaluate", "x", "emoji:validation", "--save-reference"),
    *(("sweep", "x", option) for option in ("--output", "--json")),
    *(("adaptive", "x", "--target", "psnr=9", option) for option in ("--output", "--json")),
    *(("probe", "x", option) for option in ("--output", "--json")),
    *(("align", "x", option) for option in ("--probe", "--json")),
    *(("search", "x", "--prompt", "a", o) for o in ("--output", "--probe", "--json")),
    *(("sample", "x", option) for option in ("--output", "--json")),
    *(("reconstruct", "file", "--model", "x", option) for option in ("--output", "--json")),
    ("convert", "x"),
]
ENDINGS = {"--json": ".json", "--save-reference": ".npz"}


@pytest.mark.parametrize("fault", ["in a file", "other kind", "locked"])
@pytest.mark.parametrize("command", OUTPUTS, ids=lambda command: f"{command[0]} {command[-1]}")
def test_what_cannot_be_written_is_found_before_the_work(
    tmp_path, monkeypatch, capsys, command, fault
):
    """It was found after it, and the error was an errno."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")

    def load(*arguments, **options):
        pytest.fail("a model was loaded")

    for place in ("common.load_token_model", "measure.load_token_model", "sample.load_token_model",
                  "search.load_token_model", "models.load"):  # fmt: skip
        monkeypatch.setattr(f"flextok.cli.{place}", load)
    ending = ENDINGS.get(command[-1], ".png" if command[0] == "sample" else "")
    if fault == "in a file":
        target = f"file/sub/x{ending}"
        said = f"{target} cannot be written: {tmp_path / 'file'} is no folder"
    elif fault == "locked":
        access, locked = os.access, tmp_path / "locked"
        locked.mkdir()
        monkeypatch.setattr(
            "os.access", lambda path, mode, **how: path != locked and access(path, mode, **how)
        )
        target = f"locked/sub/x{ending}"
        said = f"{target} cannot be written: you may not write in {locked}"
    elif ending or command[-1] == "--probe":
        target = f"folder{ending}"
        Path(target).mkdir()
        said = f"{target} is a folder: name a file"
    else:
        target = "file"
        said = "file is a file: name a folder"
    assert main([*command, target]) == 1
    assert said in capsys.readouterr().err
    assert Path("file").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "locked", f"folder{ending}"}


def test_one_scene_is_too_few_to_align_and_that_is_said_at_once(monkeypatch, capsys):
    """It ran to its end, printed an error of nan and had no JSON."""
    monkeypatch.setattr("flextok.cli.measure.load_token_model", lambda *_: pytest.fail("loaded"))
    assert main(["align", "x", "--limit", "1"]) == 1
    assert "1 scene has no other one's prompt as control" in capsys.readouterr().err


def test_a_library_that_cannot_be_imported_is_named(monkeypatch):
    """Any ImportError of a command's module became an AttributeError of flextok.cli."""
    monkeypatch.setitem(sys.modules, "flextok.tree_search", None)
    monkeypatch.delitem(sys.modules, "flextok.cli.search", raising=False)
    monkeypatch.delattr("flextok.cli.search", raising=False)
    with pytest.raises(ImportError, match=r"flextok\.tree_search"):
        main(["search", "emoji-text", "--prompt", "x"])


def test_the_data_of_a_model_that_lie_elsewhere_are_asked_for(tmp_path, monkeypatch, capsys):
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    config = load_experiment(ROOT / "configs" / "quickstart_tokenizer.yaml")
    config.data.validation = {"name": "folder", "root": "mine"}
    save_experiment(config, tmp_path / "model" / "config.yaml")
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "model", "--output", "grid.png"]) == 1
    assert "root='mine' is not a folder" in (said := capsys.readouterr().err)
    assert "name them with --data" in said


def test_an_index_is_refused_before_a_shard_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("flextok.cli.training.write_index", lambda *_: pytest.fail("read"))
    (tmp_path / "a.json").mkdir()
    for output, *more in ([str(tmp_path / "a.json")], ["-", "--json"]):
        assert main(["index", "a.tar", output, *more]) == 1
        told = capsys.readouterr().err
        assert "is a folder: name a file" in told or "takes the index or --json" in told


def test_a_cache_of_nothing_is_no_success(models, tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"nothing")
    command = ["tokenize", str(models / "tokenizer"), str(tmp_path / "broken")]
    assert main([*command, str(tmp_path / "codes")]) == 1
    assert "no image of" in capsys.readouterr().err


@pytest.mark.parametrize("mark", ["checkpoints", "starts"])
def test_a_trainings_model_is_not_replaced(models, capsys, mark):
    """adaptive --train wrote its tokenizer where `train` has put the generator's."""
    run = models / "run"
    tiny_tokenizer().save_pretrained(run / "tokenizer")
    weights = (run / "tokenizer" / "model.safetensors").read_bytes()
    (run / "tokenizer" / mark).mkdir()
    adaptive = ["adaptive", "x", "--target", "psnr=9", "--train", "emoji", "--output", str(run)]
    for command in (["convert", "x", str(run / "tokenizer")], adaptive):
        assert main(command) == 1
        assert "holds a training, whose model would be replaced" in capsys.readouterr().err
    (run / "tokenizer" / mark).rmdir()
    assert main(adaptive) == 1
    assert "holds another tokenizer, which would be lost" in capsys.readouterr().err
    assert (run / "tokenizer" / "model.safetensors").read_bytes() == weights


def test_a_generator_that_cannot_be_aligned_is_named_before_the_training(
    models, capsys, monkeypatch
):
    monkeypatch.setattr("flextok.cli.measure.probe_for", lambda *_: pytest.fail("training"))
    gpt = tiny_gpt(conditioner={"name": "none"})
    remember_tokenizer(gpt, models / "free", load(models / "tokenizer"), str(models / "tokenizer"))
    gpt.save_pretrained(models / "free")
    for name, message in (("gpt", "are not the numbers of objects"), ("free", "nothing to be")):
        assert main(["align", str(models / name), "--limit", "4"]) == 1
        assert message in capsys.readouterr().err


def test_a_device_that_computes_nothing_is_refused(models, capsys):
    assert main(["reconstruct", "x.png", "--model", str(models / "tokenizer")]) == 1
    capsys.readouterr()
    draw_pictures(models / "photos", ["a.png"])
    command = ["reconstruct", str(models / "photos"), "--model", str(models / "tokenizer")]
    assert main([*command, "--device", "meta", "--output", str(models / "o")]) == 1
    assert "flextok: --device meta: " in capsys.readouterr().err
