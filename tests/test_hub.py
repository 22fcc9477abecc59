import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_gpt, tiny_tokenizer
from golden.titok.load import load_case
from huggingface_hub import errors

from flextok.files import atomic_write
from flextok.generators import GENERATORS, GPT
from flextok.hub import CheckpointError, fingerprint
from flextok.pipeline import load_model, load_tokenizer_of, remember_tokenizer
from flextok.tokenizers import TOKENIZERS, FlexTok, TiTok


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


def test_the_model_card_states_config_and_numbers(tmp_path):
    model = tiny_tokenizer()
    model.metadata.update(step=2000, metrics={"psnr": 21.5}, class_names=["a", "b"])
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    text = card.read_text()
    assert text.startswith("---\nlibrary_name: flextok\n")
    for row in (
        "| vocabulary | 200 |",
        "| bits per image | 61 (8 bytes) |",
        "| step | 2000 |",
        "| metrics psnr | 21.5 |",
        "| classes | 2 |",
        '"num_registers": 8',
    ):
        assert row in text
    model.metadata["step"] = 3000
    model.save_pretrained(tmp_path)
    assert "| step | 3000 |" in card.read_text()
    card.write_text("# My own words\n")
    model.save_pretrained(tmp_path)
    assert card.read_text() == "# My own words\n"


def test_push_to_hub(monkeypatch):
    calls = []

    class Api:
        def __init__(self, token):
            calls.append(("token", token))

        def create_repo(self, repo_id, private, exist_ok):
            calls.append(("repo", repo_id, private, exist_ok))
            return SimpleNamespace(repo_id="me/model")

        def upload_folder(self, repo_id, folder_path, commit_message):
            loaded = FlexTok.from_pretrained(folder_path)
            files = sorted(path.name for path in Path(folder_path).iterdir())
            calls.append((repo_id, files, fingerprint(loaded)))
            return "https://example.org/commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    model = tiny_tokenizer()
    assert model.push_to_hub("model", private=True) == "https://example.org/commit"
    assert calls == [
        ("token", None),
        ("repo", "model", True, True),
        ("me/model", ["README.md", "config.json", "model.safetensors"], fingerprint(model)),
    ]


def cache_model(cache, repo, write):
    """A hub cache as huggingface_hub lays it out, with one snapshot of a model."""
    place = cache / f"models--{repo.replace('/', '--')}"
    commit = "0" * 40
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    write(place / "snapshots" / commit)


def test_hub_ids_load_from_the_cache_offline(tmp_path, monkeypatch):
    model = tiny_tokenizer()
    cache_model(tmp_path, "someone/model", model.save_pretrained)

    def write_pickle(folder):
        folder.mkdir(parents=True)
        torch.save(load_case("titok_micro_vq_nonlegacy")[0], folder / "titok.bin")
        shutil.copy(folder / "titok.bin", folder / "pytorch_model.bin")

    cache_model(tmp_path, "someone/titok", write_pickle)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fingerprint(FlexTok.from_pretrained("someone/model")) == fingerprint(model)
    heads = {"head_dim": 16}
    by_file = TiTok.from_pretrained("someone/titok/titok.bin", overrides=heads)
    by_name = TiTok.from_pretrained("someone/titok", overrides=heads)
    with pytest.raises(CheckpointError, match=r"no model can be built.*ZeroDivisionError"):
        TiTok.from_pretrained("someone/titok")  # narrower than one published head
    assert fingerprint(by_file) == fingerprint(by_name)
    assert by_file.metadata["provenance"]["source"] == "someone/titok/titok.bin"
    message = r"'someone/other' here; HF_HUB_OFFLINE is set.*`hf download someone/other`"
    with pytest.raises(CheckpointError, match=message):
        load_model("someone/other")
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        load_model("someone/titok/other.bin")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("RepositoryNotFoundError", "knows no such model"),
        ("GatedRepoError", "accept terms"),
        ("RevisionNotFoundError", "no such revision"),
        ("LocalEntryNotFoundError", "check the name and the connection"),
    ],
)
def test_hub_errors_say_what_to_do(monkeypatch, kind, message):
    def fail(*args, **kwargs):
        error = getattr(errors, kind)
        raise error.__new__(error)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(CheckpointError, match=message):
        load_model("someone/other")


def test_published_names_are_importable_from_the_top():
    import flextok

    assert flextok.TiTok is TiTok
    assert {flextok.GPT, flextok.MaskGIT} == set(GENERATORS.values())
    assert {flextok.FlexTok, flextok.TiTok, flextok.MaskGITVQGAN} == set(TOKENIZERS.values())
    for name, model in {**TOKENIZERS, **GENERATORS}.items():
        assert model.model_type == name


def test_loading_draws_nothing(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    before = torch.get_rng_state()
    FlexTok.from_pretrained(tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_overwriting_the_file_of_a_loaded_model_is_safe(tmp_path):
    """A save replaces the file by renaming, so that a mapped old one keeps its pages."""
    model = tiny_tokenizer()
    model.save_pretrained(tmp_path)
    loaded = FlexTok.from_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path)
    assert loaded.encoder.registers.abs().sum() > 0
    loaded.save_pretrained(tmp_path)
    assert fingerprint(FlexTok.from_pretrained(tmp_path)) == fingerprint(loaded)
