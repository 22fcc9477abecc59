"""Published layouts through from_pretrained: golden parity, round trips, full size."""

import ast
import json
from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest
import torch
from golden.titok.load import close, load_case
from helpers.models import DRAWER, tiny_tokenizer
from helpers.published import (
    GOLDEN,
    flextok_tree,
    golden_flextok_weights,
    measure,
    memory,
    tiny_tree,
    titok_document,
    write_flextok,
    write_full_size,
    write_titok,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flextok import cli
from flextok.generators import GPT, MaskGIT
from flextok.generators.text import Text
from flextok.hub import CheckpointError, fingerprint, look_up, override
from flextok.pipeline import load
from flextok.quantizers import QUANTIZERS
from flextok.schema import to_mapping
from flextok.tokenizers import FlexTok, FlexTokConfig, MaskGITVQGAN, TiTok
from flextok.vae import KLVAE


@pytest.fixture(scope="module")
def flextok_weights():
    return golden_flextok_weights()


@pytest.fixture(scope="module")
def golden_flextok():
    return load_file(GOLDEN / "flextok" / "tokenizer_golden.safetensors")


@pytest.mark.parametrize("layout", ["one", "sections", "literals", "beside"])
@torch.no_grad()
def test_flextok_golden_parity(tmp_path, flextok_weights, golden_flextok, layout):
    model = FlexTok.from_pretrained(write_flextok(tmp_path, flextok_weights, layout=layout))
    golden = golden_flextok
    codes, indices, _ = model.quantizer(model.encoder(golden["latents"]))
    assert torch.equal(indices, golden["fsq_indices"])
    keep = torch.tensor([64, 64])
    registers, _ = model.decoder.embed_codes(codes, keep)
    velocity = model.velocity(golden["flow_xt"], golden["flow_sigma"], registers)
    close(velocity, golden["velocity_k64"], 1e-5)
    pictures = model.decode(indices, noise=golden["ode_noise"], num_steps=4)
    expected = model.vae.decode(golden["ode_s4_apg7.5_k64"]).clamp(-1, 1)  # APG 7.5 is our default
    close(pictures, expected, 1e-4)
    assert model.metadata["provenance"]["assumed"] == []


@torch.no_grad()
def test_flextok_max_timestep_comes_from_the_file_or_the_caller(
    tmp_path, flextok_weights, golden_flextok, caplog
):
    golden, one = golden_flextok, tiny_tree()

    def velocity(model):
        registers, _ = model.decoder.embed_codes(golden["fsq_quant"], torch.tensor([64, 64]))
        return model.velocity(golden["flow_xt"], golden["flow_sigma"], registers)

    section = one["decoder"]["module_dict"]["dec_time_embedder"]
    section["max_timestep"] = 1.0
    expected = golden["velocity_k64_max_timestep_1"]
    file = write_flextok(tmp_path / "one", flextok_weights, one)
    close(velocity(FlexTok.from_pretrained(file)), expected, 1e-5)
    file = write_flextok(tmp_path / "thousand", flextok_weights)
    model = FlexTok.from_pretrained(file, overrides={"max_timestep": 1, "vae.scaling_factor": 0.5})
    close(velocity(model), expected, 1e-5)
    assert model.vae.scaling_factor == 0.5
    del section["max_timestep"]
    del one["vae"]["scaling_factor"]
    file = write_flextok(tmp_path / "silent", flextok_weights, one)
    with caplog.at_level("INFO"):
        model = FlexTok.from_pretrained(file)
    assert (model.config.max_timestep, model.vae.scaling_factor) == (1000.0, 1.0)
    assert "max_timestep = 1000.0 (the published class's default)" in caplog.text
    assert len(model.metadata["provenance"]["assumed"]) == 2
    with pytest.raises(CheckpointError, match="unknown key 'max_timesteps'"):
        FlexTok.from_pretrained(file, overrides={"max_timesteps": 1})


def test_flextok_without_a_config_goes_by_its_shapes(tmp_path, flextok_weights):
    save_file(flextok_weights, tmp_path / "plain.safetensors")
    plain = FlexTok.from_pretrained(tmp_path / "plain.safetensors")
    full = FlexTok.from_pretrained(write_flextok(tmp_path / "full", flextok_weights))
    assert plain.config == full.config
    assert len(plain.metadata["provenance"]["assumed"]) == 3


def test_full_size_trees_give_the_published_configs():
    tree = flextok_tree((1152, 18), (1792, 28))
    assert tree["decoder"]["module_dict"]["dec_transformer"]["depth"] == 28
    assert flextok_tree() == json.loads((GOLDEN / "flextok" / "config_d12_d12.json").read_text())


@torch.no_grad()
def test_a_published_file_is_written_as_it_was(tmp_path, flextok_weights, golden_flextok):
    """Golden numbers both ways: the tensors and the config of a published file come back bit by
    bit, as Python literals, and give the same tokens and pictures."""
    model = FlexTok.from_pretrained(write_flextok(tmp_path / "published", flextok_weights))
    model.save_pretrained(tmp_path / "ours")
    command = ["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "published"]
    assert cli.main(command) == 0
    with safe_open(tmp_path / "back" / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    written = load_file(tmp_path / "back" / "model.safetensors")
    assert written.keys() == flextok_weights.keys()
    assert all(torch.equal(written[key], value) for key, value in flextok_weights.items())
    sections = {key: value for key, value in metadata.items() if key != "format"}
    assert {key: ast.literal_eval(value) for key, value in sections.items()} == tiny_tree()
    again = FlexTok.from_pretrained(tmp_path / "back" / "model.safetensors")
    assert again.config == model.config
    assert again.metadata["provenance"]["assumed"] == []
    latents, noise = golden_flextok["latents"], golden_flextok["ode_noise"]
    indices = again.quantizer(again.encoder(latents))[1]
    assert torch.equal(indices, golden_flextok["fsq_indices"])
    made = [m.decode(indices[:, :5], noise=noise, num_steps=2) for m in (model, again)]
    assert torch.equal(*made)


def test_what_the_published_layout_does_not_have_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no vae\.name='identity', only 'kl'"):
        tiny_tokenizer(vae={"name": "identity"}).save_published(tmp_path)
    assert not list(tmp_path.iterdir())


KL = {"name": "kl", "channels": 4, "block_channels": [32], "layers_per_block": 1}
FSQ = {"name": "fsq", "levels": [8, 5]}
# keys of FlexTokConfig, and of its VAE and quantizer: other values than in a tiny model
KEPT = {
    "image_size": 32,
    "patch_size": 8,
    "num_registers": 5,
    "head_dim": 8,
    "encoder_depth": 1,
    "encoder_dim": 64,
    "decoder_depth": 1,
    "decoder_dim": 64,
    "max_timestep": 7.0,
    "vae.channels": 3,
    "vae.block_channels": [32, 64],
    "vae.layers_per_block": 2,
    "vae.scaling_factor": 0.5,
    "quantizer.levels": [4, 4, 4],
}
REFUSED = {
    "shapes": [[32, 16]],
    "token_grid": [4, 2],
    "ordered": False,
    "drop_mode": "truncate",
    "prediction": "x0",
    "drawer": DRAWER,
    "distilled": True,
    "vae.norm_groups": 4,
    "vae.latents_mean": [0.1] * 4,
    "vae.latents_std": [2.0] * 4,
    "quantizer.eps": 0.1,
    "quantizer.bound": "ifsq",
    "quantizer.gain": 2.0,
}
LEFT_OUT = {  # they say how it began, which the tensors hold, and how it is used
    "position_temperature": 50.0,
    "token_std": 1.0,
    "register_start": "spread",
    "decode": {"num_steps": 3},
    "length_head": {"metric": "psnr", "lengths": [1, 8]},
    "vae.sample_posterior": True,
    "vae.weights": None,
    "vae.slicing": True,
    "vae.tiling": True,
    "vae.sample_size": 64,
}


def test_every_key_of_a_model_is_kept_in_a_published_file_or_refused_or_left_out():
    keys = {field.name for field in fields(FlexTokConfig)} - {"vae", "quantizer"}
    keys |= {f"vae.{key}" for key in signature(KLVAE).parameters}
    keys |= {f"quantizer.{key}" for key in signature(QUANTIZERS["fsq"]).parameters}
    assert keys == KEPT.keys() | REFUSED.keys() | LEFT_OUT.keys()


def changed_tokenizer(key, value):
    return tiny_tokenizer(**override({"vae": KL, "quantizer": FSQ}, {key: value}))


@pytest.mark.parametrize("key", [*KEPT, *LEFT_OUT])
def test_a_published_file_reads_back_as_the_same_model(tmp_path, key):
    model = changed_tokenizer(key, (KEPT | LEFT_OUT)[key])
    model.save_published(tmp_path)
    again = FlexTok.from_pretrained(tmp_path)
    if key in KEPT:
        assert look_up(to_mapping(again.config), key) == KEPT[key]
    written, read = model.state_dict(), again.state_dict()
    assert all(torch.equal(read.pop(name), written[name]) for name in list(read))
    images = torch.rand(1, 3, model.config.image_size, model.config.image_size) * 2 - 1
    assert torch.equal(again.encode(images), model.encode(images, sample_posterior=False))


@pytest.mark.parametrize("key", REFUSED)
def test_a_published_file_never_states_another_model(tmp_path, key):
    model = changed_tokenizer(key, REFUSED[key])
    with pytest.raises(ValueError, match=f"the published layout has no {key}="):
        model.save_published(tmp_path)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_titok_golden_parity(tmp_path):
    weights, io = load_case("titok_tiny")
    head_dim = {"head_dim": weights["latent_tokens"].shape[1] // 2}
    write_titok(tmp_path, "titok_tiny", weights)
    torch.save(weights, tmp_path / "tokenizer.bin")
    torch.save({"model": weights}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for path in (tmp_path, tmp_path / "tokenizer.bin", tmp_path / "old.bin"):
        model = TiTok.from_pretrained(path, overrides=head_dim)
        assert torch.equal(model.encode(io["image"] * 2 - 1), io["indices"][:, 0])
        codes = model.quantizer.indices_to_codes(io["indices"][:, 0])
        close((model.decode_codes(codes)[..., ::4, ::4] + 1) / 2, io["decoded_4"], 1e-4)


@pytest.mark.parametrize(
    "name", ["titok_micro_vq_nonlegacy", "titok_micro_vae_nonlegacy", "tatitok_micro_vq"]
)
@torch.no_grad()
def test_single_stage_titok_golden_parity(tmp_path, name):
    weights, io = load_case(name)
    head_dim = {"head_dim": weights["latent_tokens"].shape[1] // 2}
    folder = write_titok(tmp_path, name, weights)
    model = TiTok.from_pretrained(folder, overrides=head_dim)
    image = io["image"] * 2 - 1
    codes = model.encode_codes(image)
    if not model.is_continuous:
        assert torch.equal(model.encode(image), io["indices"][:, 0])
    pictures = model.decode_codes(codes, text=io.get("text_guidance"))
    close((pictures[..., ::2, ::2] + 1) / 2, io["decoded_2"], 1e-4)


def test_first_stage_titok_and_the_legacy_flag(tmp_path):
    weights, _ = load_case("titok_tiny")
    weights = {k: v for k, v in weights.items() if not k.startswith("pixel_")}
    folder = write_titok(tmp_path, "titok_tiny", weights, finetune_decoder=False)
    model = load(folder)
    assert (model.config.stage, model.config.legacy) == ("proxy", True)
    folder = write_titok(tmp_path, "titok_tiny", weights, is_legacy=False)
    assert not load(folder).config.legacy


@torch.no_grad()
def test_vqgan_golden_parity(tmp_path):
    encoder, io = load_case("maskgit_vqgan_tiny_encoder")
    titok, titok_io = load_case("titok_tiny")
    names = {"pixel_decoder": "decoder", "pixel_quantize": "quantize"}
    parts = ((key.partition("."), value) for key, value in titok.items())
    state = {f"{names[p]}.{rest}": v for (p, _, rest), v in parts if p in names}
    torch.save(encoder | state, tmp_path / "maskgit-vqgan.bin")
    path = tmp_path / "maskgit-vqgan.bin"
    model = MaskGITVQGAN.from_pretrained(path, overrides={"image_size": 64})
    assert torch.equal(model.encode(titok_io["image"] * 2 - 1), io["codes"])


@pytest.mark.parametrize("name", ["imagebert_tiny", "uvitbert_tiny"])
@torch.no_grad()
def test_maskgit_golden_parity(tmp_path, name):
    weights, io = load_case(name)
    model = MaskGIT.from_pretrained(write_titok(tmp_path, name, weights))
    assert model.config.num_heads == 4  # which the shapes do not tell
    close(model(io["input_ids"], io["labels"])[..., ::4], io["logits_cond_4"], 1e-4)


@torch.no_grad()
def test_ar_golden_parity(tmp_path):
    golden = load_file(GOLDEN / "flextok" / "ar_golden.safetensors")
    weights = load_file(GOLDEN / "flextok" / "ar_c2i_state_dict.safetensors")
    save_file(weights, tmp_path / "ar.safetensors")
    model = GPT.from_pretrained(tmp_path / "ar.safetensors")
    greedy = model.generate(golden["class"], temperature=0, guidance_scale=1)
    assert torch.equal(greedy, golden["greedy_no_cfg"])
    assert "left_out" not in model.metadata["provenance"]
    save_file(
        {**weights, "models.image_tokenizer.encoder.x": torch.zeros(3)},
        tmp_path / "with_tokenizer.safetensors",
    )
    both = GPT.from_pretrained(tmp_path / "with_tokenizer.safetensors")
    assert fingerprint(both) == fingerprint(model)
    left_out = both.metadata["provenance"]["left_out"]
    assert left_out == "1 tensors of its tokenizer or text encoder"


@torch.no_grad()
def test_text_ar_golden_parity_and_its_mlp(tmp_path):
    golden = load_file(GOLDEN / "flextok" / "ar_golden.safetensors")
    weights = load_file(GOLDEN / "flextok" / "ar_t2i_state_dict.safetensors")
    text = Text(golden["t2i_text_embeddings"], golden["t2i_text_valid"].bool())
    save_file(weights, tmp_path / "plain.safetensors")
    plain = GPT.from_pretrained(tmp_path / "plain.safetensors")
    assert plain.config.generate.guidance_scale == 3
    close(plain(golden["ids"][:, :-1], text), golden["t2i_tf_logits"], 1e-5)
    assert any("flan-t5-xl" in point for point in plain.metadata["provenance"]["assumed"])

    draws = torch.Generator().manual_seed(0)
    first, second, bias = (torch.randn(n, generator=draws) for n in ((24, 20), (32, 24), 24))
    with_mlp = {
        **weights,
        "models.some.name.second.weight": second,  # before the first: the shapes decide
        "models.some.name.first.weight": first,
        "models.some.name.first.bias": bias,
        "models.text.encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(4, 4),
        "models.text.shared.weight": torch.zeros(4, 4),
    }
    save_file(with_mlp, tmp_path / "mlp.safetensors")
    model = GPT.from_pretrained(tmp_path / "mlp.safetensors")
    assert model.conditioner.encoder.dim == 20
    assert model.metadata["provenance"]["left_out"].startswith("2 tensors")
    raw = Text(torch.randn(2, 6, 20, generator=draws), text.mask)
    hidden = torch.nn.functional.gelu(raw.values @ first.T + bias, approximate="tanh")
    expected = plain(golden["ids"][:, :-1], Text(hidden @ second.T, text.mask))
    close(model(golden["ids"][:, :-1], raw), expected, 1e-4)

    save_file({**with_mlp, "models.x.weight": bias + 1}, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match="unknown published key"):
        GPT.from_pretrained(tmp_path / "more.safetensors")


@torch.no_grad()
def test_flextok_round_trip_is_bit_identical(tmp_path, flextok_weights, capsys):
    source = write_flextok(tmp_path / "published", flextok_weights)
    assert cli.main(["convert", str(source), str(tmp_path / "ours")]) == 0
    assert "wrote" in capsys.readouterr().out
    ours = FlexTok.from_pretrained(tmp_path / "ours")
    theirs = FlexTok.from_pretrained(source)
    assert ours.config == theirs.config
    assert ours.metadata == theirs.metadata
    assert ours.codes_id == theirs.codes_id
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    indices = theirs.encode(images)
    assert torch.equal(ours.encode(images), indices)
    first, second = (
        model.decode(indices[:, :9], num_steps=2, generator=torch.Generator().manual_seed(0))
        for model in (ours, theirs)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["titok_tiny", "imagebert_tiny", "uvitbert_tiny"])
@torch.no_grad()
def test_round_trip_of_the_others_is_bit_identical(tmp_path, name):
    weights, io = load_case(name)
    torch.save(weights, tmp_path / "published.bin")
    changed = {"head_dim": 32} if name == "titok_tiny" else {"num_heads": 4}
    theirs = load(tmp_path / "published.bin", overrides=changed)
    pairs = [f"{key}={value}" for key, value in changed.items()]
    command = ["convert", str(tmp_path / "published.bin"), str(tmp_path / "ours"), *pairs]
    assert cli.main(command) == 0
    ours = load(tmp_path / "ours")
    assert ours.config == theirs.config
    if name == "titok_tiny":
        images = io["image"] * 2 - 1
        indices = theirs.encode(images)
        assert torch.equal(ours.encode(images), indices)
        assert torch.equal(ours.decode(indices), theirs.decode(indices))
        assert ours.codes_id == theirs.codes_id
    else:
        arguments = io["input_ids"], io["labels"]
        assert torch.equal(ours(*arguments), theirs(*arguments))


def test_info(tmp_path, flextok_weights, capsys):
    folder = write_flextok(tmp_path / "published", flextok_weights)
    assert cli.main(["info", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model_type"] == "flextok"
    assert facts["vocab_size"] == 64_000
    assert facts["bits_per_image"] == pytest.approx(64 * 15.9658, rel=1e-5)
    assert facts["config"]["max_timestep"] == 1000
    assert facts["parameters"]["total"] == sum(
        facts["parameters"][part] for part in ("vae", "encoder", "decoder")
    )
    assert facts["metadata"]["provenance"]["source"] == "published"
    assert cli.main(["info", str(folder)]) == 0
    text = capsys.readouterr().out
    for line in ("bits per image  1,022 (128 bytes)", "license         research use only"):
        assert line in text
    assert cli.main(["info", str(tmp_path)]) == 1
    assert "holds no model" in capsys.readouterr().err
    assert cli.main(["convert", str(folder), str(tmp_path / "out"), "max_timestep"]) == 1
    assert "must look like key=value" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["l32", "b64", "s128"])
def test_titok_documents_agree_with_the_shapes(tmp_path, name):
    write_full_size(tmp_path, f"titok_{name}", random=False)
    model = load(tmp_path, "meta")
    assert (model.num_tokens, model.config.stage) == (int(name[1:]), "finetune")
    document = titok_document(name, codebook_size=8192)
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="codebook_size = 8192, the weights have 4096"):
        load(tmp_path, "meta")


linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")


@pytest.mark.slow
@linux
@pytest.mark.parametrize("name", ["flextok_d12_d12", "titok_s128"])
def test_full_size_models_load_encode_and_decode(tmp_path, name):
    size = write_full_size(tmp_path, name)
    result = measure(tmp_path, name)
    assert result["peak"] - result["before"] < 1.1 * size
    if name.startswith("titok"):  # diffusers imports it for the other
        assert not result["compiler"], "building on meta imported PyTorch's compiler: 9 s"


@pytest.mark.slow
@linux
def test_the_largest_model_loads_without_a_copy(tmp_path):
    """d18-d28, 10 GB as a sparse file: weights stay pages of their file. published.py also reads
    them all: the peak is then 1.09 of their size, libraries included."""
    before = memory("RssAnon")
    size = write_full_size(tmp_path, "flextok_d18_d28", random=False)
    assert size > 10e9
    model = load(tmp_path)
    assert sum(p.numel() for p in model.parameters()) * 4 == size
    assert model.config.decoder_dim == 1792
    assert memory("RssAnon") - before < 0.05 * size
