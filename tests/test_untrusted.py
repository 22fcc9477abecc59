"""Files that must not load: foreign classes, code, damage, tensors that do not fit."""

import json
import os
import pickle
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from golden.titok.load import load_case
from helpers.models import TITOK, VQGAN, tiny_gpt, tiny_tokenizer
from helpers.published import golden_flextok_weights, tiny_tree, write_flextok, write_titok
from safetensors.torch import save_file

from flextok.cli import main
from flextok.generators import MaskGIT, MaskGITConfig
from flextok.hub import CheckpointError
from flextok.pipeline import load
from flextok.places import parse_metadata
from flextok.storage import read_tensors
from flextok.tokenizers import MaskGITVQGAN, TiTok, TiTokConfig, VQGANConfig


@pytest.fixture(scope="module")
def flextok_weights():
    return golden_flextok_weights()


@pytest.mark.parametrize("place", ["metadata", "literals", "config.json"])
def test_a_foreign_class_is_refused_by_name(tmp_path, flextok_weights, place):
    tree = tiny_tree()
    trace = tmp_path / "trace"
    tree["encoder"]["module_dict"]["enc_patch_emb"] |= {
        "_target_": "os.system",
        "command": f"touch {trace}",
    }
    layout = {"metadata": "one", "config.json": "beside"}.get(place, place)
    folder = write_flextok(tmp_path / "model", flextok_weights, tree, layout)
    with pytest.raises(CheckpointError, match=r"'os\.system' \(.*enc_patch_emb\).*refused"):
        load(folder)
    assert not trace.exists()


@pytest.mark.filterwarnings("error")
def test_literals_in_metadata_are_data_and_never_run(tmp_path):
    trace = tmp_path / "trace"
    call = f"__import__('pathlib').Path({str(trace)!r}).touch()"
    good = {"e": {"a": (1, None, True), "b": ["x"]}}
    hostile = [
        call,
        f"{{'a': {call}}}",
        f"{{{call}: 1}}",
        "{'x':" * 9_000,
        "{" + "-" * 90_000 + "1}",
    ]
    hostile += ["{'a': 1}" + " " * 200_000, "{1if 1else 2}", "{'a': 1 + b}", "{}.b", "{'a'"]
    texts = {"e": str(good["e"]), "format": "pt"} | dict(enumerate(hostile))
    assert parse_metadata(texts) == [good, good["e"]]
    assert not trace.exists()


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("enc_transformer", "depth", 3, "enc_transformer.depth = 3"),
        ("enc_seq_packer", "mask_mode", "full", "enc_seq_packer.mask_mode = 'full'"),
        ("dec_time_embedder", "max_timestep", "high", "max_timestep = 'high'"),
        ("enc_transformer", "head_dim", 32, "dec_transformer.head_dim = 64"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    tmp_path, flextok_weights, section, key, value, message
):
    tree = tiny_tree()
    part = "encoder" if section.startswith("enc") else "decoder"
    tree[part]["module_dict"][section][key] = value
    with pytest.raises(CheckpointError, match=message):
        load(write_flextok(tmp_path, flextok_weights, tree))


def drop(state, key):
    del state[key]


def add(state, key):
    state[f"{key}.extra"] = torch.zeros(2)


def reshape(state, key):
    state[key] = torch.cat([state[key], state[key]])


def retype(state, key):
    state[key] = state[key].long()


@pytest.mark.parametrize("damage", [drop, add, reshape, retype])
@pytest.mark.parametrize("name", ["flextok", "titok_tiny", "imagebert_tiny", "uvitbert_tiny"])
def test_every_tensor_must_fit(tmp_path, flextok_weights, name, damage):
    """Whichever tensor it is: each of some, spread over the model, is damaged in turn."""
    whole = flextok_weights if name == "flextok" else load_case(name)[0]
    keys = list(whole)
    for key in [*keys[:: len(keys) // 6], keys[-1]]:
        state = dict(whole)
        damage(state, key)
        if name == "flextok":
            folder = write_flextok(tmp_path, state)
        else:
            folder = write_titok(tmp_path, name, state)
        with pytest.raises(CheckpointError):
            load(folder, "meta")


def test_messages_name_the_tensor(tmp_path, flextok_weights):
    key = "decoder.module_dict.dec_transformer.blocks.1.mlp.fc3.weight"
    state = dict(flextok_weights)
    drop(state, key)
    with pytest.raises(CheckpointError, match=r"'decoder\.blocks\.1\.mlp\.fc3\.weight' is missing"):
        load(write_flextok(tmp_path, state))
    state = dict(flextok_weights)
    reshape(state, key)
    with pytest.raises(
        CheckpointError, match=r"is float \[682, 128\], expected float \[341, 128\]"
    ):
        load(write_flextok(tmp_path, state))
    save_file({"surprise": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"no layout that this package reads.*'surprise'"):
        load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ('{"model_type": "flextok", "config": {}, "metadata": [1]}', "metadata must be a mapping"),
        ('{"model_type": ["flextok"], "config": {}}', "no layout that this package reads"),
        ('{"model_type": "os.system", "config": {}}', "unknown model type 'os.system'"),
        ("[" * 100_000, "damaged"),
        ('{"a": {"_target_": ["os.system"]}}', "no layout that this package reads"),
    ],
)
def test_odd_configs_are_refused(tmp_path, document, message):
    save_file({"surprise": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(document)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_truncated_files_are_refused(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    weights = load_case("titok_micro_vq_nonlegacy")[0]
    (save_file if suffix == ".safetensors" else torch.save)(weights, path)
    whole = path.read_bytes()
    for length in (0, 7, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"truncated or damaged|damaged or hostile"):
            load(path)


class Payload:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("wrap", ["zip", "old", "bare"])
def test_a_pickle_with_code_is_refused_and_leaves_no_trace(tmp_path, suffix, wrap):
    trace, path = tmp_path / "trace", tmp_path / f"model{suffix}"
    content = {"latent_tokens": torch.zeros(2, 2), "payload": Payload(trace)}
    if wrap == "bare":
        path.write_bytes(pickle.dumps(Payload(trace), protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=wrap == "zip")
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert not trace.exists()
    assert "weights_only" not in str(caught.value)  # torch's own advice is to allow code
    if suffix != ".safetensors":
        assert "its pickle names 'posix.mkdir', and only plain tensors" in str(caught.value)
    if wrap == "bare":
        pickle.loads(path.read_bytes())
        assert trace.exists()  # the payload was a live one


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "holds a list, not tensors"),
        ({"a": 1}, "holds a int under 'a'"),
        ({3: torch.zeros(1)}, "holds a Tensor under 3"),
    ],
)
def test_only_named_tensors_are_read(tmp_path, content, message):
    torch.save(content, tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "model.bin")


def test_a_folder_with_two_weight_files_asks_which(tmp_path):
    for name in ("a.bin", "b.bin"):
        torch.save({"a": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"several weight files \(a\.bin, b\.bin\)"):
        load(tmp_path)


def nested():
    return torch.nested.as_nested_tensor([torch.ones(2), torch.ones(3)])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.empty(3, device="meta"), r"tensor without data \(meta\)"),
        (nested, "nested tensor"),
        (lambda: torch.eye(3).to_sparse(), "sparse tensor"),
        (lambda: torch.eye(3).to_sparse_csr(), "sparse tensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8), "quantized"),
        (lambda: torch.ones(1).expand(10**6, 10**6), "1,000,000,000,000 elements, more than are"),
        (lambda: torch.arange(9.0).as_strided((8, 8), (1, 0)), "64 elements, more than are stored"),
    ],
)
def test_a_pickle_s_tensors_are_numbers_that_lie_in_it(tmp_path, make, kind):
    torch.save({"good": torch.ones(2), "odd": make()}, tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match=rf"holds a .*{kind}.* under 'odd'"):
        load(tmp_path / "model.bin")


@pytest.mark.parametrize("part", ["data/0", "data/2", "data.pkl"])
def test_a_flipped_bit_in_a_pickle_is_found(tmp_path, part):
    """Three of four flipped bits once loaded as another number."""
    path = tmp_path / "model.bin"
    torch.save({f"t{i}": torch.randn(5, 4) for i in range(3)}, path)
    with zipfile.ZipFile(path) as file:
        name = next(n for n in file.namelist() if n.endswith(part))
        content = file.read(name)
    raw = bytearray(path.read_bytes())
    place = raw.index(content) + len(content) // 2
    raw[place] ^= 4
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=f"its part '.*{part}' fails its checksum"):
        read_tensors(path)


def test_a_pickle_written_without_checksums_loads(tmp_path):
    state = {"a": torch.randn(5, 4)}
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "model.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_tensors(tmp_path / "model.bin")[0]["a"], state["a"])


def pack_again(source, target, method, change=lambda entry: None):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in sorted(old.namelist()):
            entry = zipfile.ZipInfo(name)
            entry.compress_type = method
            change(entry)
            new.writestr(entry, old.read(name))


def test_a_pickle_that_was_packed_again_is_read_right_or_refused(tmp_path):
    """Its tensors are mapped as they lie in the file: a compressed one would be noise."""
    state = {f"t{i}": torch.randn(50, 40 + i) for i in range(5)}
    torch.save(state, tmp_path / "model.bin")
    again = tmp_path / "again.bin"
    pack_again(tmp_path / "model.bin", again, zipfile.ZIP_STORED)  # reordered and unaligned
    found, _ = read_tensors(again)
    assert all(torch.equal(found[key], value) for key, value in state.items())
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        pack_again(tmp_path / "model.bin", again, method)
        with pytest.raises(CheckpointError, match=r"its entry '.*' is compressed"):
            read_tensors(again)

    def only_one(entry):  # as a packer that compresses where it gains by it
        if not entry.filename.endswith("data/3"):
            entry.compress_type = zipfile.ZIP_STORED

    pack_again(tmp_path / "model.bin", again, zipfile.ZIP_DEFLATED, only_one)
    with pytest.raises(CheckpointError, match=r"its entry 'model/data/3' is compressed"):
        read_tensors(again)
    again.write_bytes((tmp_path / "model.bin").read_bytes())
    with zipfile.ZipFile(again, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("model/data/0", bytes(8000))
    with pytest.raises(CheckpointError, match=r"'model/data/0' is there twice"):
        read_tensors(again)


def header_of(shape, size):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
    text = json.dumps({"a": entry}).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("begins", "length", "message"),
    [
        (b"", 1 << 40, "truncated or damaged"),
        (b"\xff" * 8, 1 << 40, "truncated or damaged"),
        (header_of([4], 16), 1 << 40, "file not fully covered"),
        (header_of([4], 16), 20, "truncated or damaged"),
        (struct.pack("<Q", 4) + b"[[[[", 12, "invalid JSON in header"),
        (struct.pack("<Q", 9) + b'{"a": {}}', 17, "missing field"),
    ],
)
def test_weights_that_are_not_what_they_claim(tmp_path, begins, length, message):
    """A sparse file of a terabyte is refused by its header, and not mapped."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(begins)
    os.truncate(path, length)
    with pytest.raises(CheckpointError, match=message):
        load(path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "terabyte"])
def test_no_pipe_is_waited_for(tmp_path, name, kind, capsys):
    tiny_tokenizer().save_pretrained(tmp_path)
    if name == "pytorch_model.bin":
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    elif kind == "folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 1 << 40)
    assert main(["info", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path) in error


@pytest.mark.parametrize("name", ["pipe.bin", "a/pipe.bin", "a/b/pipe.safetensors", "a/pipe"])
def test_a_pipe_is_no_hub_id(tmp_path, monkeypatch, name):
    """A relative path with slashes was asked of the hub."""
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(name)
    monkeypatch.setattr("flextok.places.from_hub", lambda *asked: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match=f"{name} is no regular file"):
        load(name)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"tokenizer": 5}, "metadata.tokenizer=5 must be of type str"),
        ({"tokenizer": ["emoji"]}, "metadata.tokenizer"),
        ({"class_names": 3}, "metadata.class_names=3 must be a list"),
        ({"class_names": [1, 2]}, r"metadata.class_names\[0\]=1 must be of type str"),
        ({"class_names": {"a": 1}}, "metadata.class_names"),
        ({"provenance": "me"}, "metadata.provenance='me' must be a mapping"),
        ({"codes_id": 12}, "metadata.codes_id=12"),
        (None, "metadata must be a mapping of keys, got None"),
    ],
)
@pytest.mark.parametrize("command", ["info", "sample"])
def test_metadata_of_another_type(tmp_path, capsys, facts, message, command):
    tiny_gpt().save_pretrained(tmp_path)
    header = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**header, "metadata": facts}))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)
    assert main([command, str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "document",
    ['{"a":' * 60 + "1" + "}" * 60, '{"a": ' + "1" * 5000 + "}", "[" * 900 + "]" * 900],
)
def test_documents_that_no_program_writes(tmp_path, document):
    save_file({"surprise": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(document)
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        load(tmp_path)


def test_escape_sequences_in_metadata_are_printed_escaped(tmp_path, capsys):
    model = tiny_tokenizer()
    model.metadata["note\x1b]0;x\x07"] = "\x1b[2Jgone\nand\u202enrut"
    model.metadata["start"] = {"weights": "a\x9b31m\udce9"}
    model.save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    for text in (capsys.readouterr().out, (tmp_path / "README.md").read_text()):
        assert r"\x1b[2Jgone" in text
        assert r"\u202enrut" in text
        assert not set(text) & {"\x1b", "\x07", "\x9b", "\u202e", "\udce9"}
    os.rename(tmp_path / "model.safetensors", tmp_path / "a\x1b[2J.safetensors")
    (tmp_path / "b.safetensors").touch()
    assert main(["info", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert r"a\x1b[2J.safetensors" in error
    assert "\x1b" not in error


def make_model(kind):
    text = {"name": "text", "encoder": {"name": "words", "dim": 16, "depth": 1, "num_heads": 2}}
    small = {"vocab_size": 9, "num_tokens": 4, "dim": 16, "depth": 1, "num_heads": 2}
    vae = {"name": "kl", "channels": 4, "block_channels": [8], "layers_per_block": 1}
    makers = {
        "flextok": lambda: tiny_tokenizer(),
        "kl": lambda: tiny_tokenizer(vae={**vae, "norm_groups": 4}),
        "titok": lambda: TiTok(TiTokConfig(**TITOK)),
        "maskgit_vqgan": lambda: MaskGITVQGAN(VQGANConfig(**VQGAN)),
        "gpt": lambda: tiny_gpt(),
        "text": lambda: tiny_gpt(conditioner=text),
        "maskgit": lambda: MaskGIT(MaskGITConfig(**small, conditioner={"name": "none"})),
    }
    return makers[kind]()


def numbers_in(config, prefix=()):
    """The place of every number of a config; of a list's, and of what is absent, too."""
    items = config.items() if isinstance(config, dict) else enumerate(config)
    for key, value in items:
        if isinstance(value, dict | list):
            yield from numbers_in(value, (*prefix, key))
        elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            yield (*prefix, key)


@pytest.mark.parametrize(
    "kind", ["flextok", "kl", "titok", "maskgit_vqgan", "gpt", "text", "maskgit"]
)
def test_no_number_of_a_config_costs_time_or_memory(tmp_path, kind):
    """Each number becomes an absurd one in turn: loading refuses it by name, or takes it where it
    decides nothing of the model's size, within seconds; and never with another error."""
    make_model(kind).save_pretrained(tmp_path)
    header = json.loads((tmp_path / "config.json").read_text())
    config = header["config"]
    free = {"step", "weight", "commitment", "codebook_weight"}
    took = {}
    for *parents, last in list(numbers_in(config)):
        place = config
        for key in parents:
            place = place[key]
        whole = place[last]
        for value in (10**9, -32, 0, 10**30, "1", [1], True):
            place[last] = value
            (tmp_path / "config.json").write_text(json.dumps(header))
            began = time.monotonic()
            try:
                load(tmp_path)
            except CheckpointError as error:
                message = str(error)
                names = [str(name) for name in (*parents, last) if isinstance(name, str)]
                if value in (10**9, 10**30) and last not in free:
                    assert names[-1] in message or "does not fit" in message, (names, message)
            took[(*parents, last, str(value))] = time.monotonic() - began
        place[last] = whole
    slowest = max(took, key=took.__getitem__)
    assert took[slowest] < 5, (slowest, took[slowest])


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("flextok", {"encoder_depth": 10**9}, "encoder_depth=1000000000 must be at least 1 and"),
        ("flextok", {"encoder_depth": 400}, "encoder_depth=400, but 'encoder.blocks.' states 2"),
        ("flextok", {"decoder_dim": 4096}, "decoder_dim=4096, but .* states 32"),
        ("flextok", {"head_dim": -32}, "head_dim=-32 must be at least 1"),
        ("flextok", {"head_dim": 64}, "num_heads=0"),
        ("flextok", {"image_size": 65_536}, "does not fit its config: 'decoder.patch_pos'"),
        ("flextok", {"decode": {"num_steps": 10**9}}, "num_steps=1000000000"),
        ("flextok", {"quantizer": {"name": "fsq", "levels": [10**9] * 9}}, r"levels=.* 2\^31"),
        ("flextok", {"decode": {"guidance": {"name": "apg", "u": 3}}}, "unknown key 'u'"),
        ("flextok", {"distill": 5, "decode": 3}, "decode must be a mapping"),
        ("kl", {"vae": {"name": "kl", "block_channels": [8] * 99}}, "block_channels=.* 1 to 8"),
        ("titok", {"num_tokens": 60_000}, "num_tokens=60000, but 'encoder.latent_tokens' states 6"),
        ("titok", {"head_dim": 64}, "num_heads=0"),
        ("maskgit_vqgan", {"multipliers": [1] * 99}, "multipliers=.* 1 to 12"),
        ("gpt", {"num_heads": 0}, "num_heads=0 must be at least 1"),
        ("gpt", {"depth": 300}, "depth=300, but 'blocks.' states 2"),
        (
            "gpt",
            {"conditioner": {"name": "class", "num_classes": 5, "dim": 7}},
            "conditioner.dim=7",
        ),
        ("maskgit", {"generate": {"num_steps": 10**9}}, "num_steps=1000000000"),
    ],
)
def test_sizes_are_held_against_the_tensors_by_name(tmp_path, kind, change, message):
    make_model(kind).save_pretrained(tmp_path)
    header = json.loads((tmp_path / "config.json").read_text())
    header["config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(header))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)
