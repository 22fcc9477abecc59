"""From a folder of pictures to two trained models in one command."""

import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.files import draw_pictures
from helpers.runs import Stop, interrupt_after

from flextok.cli import main, make_parser
from flextok.cli.training import run_train
from flextok.config import ExperimentConfig, load_experiment
from flextok.data.datasets import ImageFolder
from flextok.pipeline import load, load_tokenizer_of
from flextok.schema import ConfigError, from_mapping
from flextok.training.fit import check_warmup
from flextok.training.plan import Assumptions, build, plan
from flextok.training.recipe import USABLE, choose, write_recipe
from flextok.training.run import fit_options

SHORT = [f"trainer.{key}=1" for key in ("validate_every", "checkpoint_every")]
SHORT += ["trainer.max_steps=2", "trainer.accelerator=cpu", "data.token_variants=1"]


def test_options_of_a_folder_of_pictures_go_with_it_only():
    config = "configs/quickstart_tokenizer.yaml"
    for option in (["--size", "128"], ["--output", "mine"], ["--gpu-memory", "24"]):
        with pytest.raises(ValueError, match=f"leave {option[0]} out"):
            run_train(make_parser().parse_args(["train", config, *option]))


@pytest.mark.slow
def test_one_command_from_pictures_to_pictures(
    picture_folder, tmp_path, capsys, monkeypatch, recwarn
):
    """On a CPU; the same command again continues."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    out = tmp_path.parent / f"{tmp_path.name}-out"
    command = ["train", "--data", str(picture_folder), "--size", "32", "--output", str(out)]
    for interrupted in (True, False):
        with monkeypatch.context() as patch, pytest.raises(Stop) if interrupted else nullcontext():
            if interrupted:
                interrupt_after(patch, 1)
            assert main([*command, *SHORT]) == 0
    printed = capsys.readouterr().out
    assert not [w for w in recwarn if "treespec" in str(w.message)]  # Lightning's own business
    assert f"config of the tokenizer: {out / 'tokenizer.yaml'}\n" in printed
    assert f"{picture_folder} has no folders train and val" in printed
    generator = load(out / "generator")
    assert generator.class_names == ["cats", "dogs"]
    assert generator.metadata["step"] == 2
    tokenizer = load_tokenizer_of(generator)
    assert tokenizer.metadata["step"] == 2
    assert tokenizer.decode(generator.generate("cats")).shape == (1, 3, 32, 32)
    for name in ("tokenizer", "generator"):
        assert len(list((out / name / "pictures").glob("*.png"))) == 2
    assert main([*command[:-2], "48", "--output", str(out)]) == 1
    assert main(["train", "--data", str(picture_folder), "--gpu-memory", "24"]) == 1
    assert "this machine has no GPU" in capsys.readouterr().err
    assert main(["train", "--data", "nowhere"]) == 1
    assert "--data 'nowhere' is not a folder" in capsys.readouterr().err


def test_a_gpu_is_filled_and_not_more(picture_folder, tmp_path):
    """As the plan counts its memory; a smaller one gets a smaller model."""
    trained = []
    for memory in (8, 24, 80):
        files = write_recipe(picture_folder, tmp_path / str(memory), 128, memory)
        tokenizer, generator = map(load_experiment, files)
        for config in (tokenizer, generator):
            found = plan(config, gpus=1)
            assert sum(found.memory.values()) < USABLE * memory * 1e9
            assert found.batch_size >= 32
            trained.append(found.trained)
        assert generator.tokenizer == tokenizer.output_dir
    assert trained[0] < trained[2] < trained[4]
    with pytest.raises(ConfigError, match="128 pixels need more"):
        write_recipe(picture_folder, tmp_path / "none", 128, 0.1)


def test_the_configs_for_one_gpu_are_what_the_command_writes(tmp_path):
    """Of the models, by their built configs: YAML leaves out what is the default."""
    folders = {"train": "pictures/train", "validation": "pictures/val"}
    data = {part: {"name": "folder", "root": root} for part, root in folders.items()}
    data |= {"crop": "random", "flip": True, "num_workers": 4}
    written = choose(data, 2, Path("outputs/one_gpu_128px"), 128, 24)
    for part, name in (("tokenizer", "one_gpu_128px"), ("generator", "one_gpu_128px_generator")):
        ours = load_experiment(f"configs/{name}.yaml")
        theirs = from_mapping(ExperimentConfig, written[part])
        found = [build(config) for config in (ours, theirs)]
        assert found[0].model.config == found[1].model.config
        assert found[0].config == found[1].config
        nested = [config.objective.get("nested_dropout") for config in (ours, theirs)]
        assert nested[0] == nested[1]  # which the plan replaces
        assert replace(ours, model={}, objective={}) == replace(theirs, model={}, objective={})


@pytest.mark.parametrize(
    "name",
    ["one_gpu_128px", "one_gpu_128px_generator", "one_gpu_256px", "flextok_512px"],
)
def test_the_headers_state_what_the_plan_says(name):
    path = Path(f"configs/{name}.yaml")
    stated = re.search(
        r"`flextok plan(?: --gpus (\d+))? --gpu (\w+)`: ([\d.]+) GB, ([\d.]+) hours",
        path.read_text("utf-8"),
    )
    found = plan(load_experiment(path), int(stated[1] or 1), Assumptions(stated[2]))
    assert found.fits
    assert f"{sum(found.memory.values()) / 1e9:.1f}" == stated[3]
    assert f"{found.hours:.1f}" == stated[4]


def test_what_is_there_is_not_overwritten(picture_folder, tmp_path):
    files = write_recipe(picture_folder, tmp_path / "out", 32)
    assert write_recipe(picture_folder, tmp_path / "out", 32) == files
    with pytest.raises(ConfigError, match=r"tokenizer\.yaml has other settings"):
        write_recipe(picture_folder, tmp_path / "out", 64)
    with pytest.raises(ConfigError, match="size=30 must be a multiple of 8"):
        write_recipe(picture_folder, tmp_path / "odd", 30)


def test_fewer_steps_than_the_recipes_warmup_are_warned_of(picture_folder, tmp_path, caplog):
    for path in write_recipe(picture_folder, tmp_path / "out", 32):
        check_warmup(fit_options(load_experiment(path)))
        assert not caplog.records
        check_warmup(fit_options(load_experiment(path, ["trainer.max_steps=20"])))
        assert "optim.warmup_steps=50 is not below trainer.max_steps=20: " in caplog.text
        assert "to 40% of optim.lr" in caplog.text
        caplog.clear()


def test_held_out_pictures_and_a_single_class(tmp_path, picture_folder):
    (tmp_path / "set").mkdir()
    (picture_folder / "cats").rename(tmp_path / "set" / "train")
    (picture_folder / "dogs").rename(tmp_path / "set" / "val")
    tokenizer, generator = write_recipe(tmp_path / "set", tmp_path / "out", 32)
    data = load_experiment(tokenizer).data
    quick = load_experiment("configs/quickstart_tokenizer.yaml")
    assert load_experiment(tokenizer).trainer.precision == quick.trainer.precision
    assert [spec["root"][-5:] for spec in (data.train, data.validation)] == ["train", "t/val"]
    assert load_experiment(generator).model["conditioner"] == {"name": "none"}


def test_classes_that_validation_adds_are_named_before_a_tokenizer_is_trained(tmp_path):
    draw_pictures(
        tmp_path / "set", ["train/a/1.png", "train/b/1.png", "val/a/1.png", "val/c/1.png"]
    )
    with pytest.raises(ConfigError, match="val: the data has the 1 classes c, which are none"):
        write_recipe(tmp_path / "set", tmp_path / "out", 32)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("other", ["test", "valid", "Val"])
def test_parts_of_a_data_set_are_no_classes(tmp_path, other):
    """The images of train/ and test/ were trained on together, as two classes of these names."""
    draw_pictures(tmp_path / "set", ["train/a/1.png", f"{other}/a/1.png"])
    with pytest.raises(ConfigError, match="which are parts of a data set and no classes"):
        write_recipe(tmp_path / "set", tmp_path / "out", 32)


def test_validation_is_val(tmp_path):
    draw_pictures(tmp_path / "set", ["train/a/1.png", "validation/a/1.png", "test/a/1.png"])
    data = load_experiment(write_recipe(tmp_path / "set", tmp_path / "out", 32)[0]).data
    assert Path(data.validation["root"]).name == "validation"


def test_what_a_run_draws_is_none_of_the_data(picture_folder, caplog):
    """`flextok train --data .` trained its generator on the grids of its tokenizer."""
    run = picture_folder / "outputs" / "mine" / "tokenizer"
    draw_pictures(run / "pictures", ["step-1.png"])
    (run / "starts").mkdir()
    (run / "checkpoints").mkdir()
    assert ImageFolder(picture_folder).class_names == ["cats", "dogs"]
    assert "1 folders of training runs" in caplog.text
    assert len(ImageFolder(run / "pictures")) == 1  # asked for by name
