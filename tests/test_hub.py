import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from golden.titok.load import load_case
from helpers.models import TITOK, VQGAN, tiny_gpt, tiny_tokenizer
from huggingface_hub import ModelCard, errors
from safetensors.torch import load_file, save_file

from flextok.card import public_name
from flextok.files import atomic_write
from flextok.generators import GENERATORS, GPT
from flextok.hub import CheckpointError, fingerprint
from flextok.nn.devices import one_device
from flextok.pipeline import load, load_tokenizer_of, remember_tokenizer
from flextok.places import written_reference
from flextok.tokenizers import (
    TOKENIZERS,
    FlexTok,
    MaskGITVQGAN,
    TiTok,
    TiTokConfig,
    VQGANConfig,
)
from flextok.tokenizers.decoding import DecodeOptions


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
    assert isinstance(load(tmp_path / "gpt"), GPT)
    with pytest.raises(CheckpointError, match="holds a 'gpt' model, not 'flextok'"):
        FlexTok.from_pretrained(tmp_path / "gpt")


def test_half_precision_files_load_as_float32(tmp_path, images):
    tiny_tokenizer().half().save_pretrained(tmp_path)
    loaded = FlexTok.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert FlexTok.from_pretrained(tmp_path, dtype=torch.float16).encoder.head.weight.dtype == (
        torch.float16
    )


OLDER = [
    (tiny_tokenizer, {"nested_dropout": "none", "null_prob": 0.1, "repa": None}, {"ordered": True}),
    (
        lambda: tiny_tokenizer(token_grid=[4, 2]),
        {"nested_dropout": "none", "cross_length": None, "checkpoint_blocks": True},
        {"ordered": False},
    ),
    (
        tiny_tokenizer,
        {"distill": {"num_steps": 3, "teacher_steps": 5}, "batch_lengths": 8},
        {"distilled": True},
    ),
    (
        lambda: TiTok(TiTokConfig(**TITOK)),
        {"nested_dropout": "uniform", "perceptual": {"lpips": 1.0}},
        {"ordered": True},
    ),
    (lambda: TiTok(TiTokConfig(**TITOK)), {"nested_dropout": "none"}, {"ordered": False}),
    (tiny_gpt, {"cond_drop": 0.1, "context_noise": 0.2, "checkpoint_blocks": False}, {}),
]


@pytest.mark.parametrize(("make", "older", "expected"), OLDER)
def test_a_model_saved_with_the_keys_of_its_training_still_loads(tmp_path, make, older, expected):
    """They stood in a model's config before training had objectives of its own."""
    model = make()
    model.save_pretrained(tmp_path)

    def change(header):
        header["config"] = {k: v for k, v in header["config"].items() if k not in expected} | older

    edit(tmp_path / "config.json", change)
    loaded = load(tmp_path)
    assert {key: getattr(loaded.config, key) for key in expected} == expected
    if "distill" in older:
        decode = loaded.config.decode
        assert (decode.num_steps, decode.solver, decode.guidance_scale) == (3, "euler", 1.0)
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in model.state_dict().items())


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
        (lambda d: (d / "config.json").write_text("[]"), "it holds a list, not a mapping"),
        (lambda d: edit(d / "config.json", lambda h: h["config"].update(x=1)), "unknown key 'x'"),
        (
            lambda d: edit(d / "config.json", lambda h: h["config"].update(decoder_depth=3)),
            "decoder_depth=3, but 'decoder.blocks.' states 2",
        ),
        (lambda d: edit(d / "config.json", lambda h: h.update(model_type="os")), "unknown model"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, damage, message):
    tiny_tokenizer().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_a_missing_model_says_what_was_looked_for(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="no model at"):
        load(tmp_path / "nowhere" / "at" / "all")
    with pytest.raises(CheckpointError, match="holds no model"):  # a folder of pictures
        load(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="someone/something"):
        load("someone/something")


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


@pytest.mark.parametrize(
    ("config", "weights", "held"),
    [
        (None, "model.safetensors", "a model as published"),
        (None, "pytorch_model.bin", "a model as published"),
        ("{}", None, "another model's config.json"),
        ('{"model_type": "bert"}', "model.safetensors", "another model's config.json"),
    ],
)
def test_a_model_of_another_program_is_not_written_over(tmp_path, config, weights, held):
    if config:
        (tmp_path / "config.json").write_text(config)
    if weights:
        save_file({"a": torch.zeros(1)}, tmp_path / weights, {"format": "pt"})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"holds {held}.*, which would be lost: name another"):
        tiny_tokenizer().save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("lost", [(), ("config.json",), ("config.json", "README.md")])
def test_a_model_is_written_again_where_it_was_written_before(tmp_path, lost):
    """Also where a killed process wrote its weights and no config."""
    model = tiny_tokenizer()
    model.save_pretrained(tmp_path)
    for name in lost:
        (tmp_path / name).unlink()
    model.metadata["step"] = 3
    model.save_pretrained(tmp_path)
    assert load(tmp_path).metadata == {"step": 3}


def test_a_generator_finds_its_tokenizer_and_refuses_another(tmp_path):
    tokenizer, gpt = tiny_tokenizer(), tiny_gpt()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    remember_tokenizer(gpt, tmp_path / "gpt", tokenizer, str(tmp_path / "tokenizer"))
    gpt.save_pretrained(tmp_path / "gpt")
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("gpt", "tokenizer"):
        (tmp_path / name).rename(moved / name)
    found = load_tokenizer_of(load(moved / "gpt"), moved / "gpt")
    assert fingerprint(found) == fingerprint(tokenizer)
    with torch.no_grad():
        tokenizer.encoder.registers += 1
    tokenizer.save_pretrained(moved / "tokenizer")
    with pytest.raises(CheckpointError, match="is not the one that this generator was trained on"):
        load_tokenizer_of(load(moved / "gpt"), moved / "gpt")


def add_noise(model, prefix):
    """Changes the first weight whose name starts so."""
    with torch.no_grad():
        next(value for key, value in model.state_dict().items() if key.startswith(prefix)).add_(1)


KL = {"name": "kl", "channels": 4, "block_channels": [8, 8], "layers_per_block": 1}
KL["norm_groups"] = 4


def make_tokenizer(kind, **changes):
    torch.manual_seed(0)
    if kind == "titok":
        return TiTok(TiTokConfig(**{**TITOK, **changes}))
    if kind == "maskgit_vqgan":
        return MaskGITVQGAN(VQGANConfig(**{**VQGAN, **changes}))
    return tiny_tokenizer(**changes)


@pytest.mark.parametrize(
    ("kind", "ours", "others"),
    [
        ("flextok", ["decoder."], ["encoder."]),
        ("kl", ["decoder.", "vae.vae.decoder.", "vae.vae.post_quant"], ["vae.vae.encoder."]),
        ("kl", [], ["vae.vae.quant_conv."]),
        ("titok", ["decoder."], ["encoder.", "quantizer."]),
        ("maskgit_vqgan", ["decoder."], ["encoder.", "quantizer."]),
    ],
)
def test_the_codes_are_those_of_what_encodes(kind, ours, others):
    """The decoder's weights name no codes; those of the encoder, the VAE's too, and the codebook
    do."""
    changes = {"vae": KL, "patch_size": 2} if kind == "kl" else {}
    model = make_tokenizer(kind, **changes)
    before = model.codes_id
    assert model.half().codes_id != before  # rounded weights are other ones
    model = make_tokenizer(kind, **changes)
    assert model.codes_id == before
    for prefix in ours:
        add_noise(model, prefix)
        assert model.codes_id == before
    for prefix in others:
        changed = make_tokenizer(kind, **changes)
        add_noise(changed, prefix)
        assert changed.codes_id != before


@pytest.mark.parametrize(
    ("kind", "changes", "same"),
    [
        (
            "flextok",
            {"decode": {"num_steps": 3}, "max_timestep": 1.0, "prediction": "x0"},
            True,
        ),
        ("flextok", {"vae": {"name": "identity", "shift": 0, "scale": 1}}, True),  # as by default
        ("flextok", {"vae": {"name": "identity", "scale": 1.5}}, False),
        ("flextok", {"quantizer": {"name": "fsq", "levels": [8, 5, 5], "gain": 0.8}}, False),
        ("flextok", {"quantizer": {"name": "fsq", "levels": [5, 8, 5]}}, False),
        ("flextok", {"head_dim": 8}, False),
        ("titok", {"ordered": True}, True),
        ("titok", {"legacy": True}, False),
        ("titok", {"quantizer": {**TITOK["quantizer"], "commitment": 0.5}}, True),
        ("titok", {"quantizer": {**TITOK["quantizer"], "l2_norm": False}}, False),
        ("maskgit_vqgan", {"norm_groups": 16}, False),
    ],
)
def test_settings_that_decide_an_index_name_the_codes(kind, changes, same):
    """These change no weight, so only the config tells the tokenizers apart."""
    one, other = make_tokenizer(kind), make_tokenizer(kind, **changes)
    other.load_state_dict(one.state_dict())
    assert (one.codes_id == other.codes_id) is same


@pytest.fixture
def family(tmp_path):
    """A generator beside its tokenizer, another decoder of the same codes, and other codes."""
    tokenizer, gpt = tiny_tokenizer(), tiny_gpt()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    remember_tokenizer(gpt, tmp_path / "gpt", tokenizer, str(tmp_path / "tokenizer"))
    gpt.save_pretrained(tmp_path / "gpt")
    distilled = tiny_tokenizer(distilled=True, decode=DecodeOptions(2, guidance_scale=1.0))
    add_noise(distilled, "decoder.")
    distilled.save_pretrained(tmp_path / "distilled")
    add_noise(tokenizer, "encoder.")
    tokenizer.save_pretrained(tmp_path / "other")
    return tmp_path


def make_old(folder):
    """The generator as it was saved when it held the hash of all of its tokenizer's weights."""
    weights = fingerprint(load(folder / "tokenizer"))

    def change(header):
        del header["metadata"]["codes_id"]
        header["metadata"]["tokenizer_fingerprint"] = weights

    edit(folder / "gpt" / "config.json", change)


@pytest.mark.parametrize("old", [False, True])
def test_a_generator_takes_every_decoder_of_its_codes(family, old):
    if old:
        make_old(family)
    gpt = load(family / "gpt")
    own = load_tokenizer_of(gpt, family / "gpt")
    found = load_tokenizer_of(gpt, family / "gpt", str(family / "distilled"))
    assert fingerprint(found) != fingerprint(own)
    with pytest.raises(CheckpointError, match=r"other' \(codes \w+\) is not the one that this gen"):
        load_tokenizer_of(gpt, family / "gpt", str(family / "other"))
    with pytest.raises(CheckpointError, match="is a gpt model, not a tokenizer"):
        load_tokenizer_of(gpt, family / "gpt", str(family / "gpt"))


def test_a_generator_saved_elsewhere_finds_its_tokenizer(family, tmp_path):
    elsewhere = tmp_path / "far" / "away" / "gpt"
    gpt = load(family / "gpt")
    gpt.save_pretrained(elsewhere)
    found = load_tokenizer_of(load(elsewhere), elsewhere)
    assert fingerprint(found) == fingerprint(load(family / "tokenizer"))
    for name in ("config.json", "README.md"):
        assert str(tmp_path) not in (elsewhere / name).read_text()
    assert "tokenizer |" not in (elsewhere / "README.md").read_text()


def test_a_generator_without_its_tokenizer_asks_for_one(family, tmp_path):
    place = tmp_path / "alone" / "gpt"
    shutil.copytree(family / "gpt", place)
    with pytest.raises(
        CheckpointError, match=r"'\.\./tokenizer', where none is: name one .* by --t"
    ):
        load_tokenizer_of(load(place), place)
    found = load_tokenizer_of(load(place), place, str(family / "distilled"))
    assert found.config.distilled


def test_a_copy_of_a_generator_of_the_package_finds_the_package_s_tokenizer(releases, tmp_path):
    for name in ("copied", "saved"):
        place = tmp_path / name
        if name == "copied":
            shutil.copytree(releases / "emoji-class", place)
        else:
            load("emoji-class").save_pretrained(place)
        found = load_tokenizer_of(load(place), place)
        assert fingerprint(found) == fingerprint(load("emoji"))


def test_folders_in_a_config_are_relative_to_the_model(tmp_path, monkeypatch):
    """A text encoder's folder, or a VAE's, is found from the model's own folder, wherever the
    process runs, and no absolute path is saved."""
    (tmp_path / "vae").mkdir()
    vae = {**KL, "weights": str(tmp_path / "vae")}
    model = tiny_tokenizer(vae=vae, patch_size=2)
    model.metadata["start"] = {"weights": f"{tmp_path / 'old' / 'tokenizer'} (weights 12ab)"}
    model.save_pretrained(tmp_path / "model")
    stored = json.loads((tmp_path / "model" / "config.json").read_text())
    assert stored["config"]["vae"]["weights"] == "./../vae"
    assert stored["metadata"]["start"]["weights"] == "tokenizer (weights 12ab)"
    assert str(tmp_path) not in (tmp_path / "model" / "README.md").read_text()
    monkeypatch.chdir("/")
    loaded = load(tmp_path / "model")
    assert os.path.samefile(loaded.config.vae["weights"], tmp_path / "vae")
    assert loaded.codes_id == model.codes_id


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
        '"num_registers": 8',
    ):
        assert row in text
    assert "| classes |" not in text  # a tokenizer's data had them; it takes none
    model.metadata["step"] = 3000
    model.save_pretrained(tmp_path)
    assert "| step | 3000 |" in card.read_text()
    card.write_text("# My own words\n")
    model.save_pretrained(tmp_path)
    assert card.read_text() == "# My own words\n"


REPORT = {
    "settings": {"data": "emoji:validation"},
    "results": [
        {"num_tokens": k, "num_steps": 2, "guidance_scale": None, "count": 8, "scores": scores}
        for k, scores in ((1, {"psnr": 12.34567, "kid": 0.5}), (8, {"psnr": 21.5, "kid": 0.25}))
    ],
}


def test_a_card_states_how_rows_differ(tmp_path):
    """Two rows of one length looked alike; data that nobody named was "None"."""
    model, (row, _) = tiny_tokenizer(), REPORT["results"]
    way = {"guidance_scale": 2.5, "scores": {"kid": 0.000012345678}}
    model.add_report(
        {"settings": {"data": None}, "results": [{**row, "num_steps": 4}, {**row, **way}]}
    )
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "| data | tokens | steps | guidance | images | psnr | kid |" in card.text
    assert "|  | 1 | 4 |  | 8 | 12.3457 | 0.5 |" in card.text
    assert "|  | 1 | 2 | 2.5 | 8 |  | 1.23457e-05 |" in card.text
    names = [(r.dataset_name, r.metric_name) for r in card.data.eval_results]
    assert ("unnamed", "psnr, 1 tokens, 4 steps") in names
    assert ("unnamed", "kid, 1 tokens, 2 steps, 2.5 guidance") in names


def test_the_hub_reads_the_card(tmp_path):
    """Its own parser finds what the model is, what it was made from and how good it is."""
    model = tiny_tokenizer()
    model.metadata["start"] = {"weights": "someone/larger (weights abc)"}
    model.metadata["provenance"] = {"license": "Research: use only"}
    model.metadata["datasets"] = ["someone/pictures"]
    path = tmp_path / "report.json"
    path.write_text(json.dumps(REPORT))
    model.add_report(path)
    model.save_pretrained(tmp_path / "model")
    card = ModelCard.load(tmp_path / "model" / "README.md")
    found = card.data
    assert found.tags == ["flextok"]
    assert (found.pipeline_tag, found.library_name) == ("image-to-image", "flextok")
    assert (found.base_model, found.datasets) == ("someone/larger", ["someone/pictures"])
    assert (found.license, found.license_name) == ("other", "research-use-only")
    scores = [(r.dataset_name, r.metric_name, r.metric_value) for r in found.eval_results]
    assert ("emoji:validation", "psnr, 1 tokens", 12.3457) in scores
    assert len(scores) == 4
    assert "| emoji:validation | 8 | 8 | 21.5 | 0.25 |" in card.text
    again = load(tmp_path / "model")
    assert again.metadata["evaluation"] == model.metadata["evaluation"]
    with pytest.raises(ValueError, match="no report of flextok evaluate"):
        model.add_report({"results": []})


@pytest.mark.parametrize(
    ("name", "task"),
    [("class", "unconditional-image-generation"), ("text", "text-to-image")],
)
def test_a_generator_s_card_names_its_task(tmp_path, monkeypatch, name, task):
    encoder = {"name": "bytes", "dim": 16, "depth": 1, "num_heads": 2}
    options = {"encoder": encoder} if name == "text" else {"num_classes": 3}
    gpt = tiny_gpt(conditioner={"name": name, **options})
    gpt.metadata.update(tokenizer="someone/tokenizer", class_names=["a", "b", "c"])
    gpt.save_pretrained(tmp_path / "hub")
    data = ModelCard.load(tmp_path / "hub" / "README.md").data
    assert (data.pipeline_tag, data.tags) == (task, ["flextok", "gpt"])
    assert data.base_model == "someone/tokenizer"
    assert ("| classes | 3 |" in (tmp_path / "hub/README.md").read_text()) == (name == "class")
    monkeypatch.chdir(tmp_path)
    tiny_tokenizer().save_pretrained("outputs/tokenizer")
    gpt.metadata["tokenizer"] = "outputs/tokenizer"  # a folder is no hub id
    gpt.save_pretrained(tmp_path / "local")
    assert ModelCard.load(tmp_path / "local" / "README.md").data.base_model is None


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
            calls.append((repo_id, files, fingerprint(loaded), commit_message))
            return "https://example.org/commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    model = tiny_tokenizer()
    url = model.push_to_hub("model", private=True, commit_message="First")
    assert url == "https://example.org/commit"
    assert calls == [
        ("token", None),
        ("repo", "model", True, True),
        (
            "me/model",
            ["README.md", "config.json", "model.safetensors"],
            fingerprint(model),
            "First",
        ),
    ]


@pytest.mark.parametrize("reference", [None, "me/tokenizer"])
def test_what_is_pushed_names_no_local_folder(family, monkeypatch, reference):
    pushed = {}

    class Api:
        def __init__(self, token):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, commit_message):
            pushed.update({p.name: p.read_bytes() for p in Path(folder_path).iterdir()})

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    gpt = load(family / "gpt")
    if reference is not None:
        gpt.metadata["tokenizer"] = reference
    gpt.push_to_hub("me/gpt")
    header = json.loads(pushed["config.json"])
    assert header["metadata"].get("tokenizer") == reference
    assert header["metadata"]["codes_id"] == load(family / "tokenizer").codes_id
    assert not any(b"../" in pushed[name] for name in ("config.json", "README.md"))


def cache_model(cache, repo, write):
    """A hub cache as huggingface_hub lays it out, with one snapshot of a model."""
    place = cache / f"models--{repo.replace('/', '--')}"
    commit = "0" * 40
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    write(place / "snapshots" / commit)


def test_what_lies_in_the_hubs_cache_is_named_by_its_id(tmp_path):
    """As the base of adapters is: the cache is this machine's alone."""
    cache_model(tmp_path, "someone/a-model", tiny_tokenizer().save_pretrained)
    (place,) = tmp_path.glob("*/snapshots/*")
    for folder in (tmp_path / "run", None):
        assert written_reference(str(place), Path.cwd(), folder) == "someone/a-model"


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
    with pytest.raises(CheckpointError, match="must be a multiple of num_heads=0"):
        TiTok.from_pretrained("someone/titok")  # narrower than one published head
    assert fingerprint(by_file) == fingerprint(by_name)
    assert by_file.metadata["provenance"]["source"] == "someone/titok/titok.bin"
    message = r"'someone/other' here; HF_HUB_OFFLINE is set.*`hf download someone/other`"
    with pytest.raises(CheckpointError, match=message):
        load("someone/other")
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        load("someone/titok/other.bin")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("RepositoryNotFoundError", "hub has no such model"),
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
        load("someone/other")


def test_hub_options_reach_the_hub(tmp_path, monkeypatch):
    """As users of its other libraries state them; a misspelt one is an error at once, for a local
    folder too."""
    model, asked = tiny_tokenizer(), []
    model.save_pretrained(tmp_path / "models" / "small")

    def download(repo, allow_patterns, **how):
        asked.append((repo, how))
        assert "small/model.safetensors" in allow_patterns
        return str(tmp_path / "models")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    how = {"revision": "v1", "token": "t", "cache_dir": tmp_path, "local_files_only": True}
    for loads in (FlexTok.from_pretrained, load):
        loaded = loads("someone/models", subfolder="small", **how)
        assert fingerprint(loaded) == fingerprint(model)
    assert asked == [("someone/models", how)] * 2
    local = FlexTok.from_pretrained(tmp_path / "models", subfolder="small")
    assert fingerprint(local) == fingerprint(model)
    with pytest.raises(CheckpointError, match="has no folder 'large'"):
        load(tmp_path / "models", subfolder="large")
    with pytest.raises(TypeError, match="revison"):
        load(tmp_path / "models" / "small", revison="v1")


def test_the_local_cache_alone_is_asked(tmp_path):
    message = "local_files_only is set and the local cache does not hold it: .*hf download"
    with pytest.raises(CheckpointError, match=message):
        load("someone/model", cache_dir=tmp_path, local_files_only=True)


def test_device_and_dtype_by_the_names_of_other_libraries(tmp_path, monkeypatch):
    tiny_tokenizer().half().save_pretrained(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    loaded = FlexTok.from_pretrained(tmp_path, device_map="auto", torch_dtype="auto")
    assert (loaded.device.type, loaded.encoder.head.weight.dtype) == ("cpu", torch.float16)
    loaded = load(tmp_path, device_map={"": "meta"}, torch_dtype=torch.bfloat16)
    assert (loaded.device.type, loaded.encoder.head.weight.dtype) == ("meta", torch.bfloat16)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert one_device("auto").type == "mps"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert one_device("auto").type == "cuda"
    with pytest.raises(ValueError, match="must name one device"):
        load(tmp_path, device_map={"encoder": 0, "decoder": 1})
    with pytest.raises(ValueError, match="dtype='half' must be a torch"):
        load(tmp_path, torch_dtype="half")


def test_a_model_in_bfloat16_encodes_and_decodes(tmp_path, images):
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = FlexTok.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    made = loaded.decode(loaded.encode(images), num_steps=2, generator=torch.Generator())
    assert made.dtype == torch.float32
    assert made.isfinite().all()


@pytest.fixture
def sharded(tmp_path):
    """A model whose weights are spread over two files, as other libraries save large ones."""
    model = tiny_tokenizer()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(state)
    places = {}
    for number, some in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: state[name] for name in some}, tmp_path / file)
        places |= dict.fromkeys(some, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_weights_spread_over_files_load(sharded):
    assert fingerprint(load(sharded)) == fingerprint(tiny_tokenizer())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update(first="../model.safetensors"), "no safetensors file beside it"),
        (lambda w: w.update(first="/etc/passwd"), "no safetensors file beside it"),
        (lambda w: w.update(more="model-00001-of-00002.safetensors"), "such as 'more'"),
        (lambda w: w.pop(next(iter(w))), "does not list what its files hold"),
        (lambda w: w.update(x="model-00003-of-00002.safetensors"), "is missing"),
        (lambda w: w.clear(), "has no weight_map"),
    ],
)
def test_a_damaged_index_is_refused(sharded, change, message):
    edit(sharded / "model.safetensors.index.json", lambda h: change(h["weight_map"]))
    with pytest.raises(CheckpointError, match=message):
        load(sharded)


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


@pytest.mark.parametrize(
    ("data", "public"),
    [
        ("/home/anna/clients/acme", "acme"),
        ("~/clients/acme/", "acme"),
        ("pictures/clients/acme", "acme"),
        ("./acme", "acme"),
        ("../acme/shard-{000..009}.tar", "shard-{000..009}.tar"),
        ("clients/acme.tar", "acme.tar"),
        (r"C:\Users\anna\acme", "acme"),
        ("file:///home/anna/acme.tar", "acme.tar"),
        ("{name: folder, root: /home/anna/clients/acme}", "{name: folder, root: acme}"),
        ("{name: folder, root: clients/acme}", "{name: folder, root: acme}"),
        (r"{name: folder, root: C:\Users\anna\acme}", "{name: folder, root: acme}"),
        ("{'name': 'folder', 'root': '/home/anna/acme'}", "{name: folder, root: acme}"),
        ("{name: huggingface, path: /home/anna/acme}", "{name: huggingface, path: acme}"),
        ("[{name: folder, root: /a/b}, {name: emoji}]", "[{name: folder, root: b}, {name: emoji}]"),
        (r'{name: folder, root: "C:\Users\anna\acme"}', 'acme"}'),  # no YAML
        *((same, same) for same in (
            "emoji:validation",
            "someone/pictures",
            "{name: huggingface, path: someone/pictures, split: test}",
            "https://example.org/a/b.tar",
            "the model's own validation data",
        )),
    ],
)  # fmt: skip
def test_no_path_of_this_machine_reaches_the_card(tmp_path, data, public):
    model = tiny_tokenizer()
    model.add_report({**REPORT, "settings": {"data": data}})
    rows = model.metadata["evaluation"]
    assert [row["data"] for row in rows] == [public, public]
    old = tiny_tokenizer()  # as saved by a version that kept the path
    old.metadata["evaluation"] = [{**row, "data": data} for row in rows]
    model.save_pretrained(tmp_path / "new")
    old.save_pretrained(tmp_path / "old", public=True)
    for name in ("README.md", "config.json"):
        text = (tmp_path / "old" / name).read_text()
        assert text == (tmp_path / "new" / name).read_text()
        assert not any(place in text for place in ("anna", "clients", "Users"))


def test_a_folder_that_looks_like_a_hub_id_is_cut_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clients" / "acme").mkdir(parents=True)
    assert public_name("clients/acme") == "acme"
    spec = "{name: huggingface, path: clients/acme}"
    assert public_name(spec) == "{name: huggingface, path: acme}"


def test_windows_paths_in_metadata_are_cut(tmp_path):
    model = tiny_tokenizer()
    model.metadata["places"] = [r"C:\Users\anna\acme", "/home/anna/acme", "a/b", "c: d"]
    assert model.written_metadata(tmp_path)["places"] == ["acme", "acme", "a/b", "c: d"]
