"""Files are written whole, as the user's umask says, or it is told in one line why not."""

import errno
import os
import stat

import pytest
import torch
from helpers.files import draw_pictures, write_shard
from helpers.models import tiny_tokenizer
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from flextok import viz
from flextok.cli import main
from flextok.data.sets import data_files
from flextok.data.web import WebDatasetStream
from flextok.files import WriteError, atomic_write, differences, only_one


@pytest.fixture
def umask():
    """Others may read, as on most machines."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.skipif(os.name == "nt", reason="Windows has other modes")
def test_files_have_the_mode_of_the_umask(tmp_path, umask):
    """safetensors makes files that nobody but their owner can read: no colleague could load a model
    from a shared folder."""
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    draw_pictures(tmp_path / "pictures", ["a.png"])
    folders = [str(tmp_path / name) for name in ("model", "pictures", "tokens")]
    assert main(["tokenize", *folders]) == 0
    viz.save(Image.new("RGB", (4, 4)), tmp_path / "model" / "grid.png")
    found = [p for name in ("model", "tokens") for p in (tmp_path / name).iterdir()]
    assert {p.suffix for p in found} == {".safetensors", ".json", ".md", ".png"}
    assert {oct(stat.S_IMODE(p.stat().st_mode)) for p in found} == {"0o644"}
    os.umask(0o077)
    atomic_write(tmp_path / "secret", lambda p: save_file({"a": torch.zeros(1)}, p))
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


def raise_(error):
    raise error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded", "somewhere"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
)
def test_a_full_disk_is_told_in_one_line(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(WriteError) as told:
        atomic_write(path, lambda p: (p.write_text("half"), raise_(error)))
    line = str(told.value)
    assert "\n" not in line
    assert line.startswith(f"could not write {path}: ")
    assert "MB are free on that disk" in line
    assert "start the same command again: it continues" in line
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_may_not_be_written_is_named(tmp_path):
    denied = PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(
        WriteError, match=r"could not write .*file: Permission denied; name another"
    ):
        atomic_write(tmp_path / "file", lambda p: raise_(denied))


def test_an_error_of_the_program_stays_what_it_is(tmp_path):
    with pytest.raises(ZeroDivisionError):
        atomic_write(tmp_path / "file", lambda p: 1 // 0)
    assert not list(tmp_path.iterdir())


def test_a_picture_of_no_known_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"picture must end in \.png"):
        viz.save(Image.new("RGB", (4, 4)), tmp_path / "picture")


def test_a_lock_that_was_removed_is_nobodys(tmp_path, monkeypatch):
    """The one that had it removed the file when another had just opened it."""

    def lock_later(file):
        (tmp_path / ".lock").unlink()

    with only_one(tmp_path, leave=False):
        assert (tmp_path / ".lock").exists()
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patched:
        patched.setattr("flextok.files.lock", lock_later)
        with pytest.raises(ValueError, match="at work in"), only_one(tmp_path):
            pytest.fail("the folder is another's")
    with only_one(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_file_is_the_same_one_in_lists_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / name).mkdir()
    one = {"train": [{"root": "a"}, {"root": str(tmp_path / "b")}], "levels": [8, 5]}
    other = {"train": [{"root": str(tmp_path / "a")}, {"root": "b"}], "levels": [8, 5]}
    assert differences(one, other) == {}
    swapped = {**other, "train": other["train"][::-1]}
    assert differences(one, swapped) == {"train": (one["train"], swapped["train"])}
    shorter = {**other, "levels": [8]}
    assert differences(one, shorter) == {"levels": ([8, 5], [8])}
    write_shard(tmp_path / "0.tar", {"x.png": b""})
    urls = ("0.tar", str(tmp_path / "0.tar"))
    states = [data_files(WebDatasetStream(u, samples=1, label_key=None)) for u in urls]
    assert states[0] == states[1]
