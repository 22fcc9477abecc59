import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers.files import draw_pictures
from helpers.models import tiny_gpt, tiny_tokenizer
from PIL import Image

from flextok.cli import main
from flextok.data.pictures import load_picture
from flextok.data.transforms import ImageTransform
from flextok.draws import NOISE, row_generators
from flextok.images import to_uint8

FEW = ("--steps", "1")


@pytest.fixture
def model(tmp_path):
    return str(tiny_tokenizer().save_pretrained(tmp_path / "tokenizer"))


def reconstruct(model, *arguments) -> int:
    return main(["reconstruct", *map(str, arguments), "--model", model, *FEW])


def test_one_picture_is_the_models_own_reconstruction(model, picture_folder, tmp_path):
    source, output = picture_folder / "cats" / "0.png", tmp_path / "out.png"
    assert reconstruct(model, source, "--num-tokens", 3, "--seed", 5, "--output", output) == 0
    tokenizer = tiny_tokenizer()
    indices = tokenizer.encode(ImageTransform(16)(load_picture(source))[None])
    noise = row_generators(5, NOISE, [0])
    expected = tokenizer.decode(indices[:, :3], num_steps=1, generator=noise)
    assert Image.open(output).tobytes() == to_uint8(expected[0]).tobytes()


@pytest.mark.filterwarnings("error")
def test_bright_pictures_raise_no_doubt_about_their_range(model, tmp_path, monkeypatch):
    """They were taken for tensors in [0, 1], which encode warns of."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 16), (230, 240, 250)).save("bright.png")
    assert reconstruct(model, "bright.png", "--output", "made.png") == 0
    assert main(["sample", model, "--images", "bright.png", *FEW, "--output", "grid.png"]) == 0
    with warnings.catch_warnings():
        warnings.resetwarnings()
        with pytest.warns(UserWarning, match="2 \\* x - 1"):  # a tensor's range is not known
            tiny_tokenizer().encode(ImageTransform(16)("bright.png")[None])


def test_a_model_that_is_not_finite_is_named_and_writes_nothing(picture_folder, tmp_path, capsys):
    """It wrote black pictures of 100 dB."""
    broken = tiny_tokenizer()
    broken.decoder.mask_token.data[:] = torch.nan
    folder = str(broken.save_pretrained(tmp_path / "broken"))
    assert reconstruct(folder, picture_folder, "--num-tokens", 1, "--output", tmp_path / "o") == 1
    assert (
        f"flextok: {folder}: the decoded images hold values that are not finite"
        in capsys.readouterr().err
    )
    assert not list(tmp_path.glob("o/*"))


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("--guidance-scale=nan", "guidance_scale=nan"),
        ("--steps=1000000000", "num_steps=1000000000"),
        ("--time-shift=inf", "time_shift=inf"),
    ],
)
def test_a_number_out_of_range_is_refused(model, picture_folder, tmp_path, capsys, option, key):
    output = tmp_path / "o"
    source = str(picture_folder / "cats")
    assert main(["reconstruct", source, "--model", model, option, "--output", str(output)]) == 1
    assert f"{key} must be" in capsys.readouterr().err
    assert not output.exists()


def test_a_folder_keeps_its_shape_and_json_tells_the_numbers(
    model, picture_folder, tmp_path, capsys
):
    out = tmp_path / "out"
    source = picture_folder / "cats" / ".."  # no two names alike: cats/0, dogs/0
    assert reconstruct(model, source, "--num-tokens", 8, 1, "--output", out, "--json") == 0
    rows = json.loads(capsys.readouterr().out)  # nothing but JSON
    assert len(rows) == 12
    assert {row["num_tokens"] for row in rows} == {1, 8}
    assert all(Path(row["output"]).is_file() for row in rows)
    assert out / "dogs" / "2-8.png" in [Path(row["output"]) for row in rows]
    assert all(0 < row["psnr"] < 60 for row in rows)


@pytest.mark.parametrize("output", ["own", "link", "own/a.png"])
def test_the_pictures_that_are_read_are_never_written_over(model, tmp_path, capsys, output):
    """a-1.png was written over, then read, and had 100 dB."""
    own = tmp_path / "own"
    own.mkdir()
    (tmp_path / "link").symlink_to(own)
    for name, grey in {"a.png": 50, "a-1.png": 200}.items():
        Image.new("RGB", (16, 16), (grey,) * 3).save(own / name)
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    sources = [own / "a.png"] if output.endswith(".png") else [own / "a.png", own / "a-1.png"]
    lost = own / ("a.png" if output.endswith(".png") else "a-1.png")
    assert reconstruct(model, *sources, "--num-tokens", 1, "--output", tmp_path / output) == 1
    assert f"the picture {lost} would be written over: name another" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before


def test_a_picture_may_be_written_beside_those_that_are_read(model, tmp_path):
    source = tmp_path / "a.png"
    Image.new("RGB", (16, 16), (50, 50, 50)).save(source)
    for _ in range(2):  # an earlier result is no source
        assert reconstruct(model, source, "--num-tokens", 1, "--output", tmp_path) == 0
    assert (tmp_path / "a-1.png").is_file()


def test_a_picture_does_not_depend_on_those_beside_it(model, picture_folder, tmp_path):
    one, all_of_them = tmp_path / "one", tmp_path / "all"
    reconstruct(model, picture_folder / "cats" / "1.png", "--output", one)
    reconstruct(model, picture_folder / "cats", "--output", all_of_them)
    assert (one / "1-8.png").read_bytes() == (all_of_them / "1-8.png").read_bytes()


@pytest.mark.slow
def test_standard_input_to_standard_output(model, picture_folder, tmp_path):
    source = picture_folder / "dogs" / "1.png"
    command = [sys.executable, "-m", "flextok.cli", "reconstruct", "-", "--model", model, *FEW]
    piped = subprocess.run(command, input=source.read_bytes(), capture_output=True, check=True)
    reconstruct(model, source, "--output", tmp_path / "file.png")
    assert (
        Image.open(io.BytesIO(piped.stdout)).tobytes()
        == Image.open(tmp_path / "file.png").tobytes()
    )


@pytest.mark.slow
def test_a_reader_that_leaves_early_is_no_error(model):
    command = [sys.executable, "-m", "flextok.cli", "info", model]
    read, write = os.pipe()
    os.close(read)  # as `| head` does, but surely
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == 0
    assert done.stderr == ""


def test_unreadable_pictures_are_skipped_and_the_exit_code_says_so(
    model, picture_folder, tmp_path, capsys, caplog
):
    (picture_folder / "cats" / "1.png").write_text("no picture")
    place = ("--output", tmp_path / "out", "--json", tmp_path / "out.json")
    assert reconstruct(model, picture_folder / "cats", *place) == 1
    assert len(list((tmp_path / "out").iterdir())) == 2
    first, lost, last = json.loads((tmp_path / "out.json").read_text())  # it was not written
    assert Path(first["output"]).is_file()
    assert Path(last["output"]).is_file()
    assert lost["picture"] == str(picture_folder / "cats" / "1.png")
    assert "1.png" in lost["error"]
    assert "1 of 3 pictures could not be read" in capsys.readouterr().err
    assert "cats/1.png" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jpg"], "there is no picture 'nowhere.jpg'"),
        (["{empty}"], "no pictures in"),
        (["{cats}", "{dogs}"], "would be written to the same file"),
        (["{cats}", "--output", "x.png"], "--output x.png holds one picture, not 3"),
        (["{cats}/0.png", "--num-tokens", "1", "2", "--output", "-"], "holds one picture, not 2"),
        (["{cats}/0.png", "--output", "-", "--json"], "name a file for one"),
        (["{cats}/0.png", "--num-tokens", "9"], "--num-tokens 9 must be in [1, 8]"),
        (["{cats}/0.png", "--output", "{cats}/0.png/under"], "0.png is no folder"),
    ],
)
def test_mistakes_are_told_in_one_line(model, picture_folder, capsys, arguments, message):
    (picture_folder / "empty").mkdir()
    places = {name: picture_folder / name for name in ("cats", "dogs", "empty")}
    assert reconstruct(model, *(a.format(**places) for a in arguments)) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "Traceback" not in error


def test_a_generator_reconstructs_nothing(picture_folder, tmp_path, capsys):
    picture = str(picture_folder / "cats" / "0.png")
    gpt = tiny_gpt().save_pretrained(tmp_path / "gpt")
    assert main(["reconstruct", picture, "--model", str(gpt)]) == 1
    assert "is a generator: name the tokenizer" in capsys.readouterr().err


def test_json_is_a_files_name_or_the_last_option(model, picture_folder, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["reconstruct", "--json", str(picture_folder / "cats"), "--model", model])
    assert exit.value.code == 2
    assert "put --json last" in capsys.readouterr().err


def test_a_name_that_is_no_text_is_printed_escaped(releases, picture_folder, tmp_path, capsys):
    """A byte that is no UTF-8 stops no folder, and no name steers the terminal."""
    folder, out = tmp_path / "odd", tmp_path / "out"
    folder.mkdir()
    picture = (picture_folder / "cats" / "0.png").read_bytes()
    for name in (b"caf\xe9.png", b"\x1b[2J.png", b"zebra.png"):
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write(picture)
    assert main(["reconstruct", str(folder), "--output", str(out)]) == 0
    assert sorted(os.listdir(os.fsencode(out)))[1] == b"caf\xe9-256.png"
    assert len(os.listdir(out)) == 3
    printed = capsys.readouterr().out
    assert r"caf\udce9-256.png" in printed
    assert r"\x1b[2J-256.png" in printed
    assert "\x1b" not in printed


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("notes", "is a file: name a folder"),
        ("a.jpg", "ends as an image does: name a folder"),
        ("folder.png", "is a folder: name one that does not end in .png"),
    ],
)
def test_an_output_of_another_kind_is_refused_before_the_model_loads(
    picture_folder, tmp_path, capsys, name, fault
):
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    place, picture = str(tmp_path / name), str(picture_folder / "cats" / "0.png")
    assert main(["reconstruct", picture, "--model", "gone/model", "--output", place]) == 1
    assert f"--output {place} {fault}" in capsys.readouterr().err
    assert (tmp_path / "notes").read_text() == "mine"


def test_pictures_of_one_stem_keep_their_endings(model, tmp_path):
    draw_pictures(tmp_path / "in", ["IMG_1.jpg", "IMG_1.png", "IMG_2.png"])
    assert reconstruct(model, tmp_path / "in", "--num-tokens", 1, "--output", tmp_path / "out") == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["IMG_1.jpg-1.png", "IMG_1.png-1.png", "IMG_2-1.png"]


def test_earlier_reconstructions_inside_the_folder_are_not_reconstructed_again(model, tmp_path):
    draw_pictures(tmp_path, ["a.png"])
    for _ in range(2):
        assert reconstruct(model, tmp_path, "--num-tokens", 1, "--output", tmp_path / "out") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a-1.png"]
