import json

import pytest
import torch
from conftest import tiny_gpt, tiny_tokenizer

from flextok.generators import GPT
from flextok.hub import CheckpointError, atomic_write, fingerprint
from flextok.pipeline import load_model, load_tokenizer_of, remember_tokenizer
from flextok.tokenizers import FlexTok


def test_round_trip_is_bit_identical(tmp_path, images):
    model = tiny_tokenizer()
    model.metadata["class_names"] = ["a", "b"]
    model.save_pretrained(tmp_path / "model")
    loaded = FlexTok.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    assert loaded.metadata == {"class_names": ["a", "b"]}
    assert not loaded.training
    indices = model.encode(images)
    assert torch.equal(loaded.encode(images), indices)
    draws = [torch.Generator().manual_seed(0) for _ in range(2)]
    first, second = (
        m.decode(indices, num_steps=2, generator=g)
        for m, g in zip((model, loaded), draws, strict=True)
    )
    assert torch.equal(first, second)
    assert loaded.encoder.patch_pos.requires_grad is False
    assert loaded.encoder.registers.requires_grad


def test_the_type_in_the_file_decides(tmp_path):
    tiny_gpt().save_pretrained(tmp_path / "gpt")
    assert isinstance(load_model(tmp_path / "gpt"), GPT)
    with pytest.raises(CheckpointError, match="holds a 'gpt' model, not 'flextok'"):
        FlexTok.from_pretrained(tmp_path / "gpt")


def test_half_precision_files_load_as_float32(tmp_path, images):
    tiny_tokenizer().half().save_pretrained(tmp_path)
    loaded = FlexTok.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert FlexTok.from_pretrained(tmp_path, dtype=torch.float16).encoder.head.weight.dtype == (
        torch.float16
    )


def test_training_only_parts_stay_out(tmp_path):
    repa = {"model": "vit_tiny_patch16_224", "pretrained": False, "hidden_dim": 8}
    model = tiny_tokenizer(repa=repa)
    model.prepare_training()
    model.save_pretrained(tmp_path)
    loaded = FlexTok.from_pretrained(tmp_path)
    assert loaded.repa is None
    assert loaded.config.repa is None


def test_truncated_weights(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or damaged"):
            FlexTok.from_pretrained(tmp_path)


def edit(path, change):
    header = json.loads(path.read_text())
    change(header)
    path.write_text(json.dumps(header))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "model.safetensors").unlink(), "is missing"),
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
        (lambda d: (d / "config.json").write_text('{"model'), "damaged"),
        (lambda d: (d / "config.json").write_text("[]"), "not a flextok model"),
        (lambda d: edit(d / "config.json", lambda h: h["config"].update(x=1)), "unknown key 'x'"),
        (
            lambda d: edit(d / "config.json", lambda h: h["config"].update(decoder_depth=3)),
            "does not fit its config",
        ),
        (lambda d: edit(d / "config.json", lambda h: h.update(model_type="os")), "unknown model"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, damage, message):
    tiny_tokenizer().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_a_missing_model_says_what_was_looked_for(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="no model at"):
        load_model(tmp_path / "nowhere" / "at" / "all")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="someone/something"):
        load_model("someone/something")


def test_an_interrupted_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_generator_finds_its_tokenizer_and_refuses_another(tmp_path):
    tokenizer, gpt = tiny_tokenizer(), tiny_gpt()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    remember_tokenizer(gpt, tmp_path / "gpt", tokenizer, str(tmp_path / "tokenizer"))
    gpt.save_pretrained(tmp_path / "gpt")
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("gpt", "tokenizer"):
        (tmp_path / name).rename(moved / name)
    found = load_tokenizer_of(load_model(moved / "gpt"), moved / "gpt")
    assert fingerprint(found) == fingerprint(tokenizer)
    with torch.no_grad():
        tokenizer.encoder.registers += 1
    tokenizer.save_pretrained(moved / "tokenizer")
    with pytest.raises(CheckpointError, match="is not the one that this generator was trained on"):
        load_tokenizer_of(load_model(moved / "gpt"), moved / "gpt")
