"""The part store: the same files from any number of processes, whole or remade, one identity."""

import json
import logging
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from flextok.data.parts import PartStore
from flextok.data.pictures import CorruptPicture
from flextok.data.processes import Process

IDENTITY = {"model": "abc", "sizes": (1, 2)}


class Numbers(Dataset):
    """Item i is i; those in `broken` cannot be read."""

    def __init__(self, length=10, broken=()):
        self.length, self.broken = length, broken

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.broken:
            raise CorruptPicture(f"number {index}", "no number")
        return {"value": torch.full((2,), float(index))}


def rows_of(batch):
    several = [torch.arange(int(p)) for p in batch["position"]]
    texts = [f"é{p}" if p else "" for p in batch["position"].tolist()]
    return {"square": batch["value"] ** 2, "several": several, "text": texts}


def make(folder, dataset=None, process=None, fill=True, replace=False, **identity):
    dataset = dataset or Numbers()
    store = PartStore.make(
        folder, "test store", {**IDENTITY, **identity}, len(dataset), 4, process, replace
    )
    if fill:
        store.fill(dataset, rows_of, batch_size=3)
    return store


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_columns_hold_the_rows_in_order_whatever_their_kind(tmp_path):
    store = make(tmp_path, Numbers(10, broken=(0, 4, 5, 6, 7)))
    assert store.is_finished
    assert [len(text) > 0 for text in store.verify()] == [True] * 5
    for keep in (False, True):
        column = store.column("square", keep)
        for held in (column, pickle.loads(pickle.dumps(column))):
            assert held[:].tolist() == [[n * n] * 2 for n in (1, 2, 3, 8, 9)]
            assert held[np.array([4, 0, 3])][:, 0].tolist() == [81, 1, 64]
            assert [held.row(i)[0].item() for i in range(5)] == [1, 4, 9, 64, 81]
            for beyond in (-1, 5):
                with pytest.raises(IndexError):
                    held.row(beyond)
    assert store.column("position")[:].tolist() == [1, 2, 3, 8, 9]
    assert [len(store.column("several").row(i)) for i in range(5)] == [1, 2, 3, 8, 9]
    assert store.column("text").texts() == ["é1", "é2", "é3", "é8", "é9"]
    assert make(tmp_path / "b").column("text").texts()[0] == ""
    again = PartStore.open(tmp_path, "test store")
    assert torch.equal(again.column("square")[:], store.column("square")[:])


def test_a_store_of_which_nothing_could_be_read_has_no_rows(tmp_path):
    store = make(tmp_path, Numbers(5, broken=range(5)))
    assert store.is_finished
    assert len(store.column("square")) == 0
    assert len(store.verify()) == 5
    assert store.column("text").texts() == []


def test_any_number_of_processes_gives_the_same_files(tmp_path):
    dataset = Numbers(21, broken=(5,))
    make(tmp_path / "1", dataset)
    for count in (2, 3):
        folder = tmp_path / str(count)
        finished = [
            make(folder, dataset, Process(rank, count)).is_finished for rank in range(count)
        ]
        assert finished == [False] * (count - 1) + [True]
        assert files(folder) == files(tmp_path / "1")


@pytest.mark.parametrize("replace", [False, True])
def test_processes_wait_for_each_other(tmp_path, replace):
    make(tmp_path, replace=replace, model="another") if replace else None

    def work(rank):
        store = make(tmp_path, process=Process(rank, 3), replace=replace)
        store.wait(poll=0.01)
        return store.column("square")[:]

    with ThreadPoolExecutor(3) as pool:
        for rows in pool.map(work, range(3)):
            assert rows[:, 0].tolist() == [n * n for n in range(10)]


def test_parts_that_are_there_are_not_made_again_and_damaged_ones_are(tmp_path, caplog):
    make(tmp_path)
    before = files(tmp_path)
    part = tmp_path / "part-000001.safetensors"
    whole = part.read_bytes()
    damages = [whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-5], b"", whole]
    damages += [whole.replace(b"store", b"stope"), before["part-000000.safetensors"]]
    for damaged in damages:
        part.write_bytes(damaged)
        caplog.clear()
        store = make(tmp_path, fill=False)
        assert store.missing() == ([] if damaged == whole else [1])
        store.fill(Numbers(), rows_of, batch_size=3)
        assert ("part-000001.safetensors is" in caplog.text) == (damaged != whole)
        assert files(tmp_path) == before
    part.write_bytes(damages[0])
    with pytest.raises(ValueError, match=r"part-000001\.safetensors is damaged .*run what made it"):
        PartStore.open(tmp_path, "test store").verify()
    part.unlink()
    with pytest.raises(ValueError, match="is unfinished"):
        PartStore.open(tmp_path, "test store").verify()


def test_an_interruption_loses_at_most_a_part(tmp_path):
    def stop_at_six(batch):
        if 6 in batch["position"]:
            raise KeyboardInterrupt
        return rows_of(batch)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, fill=False).fill(Numbers(), stop_at_six, batch_size=2)
    assert make(tmp_path, fill=False).missing() == [1, 2]
    make(tmp_path)
    assert files(tmp_path) == files(make(tmp_path / "whole").folder)


def test_only_what_was_left_long_ago_is_removed(tmp_path):
    """Two processes that filled one cache removed each other's files while they wrote them."""
    store = make(tmp_path, fill=False)
    live, left = (tmp_path / f".part-000001.safetensors.{name}.tmp" for name in ("aa", "bb"))
    for path in (live, left):
        path.write_bytes(b"half a part")
    os.utime(left, (time.time() - 2 * 3600,) * 2)
    store.fill(Numbers(), rows_of, batch_size=3)
    assert store.is_finished
    assert live.read_bytes() == b"half a part"
    assert not left.exists()


def test_another_identity_is_refused_by_the_names_of_its_keys(tmp_path):
    make(tmp_path)
    make(tmp_path)  # as it was: continued
    with pytest.raises(ValueError, match=r"test store .* something else \(model, new differ\)"):
        make(tmp_path, model="abd", new=1)
    with pytest.raises(ValueError, match=r"\(length differ\)"):
        make(tmp_path, Numbers(11))
    with pytest.raises(ValueError, match="is no test store: it has no manifest"):
        PartStore.open(tmp_path / "nowhere", "test store")
    with pytest.raises(ValueError, match="is of no other store"):
        PartStore.open(tmp_path, "other store")


def test_replacing_removes_what_is_ours_and_nothing_else(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    make(tmp_path, replace=True)
    note = tmp_path / "note.txt"
    note.write_text("mine")
    make(tmp_path, Numbers(3), replace=True, model="abd")
    assert "another test store: starting over" in caplog.text
    assert sorted(files(tmp_path)) == ["manifest.json", "note.txt", "part-000000.safetensors"]
    PartStore.open(tmp_path, "test store").remove()
    assert list(tmp_path.iterdir()) == [note]
    with pytest.raises(ValueError, match=r"no test store wrote, such as note\.txt"):
        make(tmp_path, replace=True)
    note.unlink()
    (tmp_path / "manifest.json").write_text('{"name": "an app of the user\'s"}')
    with pytest.raises(ValueError, match=r"no test store wrote, such as manifest\.json"):
        make(tmp_path, replace=True)
    PartStore.make(tmp_path / "tokens", "token cache", {}, 3, 4)
    with pytest.raises(ValueError, match=r"no test store wrote, such as manifest\.json"):
        make(tmp_path / "tokens", replace=True)


@pytest.mark.parametrize("content", [b"no JSON", b"\xff\xfe", b"", b"[]", b"[" * 100_000])
def test_a_damaged_manifest_is_refused_or_replaced(tmp_path, content):
    make(tmp_path)
    (tmp_path / "manifest.json").write_bytes(content)
    for use in (make, lambda folder: PartStore.open(folder, "test store")):
        with pytest.raises(ValueError, match=r"manifest\.json is damaged.*: remove .* again"):
            use(tmp_path)
    assert make(tmp_path, replace=True).is_finished


@pytest.mark.parametrize("key", ["length", "part_size"])
@pytest.mark.parametrize("value", [None, "4", True, -1, [], 10**15])
def test_what_a_manifest_claims_is_checked(tmp_path, key, value):
    """One that claimed 10^15 rows once kept training busy for ever."""
    make(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace(f'"{key}": ', f'"{key}": {json.dumps(value)}, "_": '))
    with pytest.raises(ValueError, match=r"damaged|unfinished|no part|not part"):
        PartStore.open(tmp_path, "test store").verify()


def test_a_part_of_positions_that_are_not_its_own_is_refused(tmp_path):
    store = make(tmp_path)
    for positions in ([4, 4, 5], [3, 4], [7, 8], [5, 4]):
        store.write(1, [{"position": torch.tensor(positions)}])
        with pytest.raises(ValueError, match="a position twice, or one of another part"):
            store.read(1)


def test_the_first_process_alone_begins_anew(tmp_path):
    make(tmp_path, replace=True, model="old")
    with pytest.raises(ValueError, match=r"was made from something else \(model differ\)"):
        make(tmp_path, process=Process(1, 2))
    make(tmp_path, process=Process(0, 2), replace=True)
    assert make(tmp_path, process=Process(1, 2)).is_finished
