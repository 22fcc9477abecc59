"""The token cache: the same files from any number of processes, however often they die."""

import functools
import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers.files import draw_pictures, write_shard
from helpers.models import tiny_tokenizer
from helpers.processes import die_before, finish, start, start_ranks
from helpers.runs import generator_yaml

from flextok.cli import main
from flextok.config import load_experiment
from flextok.data.augmentation import Augmentation
from flextok.data.datasets import ImageFolder
from flextok.data.parts import PartStore
from flextok.data.processes import Process, this_process
from flextok.data.sets import data_files, take
from flextok.data.tokens import TokenDataset, build_token_cache, cache_identity, encode
from flextok.data.transforms import ImageTransform
from flextok.data.web import WebDatasetImages
from flextok.registry import make_dataset
from flextok.training.prepare import ready_tokens
from flextok.training.run import train


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def cache(folder, tokenizer, pictures, **options):
    transform = ImageTransform(16, Augmentation(flip=True, crop="random"))
    spec = {"name": "folder", "root": str(pictures)}
    defaults = {"variants": 3, "part_size": 4, "batch_size": 3}
    store = build_token_cache(
        folder,
        tokenizer,
        ImageFolder(pictures),
        transform,
        cache_identity(tokenizer, spec),
        **{**defaults, **options},
    )
    return store.is_finished


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_cache_holds_every_variant_of_every_picture_once(picture_folder, tmp_path, tokenizer):
    pictures = ImageFolder(picture_folder)
    assert cache(tmp_path / "tokens", tokenizer, picture_folder)
    found = TokenDataset(tmp_path / "tokens")
    assert len(found) == 18
    assert found.store.column("position")[:].tolist() == list(range(18))
    assert found.captions == [pictures[i // 3]["caption"] for i in range(18)]
    transform = ImageTransform(16)
    for i in (0, 7, 17):
        assert found[i]["label"] == pictures[i // 3]["label"]
        assert found[i]["indices"].dtype == torch.long
    for i in (0, 9, 15):  # variants without augmentation
        image = transform(pictures[i // 3]["image"])[None]
        assert torch.equal(found[i]["indices"], tokenizer.encode(image)[0])
    first, variant = (
        torch.stack([found[i]["indices"] for i in range(variant, 18, 3)]) for variant in (0, 1)
    )
    assert not torch.equal(first, variant)
    with pytest.raises(IndexError):
        found[18]


def test_a_cache_belongs_to_the_codes_not_to_the_decoder(picture_folder, tmp_path):
    own, place = tiny_tokenizer(), tmp_path / "tokens"
    assert cache(place, own, picture_folder)
    manifest = json.loads((place / "manifest.json").read_text())
    assert manifest["codes_id"] == own.codes_id
    spec = {"name": "tokens", "path": str(place)}
    assert len(ready_tokens(spec, own)) == 18
    decoder, encoder = tiny_tokenizer(), tiny_tokenizer()
    with torch.no_grad():
        decoder.decoder.head.weight.add_(1)
        encoder.encoder.head.weight.add_(1)
    assert cache(place, decoder, picture_folder)
    assert len(ready_tokens(spec, decoder)) == 18
    with pytest.raises(ValueError, match=r"made from something else \(codes_id differ"):
        cache(place, encoder, picture_folder)
    with pytest.raises(ValueError, match=f"by another tokenizer .*not codes {encoder.codes_id}"):
        ready_tokens(spec, encoder)


def test_any_number_of_processes_gives_the_same_files(picture_folder, tmp_path, tokenizer):
    (picture_folder / "cats" / "1.png").write_bytes(b"nothing")
    assert cache(tmp_path / "1", tokenizer, picture_folder)
    for count in (2, 3):
        finished = [
            cache(tmp_path / str(count), tokenizer, picture_folder, process=Process(rank, count))
            for rank in range(count)
        ]
        assert finished == [False] * (count - 1) + [True]
        assert files(tmp_path / str(count)) == files(tmp_path / "1")
    store = PartStore.open(tmp_path / "1", "token cache")
    assert len(store.column("position")) == len(TokenDataset(tmp_path / "1")) == 15
    assert "1.png" in store.verify()[0]


def test_damaged_parts_are_named_and_made_again(picture_folder, tmp_path, tokenizer):
    folder = tmp_path / "tokens"
    cache(folder, tokenizer, picture_folder)
    part = folder / "part-000001.safetensors"
    whole = part.read_bytes()
    damages = [whole[:-5], (folder / "part-000000.safetensors").read_bytes()]
    for place in (len(whole) - 1, len(whole) - 60):
        damages.append(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    for damaged in damages:
        part.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"part-000001\.safetensors is (damaged|not part 1)"):
            TokenDataset(folder)
        assert cache(folder, tokenizer, picture_folder)
        assert part.read_bytes() == whole
    part.unlink()
    with pytest.raises(ValueError, match="is unfinished: run what made it again"):
        TokenDataset(folder)
    assert cache(folder, tokenizer, picture_folder)
    assert part.read_bytes() == whole


@pytest.mark.parametrize("names", [None, "cats", [1], {}])
def test_class_names_of_a_manifest_are_checked(picture_folder, tmp_path, tokenizer, names):
    folder = tmp_path / "tokens"
    cache(folder, tokenizer, picture_folder)
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "class_names": names}))
    with pytest.raises(ValueError, match="class_names must be texts"):
        TokenDataset(folder)


def test_large_codebooks_need_wider_integers(tmp_path, monkeypatch):
    indices = torch.tensor([[2**17 - 1, 0]])
    wide = tiny_tokenizer()
    monkeypatch.setattr(type(wide), "vocab_size", 2**17)
    monkeypatch.setattr(type(wide), "num_tokens", 2)
    monkeypatch.setattr(wide, "encode", lambda images, generator=None: indices)
    batch = {"image": torch.zeros(1, 3, 16, 16), "position": torch.tensor([0])}
    batch |= {"label": torch.tensor([1]), "caption": ["x"]}
    store = PartStore.make(tmp_path, "token cache", {}, 1, 1)
    store.write(0, [{"position": batch["position"], **encode(wide, batch, 0, False)}])
    found = store.column("indices")[:]
    assert found.dtype == torch.uint32
    assert torch.equal(found.long(), indices)


def test_mistakes(picture_folder, tmp_path, tokenizer):
    cache(tmp_path / "t", tokenizer, picture_folder)
    with pytest.raises(
        ValueError, match=r"made from something else \(length, seed, variants differ\)"
    ):
        cache(tmp_path / "t", tokenizer, picture_folder, variants=2, seed=1)
    for name in ("variants", "batch_size", "part_size"):
        with pytest.raises(ValueError, match=f"{name}=-1 must be at least 1"):
            cache(tmp_path / "u", tokenizer, picture_folder, **{name: -1})
    assert not (tmp_path / "u").exists()
    with pytest.raises(ValueError, match="is no token cache"):
        TokenDataset(picture_folder)


def test_torchrun_and_slurm_say_which_process_this_is(monkeypatch):
    def place(**variables):
        for name in (
            *("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID", "SLURM_PROCID"),
            *("SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
        ):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        return tuple(this_process())

    slurm = {"SLURM_PROCID": 5, "SLURM_NTASKS": 16, "SLURM_LOCALID": 1}
    assert place() == (0, 1, 0)
    assert place(RANK=3, WORLD_SIZE=8, LOCAL_RANK=1, **slurm) == (3, 8, 1)
    assert place(**slurm, SLURM_STEP_ID=0) == (5, 16, 1)
    assert place(**slurm, SLURM_STEP_ID=2, SLURM_STEP_NUM_TASKS=8) == (5, 8, 1)
    assert place(**slurm) == (0, 1, 0)  # the batch script itself
    assert place(LOCAL_RANK=3, WORLD_SIZE=8) == (0, 1, 3)  # Lightning started it
    assert place(**slurm, SLURM_STEP_ID=4294967290) == (0, 1, 0)  # an interactive shell
    with pytest.raises(ValueError, match="process 8 of 8"):
        place(RANK=8, WORLD_SIZE=8)


def test_a_tokenizer_whose_cache_is_complete_stays_where_it_is(
    picture_folder, tmp_path, monkeypatch
):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    path = generator_yaml(tmp_path, picture_folder)
    train(load_experiment(path), only_caches=True)
    monkeypatch.setattr("flextok.training.prepare.cache_device", lambda _: "meta")  # loses weights
    train(load_experiment(path), only_caches=True)


@pytest.fixture
def command(picture_folder, tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "model")

    def make(output, part_size=8, variants=8):
        return [
            *("tokenize", tmp_path / "model", picture_folder, output, "--flip", "--batch-size", 2),
            *("--variants", variants, "--part-size", part_size),
        ]

    return make


@pytest.mark.slow
def test_killed_and_shared_runs_of_the_command_lose_and_repeat_nothing(
    command, picture_folder, tmp_path, capsys
):
    log, whole, killed = tmp_path / "log", tmp_path / "whole", tmp_path / "killed"
    assert finish(start(command(whole), log, functools.partial(die_before, 0, whole))) == [0]
    count = int(Path(f"{whole}.changes").read_text())
    ranks = start_ranks(2, command(tmp_path / "shared"), log)
    for moment in (2, count // 3, count // 3):  # before its first part, and within others
        die = functools.partial(die_before, moment, killed)
        assert finish(start(command(killed), log, die)) == [-signal.SIGKILL]
    assert finish(*ranks) == [0, 0]
    assert main([str(a) for a in [*command(killed), "--verify"]]) == 0
    assert "48 sequences in 6 parts, all checksums agree" in capsys.readouterr().out
    expected = files(whole)
    assert files(tmp_path / "shared") == expected
    found = files(killed)
    assert {name: found[name] for name in expected} == expected


def test_a_generator_as_tokenizer_and_other_mistakes_of_the_command(command, tmp_path, capsys):
    from helpers.models import tiny_gpt

    tiny_gpt().save_pretrained(tmp_path / "gpt")
    arguments = [str(a) for a in command(tmp_path / "out")]
    for changes, message in (
        ({1: str(tmp_path / "gpt")}, "is a generator"),
        ({2: "nowhere"}, "neither a folder"),
        ({2: "{name: folders}"}, "unknown dataset 'folders'"),
        ({2: "{name: [}"}, "is no mapping"),
    ):
        changed = [changes.get(i, a) for i, a in enumerate(arguments)]
        assert main(changed) == 1
        assert message in capsys.readouterr().err


def test_data_may_be_a_spec(command, picture_folder, tmp_path):
    arguments = [str(a) for a in command(tmp_path / "out")]
    arguments[2] = f"{{name: folder, root: {picture_folder}, label_from: none}}"
    assert main(arguments) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["class_names"] == ["unlabelled"]
    assert manifest["data"]["label_from"] == "none"


def test_a_folder_is_the_same_however_its_path_is_written(
    command, picture_folder, tmp_path, capsys
):
    arguments = [str(a) for a in command(tmp_path / "out")]
    assert main(arguments) == 0
    arguments[2] = f"{picture_folder}/../{picture_folder.name}/"
    assert main(arguments) == 0
    arguments[2] = str(picture_folder / "cats")
    assert main(arguments) == 1
    assert "was made from something else (" in capsys.readouterr().err


# --- what a cache must notice ---------------------------------------------------------------------


def test_changed_pictures_and_captions_are_noticed(picture_folder, tmp_path, tokenizer):
    """A cache went on being used after its pictures had changed."""
    folder, pictures = tmp_path / "tokens", tmp_path / "pictures"
    draw_pictures(pictures, ["cats/0.png", "cats/1.png"])
    (pictures / "cats" / "0.txt").write_text("a cat")
    assert cache(folder, tokenizer, pictures)
    before = files(folder)
    assert cache(folder, tokenizer, pictures)  # as it was: read again
    first, caption = pictures / "cats" / "0.png", pictures / "cats" / "0.txt"
    changes = {
        "another picture, of the same size": lambda: os.utime(first, ns=(1, 1)),
        "another size": lambda: first.write_bytes(first.read_bytes() + b"."),
        "another caption": lambda: caption.write_text("a dog"),
        "no caption": caption.unlink,
        "another name": lambda: first.rename(pictures / "cats" / "2.png"),
    }
    for change, make in changes.items():
        make()
        with pytest.raises(ValueError, match=r"\(data_files differ\): delete it, or name another"):
            cache(folder, tokenizer, pictures)
        assert files(folder) == before, change
        shutil.rmtree(folder)
        assert cache(folder, tokenizer, pictures)
        before = files(folder)
    (pictures / "cats" / "3.png").write_bytes((pictures / "cats" / "2.png").read_bytes())
    with pytest.raises(ValueError, match=r"\(data_files, length differ\)"):
        cache(folder, tokenizer, pictures)


def test_a_cache_of_an_older_version_is_refused(picture_folder, tmp_path, tokenizer):
    (tmp_path / "manifest.json").write_text(json.dumps({"codes_id": tokenizer.codes_id}))
    with pytest.raises(ValueError, match="is of no token cache, or of one of an older version"):
        cache(tmp_path, tokenizer, picture_folder)


def test_every_data_set_tells_its_files(tmp_path):
    draw_pictures(tmp_path, ["a/0.png", "b/0.png"])
    for name, image in (("x", "a/0.png"), ("y", "b/0.png")):
        content = (tmp_path / image).read_bytes()
        write_shard(tmp_path / f"{name}.tar", {"0.png": content, "0.cls": b"0"})
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"image": [str(tmp_path / "a/0.png")]})
    table = table.cast_column("image", datasets.Image())
    table.save_to_disk(str(tmp_path / "h1"))
    table.add_column("words", ["x"]).save_to_disk(str(tmp_path / "h2"))
    folder = {"name": "folder", "root": str(tmp_path / "a")}
    other = {"name": "folder", "root": str(tmp_path / "b")}
    huge = {"name": "huggingface", "label_column": None}
    streamed = {"name": "webdataset_stream", "samples": 1, "label_key": None}
    specs = [
        folder,
        {"name": "webdataset", "urls": f"{tmp_path}/x.tar"},
        {"name": "webdataset", "urls": f"{tmp_path}/y.tar"},
        {**streamed, "urls": f"{tmp_path}/x.tar"},
        {**streamed, "urls": "http://127.0.0.1:9/x.tar"},
        {**streamed, "urls": "http://127.0.0.1:9/y.tar"},
        {**huge, "path": str(tmp_path / "h1")},
        {**huge, "path": str(tmp_path / "h2")},
        {"name": "emoji", "split": "validation"},
        {"name": "emoji", "split": "train"},
        {"name": "emoji_scenes", "vocabulary": "basic"},
        [folder, other],
        [other, folder, folder],
    ]
    found = [data_files(make_dataset(spec)) for spec in specs]
    assert len(set(found)) == len(specs)
    assert found == [data_files(make_dataset(spec)) for spec in specs]
    assert data_files(take(make_dataset([folder, other]), 1)) == found[-2]
    os.utime(tmp_path / "x.tar", ns=(1, 1))
    again = [data_files(make_dataset(spec)) for spec in specs]
    assert [i for i in range(len(specs)) if again[i] != found[i]] == [1, 3]


def test_a_tokenizer_that_gives_nan_makes_no_cache(picture_folder, tmp_path):
    """Rounding and the nearest code turn NaN into an index: such a cache was written and
    verified."""
    vq = {"name": "vq", "codebook_size": 16, "dim": 4}
    for quantizer in ({"name": "fsq", "levels": [8, 5, 5]}, vq):
        for damage in (float("nan"), float("inf")):
            broken = tiny_tokenizer(quantizer=quantizer)
            with torch.no_grad():
                next(broken.encoder.parameters()).view(-1)[0] = damage
            with pytest.raises(ValueError, match=r"outputs .* not finite"):
                cache(tmp_path / "tokens", broken, picture_folder)
            assert not list((tmp_path / "tokens").glob("part-*"))
            shutil.rmtree(tmp_path / "tokens")


def test_codes_and_labels_out_of_range_are_refused(picture_folder, tmp_path, tokenizer):
    """Of a part that is whole, so that only its values give them away."""
    folder = tmp_path / "tokens"
    cache(folder, tokenizer, picture_folder)
    TokenDataset(folder).check_codes(tokenizer)
    store = PartStore.open(folder, "token cache")

    def rewrite(name, value):
        tensors = {key: tensor.clone() for key, tensor in store.read(0)[0].items()}
        tensors = {key: t for key, t in tensors.items() if not key.startswith("caption")}
        tensors[name].view(-1)[0] = value
        store.write(0, [tensors])

    rewrite("indices", 200)  # of 200
    with pytest.raises(ValueError, match=r"tokens: indices span \[\d+, 200\]"):
        TokenDataset(folder).check_codes(tokenizer)
    with pytest.raises(ValueError, match=r"tokens: indices span"):
        ready_tokens({"name": "tokens", "path": str(folder)}, tokenizer)
    for label in (2, -1, 1 << 40):  # of 2 classes
        rewrite("label", label)
        with pytest.raises(ValueError, match=f"{label}, but|from {label} to .* 2 classes"):
            TokenDataset(folder)


def test_labels_count_in_other_class_names_by_name(picture_folder, tmp_path, tokenizer):
    folder = tmp_path / "tokens"
    cache(folder, tokenizer, picture_folder, variants=1)
    found = TokenDataset(folder)
    assert found.class_names == ["cats", "dogs"]
    found.count_classes_in(["dogs", "emus", "cats"])
    again = pickle.loads(pickle.dumps(found))  # as a worker that is not forked has it
    for data in (found, again):
        assert data.class_names == ["dogs", "emus", "cats"]
        assert [int(data[i]["label"]) for i in range(6)] == [2, 2, 2, 0, 0, 0]
    with pytest.raises(ValueError, match="the 1 classes dogs, which are none of the model's"):
        TokenDataset(folder).count_classes_in(["cats", "emus"])
    # a name without an image is no matter
    data = ImageFolder(picture_folder, class_names=["cats", "dogs", "unused"])
    build_token_cache(tmp_path / "more", tokenizer, data, ImageTransform(16), {})
    more = TokenDataset(tmp_path / "more")
    more.count_classes_in(["dogs", "cats"])
    assert [int(more[i]["label"]) for i in range(6)] == [1, 1, 1, 0, 0, 0]


def test_several_captions_are_taken_in_turn(tmp_path, tokenizer):
    draw_pictures(tmp_path, ["0.png"])
    record = {"caption": ["a dog", "a puppy", "007"]}
    members = {"0.png": (tmp_path / "0.png").read_bytes(), "0.json": json.dumps(record).encode()}
    url = write_shard(tmp_path / "a.tar", members)
    transform = ImageTransform(16, Augmentation(flip=True))
    data = WebDatasetImages(url, label_key=None)
    identity = cache_identity(tokenizer, {})
    for name, variants in (("one", 1), ("five", 5)):
        build_token_cache(tmp_path / name, tokenizer, data, transform, identity, variants)
    assert TokenDataset(tmp_path / "one").captions == ["a dog"]
    expected = ["a dog", "a puppy", "007", "a dog", "a puppy"]
    assert TokenDataset(tmp_path / "five").captions == expected
