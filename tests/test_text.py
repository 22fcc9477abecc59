"""Text encoders, frozen ones and the one over bytes, and the cache of what they make."""

import io
import json
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.files import png
from helpers.models import save_encoder, t5, tiny_tokenizer
from torch.utils.data import Subset
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    ByT5Tokenizer,
    CLIPConfig,
    CLIPModel,
    T5EncoderModel,
)

from flextok.data.datasets import HuggingFaceImages, WebDatasetImages
from flextok.data.parts import PartStore
from flextok.data.processes import Process
from flextok.data.stream import collate
from flextok.data.text import TextCache, build_text_cache
from flextok.data.tokens import TokenDataset, build_token_cache
from flextok.data.transforms import ImageTransform
from flextok.generators.conditioning import TEXT_ENCODERS
from flextok.generators.text import (
    ByteEncoder,
    PretrainedEncoder,
    Text,
    hidden_size,
    load_encoder,
)
from flextok.generators.words import PIECES, WordEncoder
from flextok.hub import CheckpointError
from flextok.registry import DATASETS

PROMPTS = ["a red heart", "", "a bomb left of a whale"]
SMALL = {"vocab_size": 384, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def bert():
    return BertModel(BertConfig(**SMALL, intermediate_size=32))


def clip():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**SMALL, "intermediate_size": 32, "eos_token_id": 1}
    vision = {**sizes, "intermediate_size": 32, "image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def bart():
    sizes = {f"{half}_{key}": n for half in ("encoder", "decoder") for key, n in
             {"layers": 1, "attention_heads": 2, "ffn_dim": 32}.items()}  # fmt: skip
    return BartModel(BartConfig(vocab_size=384, d_model=16, max_position_embeddings=64, **sizes))


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("t5"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_an_encoder_with_code_of_its_own_is_refused(tmp_path, monkeypatch, name):
    """It is neither run nor offered: nobody is asked on standard input."""
    folder, trace = save_encoder(tmp_path / "encoder"), tmp_path / "trace"
    (folder / "code.py").write_text(f"open({str(trace)!r}, 'w').close()")
    document = json.loads((folder / name).read_text())
    document["auto_map"] = {"AutoConfig": "code.Config", "AutoTokenizer": ["code.T", None]}
    document["model_type"] = "theirs"
    (folder / name).write_text(json.dumps(document))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    for read in (hidden_size, load_encoder):
        with pytest.raises(CheckpointError, match=rf"{name} asks to run code of its own .*refused"):
            read(str(folder), None)
    assert not trace.exists()


def test_bytes_are_byt5s():
    heart, null = ByteEncoder(dim=16, depth=1, num_heads=2).rows(["é♥", ""])
    assert heart.tolist() == [b + 3 for b in "é♥".encode()] + [1]
    assert null.tolist() == [1]


def test_words_are_known_by_themselves_and_their_trigrams():
    encoder = WordEncoder(dim=16, depth=1, num_heads=2, buckets=10**6)  # no collisions
    row, null = encoder.rows(["Red hearts, o'clock!", ""])
    assert row.shape == (8, PIECES)  # red hearts , o ' clock ! and the end mark
    assert torch.equal(row[-1:], null)
    heart = encoder.rows(["heart"])[0][0]
    common = set(row[1].tolist()) & set(heart.tolist()) - {0}
    assert len(common) == 4  # <he hea ear art
    assert not set(row[0].tolist()) & set(heart.tolist()) - {0}
    long = encoder.rows(["x".join("abcdefghijklmnop")])[0]
    assert (long[0] > 0).all()
    assert int(row.max()) <= 10**6


@torch.no_grad()
def test_a_word_of_similar_form_is_read_similarly():
    torch.manual_seed(0)
    encoder = WordEncoder(dim=64, depth=1, num_heads=2).eval()

    def read(word):
        return encoder(Text.pad(encoder.rows([word])))[0, 0]

    near, far = (torch.cosine_similarity(read("heart"), read(w), 0) for w in ("hearts", "bomb"))
    assert near > far + 0.2


@pytest.mark.parametrize("make", [ByteEncoder, WordEncoder])
def test_all_of_a_trained_encoder_is_trained(make):
    encoder = make(dim=16, depth=2, num_heads=2)
    encoder(Text.pad(encoder.rows(PROMPTS))).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("make", [ByteEncoder, WordEncoder])
def test_an_over_long_prompt_keeps_its_end_mark(make):
    encoder = make(dim=16, depth=1, num_heads=2, max_length=4)
    long, null = encoder.rows(["one two three four five", ""])
    assert len(long) == 4
    assert torch.equal(long[-1:], null)


def test_an_over_long_prompt_is_cut_with_a_warning_that_says_how_much(caplog):
    encoder = ByteEncoder(dim=16, depth=1, num_heads=2, max_length=8)
    rows = encoder.rows(["x" * 7, "y" * 20, "z" * 9])
    assert "2 of 3 prompts are longer than max_length=8 tokens and are cut, 'yyy" in caplog.text
    assert "by 13" in caplog.text
    assert [len(row) for row in rows] == [8, 8, 8]
    assert rows[1].tolist() == [ord("y") + 3] * 7 + [1]
    caplog.clear()
    encoder.rows(["x" * 7])
    assert not caplog.text


@pytest.mark.parametrize("make", [t5, bert, clip, bart])
@torch.no_grad()
def test_any_encoder_by_name_alone_or_padded(tmp_path, make):
    encoder = PretrainedEncoder(str(save_encoder(tmp_path, make)))
    assert encoder.dim == 16  # from its config
    assert not list(encoder.parameters())
    together = encoder.rows(PROMPTS)
    assert [len(row) for row in together] == [12, 1, 23]
    for prompt, row in zip(PROMPTS, together, strict=True):
        torch.testing.assert_close(encoder.rows([prompt])[0], row, atol=1e-5, rtol=1e-5)
    network = load_encoder(str(tmp_path), None)[0]
    ids = torch.tensor([[b + 3 for b in PROMPTS[0].encode()] + [1]])
    expected = network(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(together[0], expected, atol=1e-5, rtol=1e-5)
    if make is bart:  # its encoder, not what the decoder makes of it
        assert not hasattr(network, "decoder")


def test_a_t5_folder_gives_t5s_own_numbers(t5_folder):
    model = T5EncoderModel.from_pretrained(t5_folder).eval()
    ids = ByT5Tokenizer()(PROMPTS[2], return_tensors="pt").input_ids
    row = PretrainedEncoder(str(t5_folder)).rows([PROMPTS[2]])[0]
    torch.testing.assert_close(row, model(ids).last_hidden_state[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [ByteEncoder, WordEncoder])
def test_trained_encoder_ignores_padding(make):
    torch.manual_seed(0)
    encoder = make(dim=16, depth=2, num_heads=2).eval()
    rows = encoder.rows(PROMPTS)
    together = encoder(Text.pad(rows))
    for i, row in enumerate(rows):
        alone = encoder(Text.pad([row]))[0]
        torch.testing.assert_close(together[i, : len(row)], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "gives no text encoder"),
        (lambda f: (f / "config.json").unlink(), "does not state the width"),
        (lambda f: shutil.copy(f / "bert.safetensors", f / "model.safetensors"), "lacks weights"),
        # it then was a T5's without words, and all prompts were the same
        (lambda f: (f / "tokenizer_config.json").unlink(), "has no vocabulary"),
    ],
)
def test_damaged_encoders_are_refused(t5_folder, tmp_path, damage, message):
    folder = tmp_path / "copy"
    shutil.copytree(t5_folder, folder)
    bert().save_pretrained(tmp_path / "bert")
    shutil.copy(tmp_path / "bert" / "model.safetensors", folder / "bert.safetensors")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        PretrainedEncoder(str(folder)).rows(["x"])


def test_a_missing_encoder_offline_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"`hf download google/flan-t5-xl`.*\{name: bytes\}"):
        PretrainedEncoder(dim=2048).rows(["x"])
    with pytest.raises(CheckpointError, match="hf download"):
        PretrainedEncoder()  # to learn its width


def test_a_hub_encoder_is_known_by_its_commit(t5_folder, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = "0123456789012345678901234567890123456789"
    cache = tmp_path / "models--someone--t5"
    shutil.copytree(t5_folder, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    encoder = PretrainedEncoder("someone/t5")
    assert encoder.identity() == {"encoder": "someone/t5", "revision": commit, "max_length": 128}
    local = PretrainedEncoder(str(t5_folder)).rows(PROMPTS)
    assert all(torch.equal(a, b) for a, b in zip(encoder.rows(PROMPTS), local, strict=True))


def test_a_folder_with_other_files_is_not_the_pinned_revision(t5_folder, tmp_path):
    revision = PretrainedEncoder(str(t5_folder)).identity()["revision"]
    assert PretrainedEncoder(str(t5_folder), revision).rows(["x"])
    torch.manual_seed(1)
    t5().save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"is not the one of revision {revision}"):
        PretrainedEncoder(str(tmp_path), revision)


def test_batches_of_text():
    a, b = Text.pad([torch.arange(3), torch.arange(1)]), Text.pad([torch.arange(5)])
    assert a.mask.tolist() == [[True] * 3, [True, False, False]]
    joined = a.join(b)
    assert len(joined) == 3
    assert joined.mask.sum(dim=1).tolist() == [3, 1, 5]
    assert torch.equal(b.join(a).values[0], joined.values[2])
    replaced = a.replace(torch.tensor([True, False]), torch.tensor([7, 8, 9, 9]))
    assert replaced.values[0].tolist() == [7, 8, 9, 9]
    assert replaced.mask.sum(dim=1).tolist() == [4, 1]
    wide = Text(torch.ones(2, 3, 4), a.mask).replace(torch.tensor([False, True]), torch.zeros(1, 4))
    assert wide.values.sum().item() == 12
    assert torch.equal(a[1:].mask, a.mask[1:])


@pytest.mark.parametrize("kind", ["pretrained", "bytes", "words"])
def test_cached_rows_are_the_encoders(t5_folder, tmp_path, kind, monkeypatch):
    options = {"model": str(t5_folder)}
    if kind != "pretrained":
        options = {"dim": 16, "depth": 1, "num_heads": 2}
    encoder = TEXT_ENCODERS[kind](**options)
    captions = [*PROMPTS, PROMPTS[0], "a key", "a star"]
    cache = build_text_cache(tmp_path, encoder, captions, part_size=2)
    assert len(cache) == 5  # each once, and ""
    for caption, row in zip(captions, encoder.rows(captions), strict=True):
        torch.testing.assert_close(cache[caption].to(row.dtype), row, atol=2e-3, rtol=1e-3)
    # an interrupted build makes the missing part only
    (tmp_path / "part-000001.safetensors").unlink()
    asked = []
    original = type(encoder).rows

    def rows(self, prompts, device="cpu"):
        asked.extend(prompts)
        return original(self, prompts, device)

    monkeypatch.setattr(type(encoder), "rows", rows)
    again = build_text_cache(tmp_path, encoder, captions, part_size=2)
    assert asked == ["a bomb left of a whale", "a key"]
    assert torch.equal(again["a key"], cache["a key"])


def test_a_changed_bit_of_a_cached_row_is_noticed(tmp_path, caplog):
    encoder = TEXT_ENCODERS["bytes"](dim=16, depth=1, num_heads=2)
    build_text_cache(tmp_path, encoder, PROMPTS)
    part = tmp_path / "part-000000.safetensors"
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"part-000000\.safetensors is damaged"):
        TextCache(PartStore.open(tmp_path, "caption cache"))
    build_text_cache(tmp_path, encoder, PROMPTS)
    assert part.read_bytes() == whole
    assert "part-000000.safetensors is damaged" in caplog.text


def test_processes_share_the_reading_of_captions(tmp_path, monkeypatch):
    encoder = ByteEncoder(dim=16, depth=1, num_heads=2)
    asked: list[tuple[str, ...]] = []
    original = ByteEncoder.rows

    def rows(self, prompts, device="cpu"):
        asked.append(tuple(prompts))
        return original(self, prompts, device)

    monkeypatch.setattr(ByteEncoder, "rows", rows)
    captions = [f"number {i}" for i in range(9)]

    def build(rank):
        process = Process(rank, 3)
        return build_text_cache(tmp_path, encoder, captions, part_size=2, process=process)

    with ThreadPoolExecutor(3) as pool:
        caches = list(pool.map(build, range(3)))
    assert sorted(sum(asked, ())) == sorted(["", *captions])  # each once
    for cache in caches:
        assert all(torch.equal(cache[c], original(encoder, [c])[0]) for c in captions)


@pytest.mark.parametrize("kind", ["emoji", "emoji_scenes", "webdataset", "huggingface"])
def test_captions_of_every_data_set_reach_the_cache(tmp_path, kind):
    """Those of folders: test_training.py."""
    if kind == "webdataset":
        with tarfile.open(tmp_path / "shard.tar", "w") as tar:
            for name, content in {
                "a.png": png(),
                "a.txt": b"a caf\xc3\xa9",
                "b.png": png(),
                "b.json": json.dumps({"caption": "two words"}).encode(),
                "c.png": png(),
            }.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        dataset = WebDatasetImages(str(tmp_path / "shard.tar"), label_key=None)
        expected = ["a café", "two words", ""]
    elif kind == "huggingface":
        datasets = pytest.importorskip("datasets")
        pictures = [{"bytes": png(), "path": None}] * 3
        words = [["one", "another"], [], None]
        table = datasets.Dataset.from_dict({"image": pictures, "words": words})
        table.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "saved"))
        dataset = HuggingFaceImages(
            str(tmp_path / "saved"), label_column=None, caption_column="words"
        )
        expected = ["one", "", ""]
    else:
        full = DATASETS[kind](split="validation")
        dataset = Subset(full, range(3))
        dataset.class_names = full.class_names
        expected = [full[i]["caption"] for i in range(3)]
        assert len(set(expected)) == 3
    tokenizer, transform = tiny_tokenizer(), ImageTransform(16)
    build_token_cache(tmp_path / "tokens", tokenizer, dataset, transform, {})
    tokens = TokenDataset(tmp_path / "tokens")
    assert tokens.captions == expected
    encoder = ByteEncoder(dim=16, depth=1, num_heads=2)
    tokens.text = build_text_cache(tmp_path / "text", encoder, tokens.captions)
    batch = collate([tokens[i] for i in range(3)])
    for caption, row, mask in zip(expected, batch["text"].values, batch["text"].mask, strict=True):
        assert row[mask].tolist() == [b + 3 for b in caption.encode()] + [1]


def test_a_cache_made_by_another_encoder_is_refused(t5_folder, tmp_path):
    encoder = PretrainedEncoder(str(t5_folder))
    build_text_cache(tmp_path / "cache", encoder, PROMPTS)
    other = save_encoder(tmp_path / "other", bert)
    changes = {
        "encoder, revision": (PretrainedEncoder(str(other)), PROMPTS),
        "max_length": (PretrainedEncoder(str(t5_folder), max_length=64), PROMPTS),
        "captions, length": (encoder, ["something else"]),
    }
    for names, (encoder, captions) in changes.items():
        with pytest.raises(ValueError, match=rf"caption cache .*\({names} differ\): delete it"):
            build_text_cache(tmp_path / "cache", encoder, captions)
    moved = tmp_path / "moved"  # the same name, other weights
    shutil.copytree(t5_folder, moved)
    build_text_cache(tmp_path / "second", PretrainedEncoder(str(moved)), PROMPTS)
    torch.manual_seed(1)
    t5().save_pretrained(moved)
    with pytest.raises(ValueError, match=r"\(revision differ\)"):
        build_text_cache(tmp_path / "second", PretrainedEncoder(str(moved)), PROMPTS)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="max_length=1"):
        ByteEncoder(max_length=1)
    with pytest.raises(ValueError, match="dim=10 must be a multiple of num_heads=4"):
        ByteEncoder(dim=10)
    with pytest.raises(ValueError, match="dim=0"):
        WordEncoder(dim=0)
    with pytest.raises(ValueError, match="buckets=0"):
        WordEncoder(buckets=0)
