"""Files that must not load: foreign classes, code, damage, tensors that do not fit."""

import os
import pickle

import pytest
import torch
from golden.titok.load import load_case
from published import golden_flextok_weights, tiny_tree, write_flextok, write_titok
from safetensors.torch import save_file

from flextok.hub import CheckpointError
from flextok.pipeline import load_model


@pytest.fixture(scope="module")
def flextok_weights():
    return golden_flextok_weights()


@pytest.mark.parametrize("place", ["metadata", "config.json"])
def test_a_foreign_class_is_refused_by_name(tmp_path, flextok_weights, place):
    tree = tiny_tree()
    trace = tmp_path / "trace"
    tree["encoder"]["module_dict"]["enc_patch_emb"] |= {
        "_target_": "os.system",
        "command": f"touch {trace}",
    }
    layout = "one" if place == "metadata" else "beside"
    folder = write_flextok(tmp_path / "model", flextok_weights, tree, layout)
    with pytest.raises(CheckpointError, match=r"'os\.system' \(.*enc_patch_emb\).*refused"):
        load_model(folder)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("enc_transformer", "depth", 3, "enc_transformer.depth = 3"),
        ("enc_seq_packer", "mask_mode", "full", "enc_seq_packer.mask_mode = 'full'"),
        ("dec_time_embedder", "max_timestep", "high", "max_timestep = 'high'"),
        ("dec_nested_dropout", "size_sampling_mode", "odd", "unknown nested dropout 'odd'"),
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
        load_model(write_flextok(tmp_path, flextok_weights, tree))


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
            load_model(folder, "meta")


def test_messages_name_the_tensor(tmp_path, flextok_weights):
    key = "decoder.module_dict.dec_transformer.blocks.1.mlp.fc3.weight"
    state = dict(flextok_weights)
    drop(state, key)
    with pytest.raises(CheckpointError, match=r"'decoder\.blocks\.1\.mlp\.fc3\.weight' is missing"):
        load_model(write_flextok(tmp_path, state))
    state = dict(flextok_weights)
    reshape(state, key)
    with pytest.raises(
        CheckpointError, match=r"is float \[682, 128\], expected float \[341, 128\]"
    ):
        load_model(write_flextok(tmp_path, state))
    save_file({"surprise": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"no layout that this package knows.*'surprise'"):
        load_model(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ('{"model_type": "flextok", "config": {}, "metadata": [1]}', "metadata must be a mapping"),
        ('{"model_type": ["flextok"], "config": {}}', "no layout that this package knows"),
        ('{"model_type": "os.system", "config": {}}', "unknown model type 'os.system'"),
        ("[" * 100_000, "damaged"),
        ('{"a": {"_target_": ["os.system"]}}', "no layout that this package knows"),
    ],
)
def test_odd_configs_are_refused(tmp_path, document, message):
    save_file({"surprise": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(document)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_truncated_files_are_refused(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    weights = load_case("titok_micro_vq_nonlegacy")[0]
    (save_file if suffix == ".safetensors" else torch.save)(weights, path)
    whole = path.read_bytes()
    for length in (0, 7, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"truncated or damaged|damaged or hostile"):
            load_model(path)


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
        load_model(path)
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
        load_model(tmp_path / "model.bin")


def test_a_folder_with_two_weight_files_asks_which(tmp_path):
    for name in ("a.bin", "b.bin"):
        torch.save({"a": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"several weight files \(a\.bin, b\.bin\)"):
        load_model(tmp_path)
