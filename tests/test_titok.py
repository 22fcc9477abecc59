"""TiTok in all its variants, against the published tokenizers and in itself."""

from dataclasses import replace

import pytest
import torch
from golden.titok.load import close, golden, load_case, published_shapes

from flextok.convert.titok import titok_config, titok_state
from flextok.nn.blocks import recompute_blocks
from flextok.objectives import ProxyCodesObjective, ReconstructionConfig, ReconstructionObjective
from flextok.quantizers.kl import kl_divergence, moments
from flextok.schema import ConfigError, from_mapping
from flextok.tokenizers.titok import TiTok, TiTokConfig
from flextok.tokenizers.vqgan import MaskGITVQGAN, VQGANConfig

MICRO = ["titok_micro_vq_nonlegacy", "titok_micro_vae_nonlegacy", "tatitok_micro_vq"]


def load(name, drop=()):
    """The model of a golden case (all have two heads) and the case's inputs and outputs."""
    weights, io = load_case(name)
    weights = {key: value for key, value in weights.items() if not key.startswith(drop)}
    head_dim = weights["latent_tokens"].shape[1] // 2
    model = TiTok(our_config(weights, head_dim=head_dim)).eval()
    model.load_weights(titok_state(weights), name)
    return model, io


def our_config(weights, section=None, **changes):
    values, _ = titok_config(weights, section)
    return from_mapping(TiTokConfig, {**values, **changes})


def unit(images):
    return (images + 1) / 2


def grid(codes):
    """(B, K, C) as the published (B, C, 1, K)."""
    return codes.transpose(1, 2)[:, :, None]


PROXY = VQGANConfig(
    image_size=16,
    dim=32,
    multipliers=[1, 1, 1],
    num_blocks=1,
    quantizer={"name": "vq", "codebook_size": 12, "dim": 4, "l2_norm": False},
)


def config(**changes):
    """16 px, 4 x 4 patches of 4 px, 6 tokens."""
    sizes = {"encoder_dim": 16, "encoder_depth": 1, "decoder_dim": 16, "decoder_depth": 1}
    defaults = {"image_size": 16, "patch_size": 4, "num_tokens": 6, "head_dim": 8, "proxy": PROXY}
    vq = {"name": "vq", "codebook_size": 32, "dim": 4}
    return TiTokConfig(**{"quantizer": vq, **sizes, **defaults, **changes})


def build(**changes):
    torch.manual_seed(0)
    return TiTok(config(**changes)).eval()


KL = {"name": "kl", "dim": 4}


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_golden_two_stage():
    model, io = load("titok_tiny")
    assert model.config.legacy
    assert model.config.stage == "finetune"
    image = io["image"] * 2 - 1
    indices = io["indices"][:, 0]
    close(grid(model.encoder(io["image"])), io["latents"], 1e-4)
    assert torch.equal(model.encode(image), indices)
    close(grid(model.encode_codes(image)), io["codes"], 1e-5)
    codes = model.quantizer.indices_to_codes(indices)
    logits = model.decoder(codes)  # (B, N, V)
    close(logits.transpose(1, 2).unflatten(2, (4, 4))[:, ::8], io["logits_8"], 1e-4)
    soft = logits.softmax(dim=-1) @ model.pixel_quantizer.codebook
    close(soft.transpose(1, 2).unflatten(2, (4, 4)), io["soft"], 1e-5)
    close(unit(model.decode_codes(codes))[..., ::4, ::4], io["decoded_4"], 1e-3)


@pytest.mark.parametrize("name", MICRO)
@torch.no_grad()
def test_golden_single_stage(name):
    model, io = load(name)
    image, text = io["image"] * 2 - 1, io.get("text_guidance")
    z = model.encoder(io["image"])
    close(grid(z), io["latents_prequant"], 1e-4)
    codes = model.encode_codes(image)
    if model.is_continuous:
        mean, logvar = moments(z)
        close(grid(mean), io["mean"], 1e-4)
        close(grid(logvar), io["logvar_clamped"], 1e-4)
        close(kl_divergence(mean, logvar), io["kl"], 1e-4)
        noise = torch.randn(2, 16, 1, 8, generator=torch.Generator().manual_seed(0))
        close(grid(mean) + (grid(logvar) / 2).exp() * noise, io["sample_seed0"], 1e-4)
    else:
        close(grid(codes), io["quantized_st"], 1e-5)
        assert torch.equal(model.encode(image), io["indices"][:, 0])
        clamped = model.decode(io["indices"][:, 0], text=text)
        close(clamped, model.decode_codes(codes, text=text).clamp(-1, 1), 1e-5)
    close(unit(model.decode_codes(codes, text=text))[..., ::2, ::2], io["decoded_2"], 1e-3)


def test_golden_first_stage():
    model, io = load("titok_tiny", drop=("pixel_",))
    model.train()
    assert model.config.stage == "proxy"
    model.attach_proxy(MaskGITVQGAN(replace(model.config.proxy, image_size=model.image_size)))
    batch = {"image": io["image"] * 2 - 1, "proxy_indices": io["proxy_codes"]}
    losses = ProxyCodesObjective(model)(batch)
    losses["loss"].backward()
    expected = golden()["stage1_loss"]
    assert losses["loss"].item() == pytest.approx(expected["total_loss"], rel=1e-6)
    assert losses["proxy"].item() == pytest.approx(expected["reconstruction_loss"], rel=1e-6)
    assert losses["quantizer"].item() == pytest.approx(expected["quantizer_loss"], rel=1e-6)
    z, alone = model.encoder(io["image"]), model.quantizer
    for part, weights in (("commitment", (0.25, 0.0)), ("codebook", (0.0, 1.0))):
        alone.commitment, alone.codebook_weight = weights
        assert alone(z)[2].item() == pytest.approx(expected[f"{part}_loss"], rel=1e-6)
    names = {key: ours for key in expected["grad_norms"] for ours in titok_state(shaped(key))}
    parameters = dict(model.named_parameters())
    assert set(names.values()) == set(parameters)
    for published, norm in expected["grad_norms"].items():
        gradient = parameters[names[published]].grad
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-5), published


def shaped(key):
    return {key: load_case("titok_tiny")[0][key]}


@pytest.mark.parametrize(
    ("name", "size", "tensors"),
    [
        ("tokenizer_titok_s128", 83_674_639, 308),
        ("tokenizer_titok_b64", 204_814_095, 404),
        ("tokenizer_titok_l32", 641_054_735, 692),
        ("tokenizer_titok_bl128_vq8k", 390_179_988, 459),
        ("tokenizer_titok_bl128_vae_c16", 389_581_940, 458),
    ],
)
def test_published_keys_and_shapes(name, size, tensors):
    published = published_shapes()[name]
    assert len(published) == tensors
    with torch.device("meta"):
        model = TiTok(our_config(published))
    model.load_weights(titok_state(published), name)
    assert sum(p.numel() for p in model.parameters()) == size
    with pytest.raises(ValueError, match="unknown published key 'surprise'"):
        titok_state({**published, "surprise": torch.zeros(1)})


@pytest.mark.parametrize(
    ("name", "sizes", "tokens", "changes"),
    [
        ("s128", ("small", "small"), 128, {"use_l2_norm": True}),
        ("l32", ("large", "large"), 32, {"use_l2_norm": True}),
        (
            "bl128_vq8k",
            ("base", "large"),
            128,
            {"is_legacy": False, "codebook_size": 8192, "token_size": 64},
        ),
        (
            "bl128_vae_c16",
            ("base", "large"),
            128,
            {"is_legacy": False, "quantize_mode": "vae", "token_size": 16},
        ),
    ],
)
def test_published_config_agrees_with_shapes(name, sizes, tokens, changes):
    vq_model = {
        "codebook_size": 4096,
        "token_size": 12,
        "vit_enc_model_size": sizes[0],
        "vit_dec_model_size": sizes[1],
        "vit_enc_patch_size": 16,
        "vit_dec_patch_size": 16,
        "num_latent_tokens": tokens,
        **changes,
    }
    published = published_shapes()[f"tokenizer_titok_{name}"]
    ours, points = titok_config(published, vq_model)
    inferred, inferred_points = titok_config(published)
    assert ours == inferred
    assert points == []
    assert "no config beside the weights" in inferred_points[0]
    vq_model["vit_enc_model_size"] = "giant"
    with pytest.raises(ValueError, match=r"ViT size 'giant'.*known: .*small"):
        titok_config(published, vq_model)
    vq_model["vit_enc_model_size"] = "base" if sizes[0] != "base" else "small"
    with pytest.raises(ValueError, match="the config has ViT size"):
        titok_config(published, vq_model)
    with pytest.raises(ValueError, match="num_latent_tokens = 7, the weights have"):
        titok_config(published, {"num_latent_tokens": 7})


@torch.no_grad()
def test_legacy_layout_mixes_latents(images):
    """The flag changes nothing but the order in which the head reads (K, D) numbers."""
    modern, legacy = build(), build(legacy=True)
    legacy.load_state_dict(modern.state_dict())
    latents = []
    for model in (modern, legacy):
        model.encoder.norm_post.register_forward_hook(lambda *args: latents.append(args[-1]))
        latents.append(model.encoder(unit(images)))
    (x, z, same, mixed) = latents
    assert torch.equal(x, same)
    head = modern.encoder.head
    close(z, head(x), 1e-6)
    close(mixed, head(x.reshape(2, 16, 6).transpose(1, 2)), 1e-6)
    assert not torch.allclose(z, mixed)


@torch.no_grad()
def test_prefixes_decode_after_nested_dropout():
    model = build(ordered=True)
    indices = torch.randint(32, (3, 6))
    for k in range(1, 7):
        prefix = model.decode(indices[:, :k])
        assert prefix.shape == (3, 3, 16, 16)
        assert torch.equal(prefix, model.decode(indices, keep=k))
    ragged = model.decode(indices, keep=torch.tensor([1, 4, 6]))
    for row, k in enumerate((1, 4, 6)):
        close(ragged[row : row + 1], model.decode(indices[row : row + 1, :k]), 1e-5)
    with pytest.raises(ValueError, match=r"keep=7 must be in \[1, 6\]"):
        model.decode(indices, keep=7)


def test_full_length_is_required_without_nested_dropout():
    model, indices = build(), torch.randint(32, (2, 6))
    with pytest.raises(ValueError, match=r"all 6 tokens only, got 5.*nested dropout"):
        model.decode(indices[:, :5])
    with pytest.raises(ValueError, match="all 6 tokens only, got 2"):
        model.decode(indices, keep=torch.tensor([2, 6]))


def test_nested_dropout_decodes_each_length_of_a_batch_apart(images):
    model = build(ordered=True).train()
    objective = ReconstructionObjective(model)
    images = images.repeat(2, 1, 1, 1)[:4]
    seen = []
    model.decoder.register_forward_pre_hook(
        lambda module, args: seen[-1].append((len(args[0]), args[0].shape[1]))
    )
    for seed in range(20):
        seen.append([])
        objective({"image": images}, torch.Generator().manual_seed(seed))
        assert sum(rows for rows, _ in seen[-1]) == 4
        assert len(seen[-1]) == 4
    assert {length for step in seen for _, length in step} == set(range(1, 7))


@pytest.mark.parametrize("quantizer", [{"name": "vq", "codebook_size": 32, "dim": 4}, KL])
def test_shares_of_a_batch_compute_what_the_whole_does(quantizer):
    model = build(ordered=True, quantizer=quantizer).train()
    objective = ReconstructionObjective(model)
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def losses(rows):
        batch = {"image": images[rows], "row": rows}
        return objective(batch, torch.Generator().manual_seed(5))

    whole, shares = losses(range(6)), [losses(range(3)), losses(range(3, 6))]
    for name, value in whole.items():
        torch.testing.assert_close((shares[0][name] + shares[1][name]) / 2, value)


@torch.no_grad()
def test_each_image_is_compared_with_what_became_of_it(images):
    model = build(ordered=True).train()
    images = torch.cat([images, images.flip(0) / 2])
    draws = torch.Generator().manual_seed(0)
    _, images, made = ReconstructionObjective(model).reconstruct({"image": images}, draws)
    codes = model.encode_codes(images)
    lengths = []
    for i in range(4):
        row = slice(i, i + 1)
        errors = [(model.decode_codes(codes[row, :k]) - made[row]).abs().max() for k in range(1, 7)]
        lengths.append(1 + min(range(6), key=errors.__getitem__))
        assert min(errors) < 1e-5
    assert len(set(lengths)) == 4


def test_a_second_stage_without_its_first_does_not_train(images):
    """It trained a decoder for the codes of a random, frozen encoder, and said nothing."""
    model = build(stage="finetune")
    with pytest.raises(ConfigError, match=r"as start.first \(got nothing\)"):
        ReconstructionObjective(model)
    trained = build(stage="finetune")
    trained.load_state_dict(model.state_dict())
    assert ReconstructionObjective(trained)({"image": images})["loss"].isfinite()


@pytest.mark.parametrize("quantizer", ["vq", "kl", "fsq"])
def test_single_stage_trains_everything(images, quantizer):
    spec = {"kl": {"dim": 4}, "fsq": {"levels": [4, 4]}, "vq": {"codebook_size": 32, "dim": 4}}
    model = build(quantizer={"name": quantizer, **spec[quantizer]}).train()
    torch.nn.init.normal_(model.encoder.head.weight)  # so that FSQ leaves its middle code
    calls, objective = [], ReconstructionObjective(model)
    objective.perceptual = lambda ours, theirs: calls.append(theirs) or (ours - theirs).abs().mean()
    losses = objective({"image": images}, torch.Generator().manual_seed(0))
    assert torch.equal(calls[0], images)
    close(losses["loss"], losses["l2"] + losses["perceptual"] + losses["quantizer"], 1e-6)
    losses["loss"].backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused == []


def test_reconstruction_error_is_measured_on_unit_range(images):
    model = build().train()
    losses, _, made = ReconstructionObjective(model).reconstruct({"image": images})
    close(losses["l2"], ((made - images) / 2).square().mean(), 1e-6)


def test_first_stage_learns_its_teacher(images):
    model, teacher = build(stage="proxy"), MaskGITVQGAN(PROXY)
    with pytest.raises(ConfigError, match=r"as start.proxy \(got nothing\)"):
        ProxyCodesObjective(model)
    with pytest.raises(ValueError, match="attach_proxy"):
        model.decode(torch.zeros(1, 6, dtype=torch.long))
    before = set(model.state_dict())
    objective = ProxyCodesObjective(model, proxy=teacher).train()
    assert set(model.state_dict()) == before
    losses = objective({"image": images})
    given = objective({"image": images, "proxy_indices": teacher.encode(images)})
    assert losses["loss"] == given["loss"]
    losses["loss"].backward()
    assert not any(p.requires_grad for p in teacher.parameters())
    assert model.decode(torch.zeros(1, 6, dtype=torch.long)).shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="the proxy has"):
        build(stage="proxy", proxy=VQGANConfig(multipliers=[1, 1, 1])).attach_proxy(teacher)


@torch.no_grad()
def test_spread_latents_first_look_at_places_of_their_own():
    def nearest_patches(init):
        model = build(init=init, encoder_dim=64, image_size=32)  # 8 x 8 patches
        encoder, looks = model.encoder, []
        encoder.blocks[0].attn.qkv.register_forward_hook(lambda _, __, qkv: looks.append(qkv))
        encoder(torch.zeros(1, 3, 32, 32))
        q, k, _ = looks[0][0].chunk(3, dim=-1)
        own = encoder.latent_pos @ encoder.patch_pos[1:].T  # (K, 64): what lies where the latent is
        return torch.stack([own.argmax(dim=-1), (q[65:] @ k[1:65].T).argmax(dim=-1)])

    own, looked_at = nearest_patches("spread")
    assert len(own.unique()) == 6
    steps = (own // 8 - looked_at // 8).abs() + (own % 8 - looked_at % 8).abs()
    assert steps.max() <= 2, steps  # of 14 across the picture
    own, looked_at = nearest_patches("published")
    assert (own != looked_at).sum() > 3


def test_second_stage_starts_from_the_first(images):
    first, teacher = build(stage="proxy"), MaskGITVQGAN(PROXY)
    first.attach_proxy(teacher)
    second = TiTok(replace(first.config, stage="finetune"))
    objective = ReconstructionObjective(second, first=first, proxy=teacher).train()
    second.eval()
    indices = first.encode(images)
    assert torch.equal(second.encode(images), indices)
    close(second.decode(indices), first.decode(indices), 1e-6)
    second.train()
    objective({"image": images})["loss"].backward()
    trained = {n.split(".")[0] for n, p in second.named_parameters() if p.grad is not None}
    assert trained == {"decoder", "pixel_quantizer", "pixel_decoder"}


def test_continuous_models_have_codes_only(images):
    model = build(quantizer={"name": "kl", "dim": 4})
    assert model.vocab_size == 0
    with pytest.raises(ValueError, match="encode_codes"):
        model.encode(images)
    with pytest.raises(ValueError, match="decode_codes"):
        model.decode(torch.zeros(2, 6, dtype=torch.long))
    codes = model.encode_codes(images)
    assert codes.shape == (2, 6, 4)
    assert model.decode_codes(codes).shape == images.shape


def test_text_reaches_the_decoder():
    model = build(text_length=3, text_dim=5)
    indices = torch.zeros(1, 6, dtype=torch.long)
    a, b = (model.decode(indices, text=torch.full((1, 3, 5), v)) for v in (-9.0, 9.0))
    assert not torch.equal(a, b)
    with pytest.raises(ValueError, match=r"text must be features \(1, 3, 5\), got None"):
        model.decode(indices)
    with pytest.raises(ValueError, match="no text input"):
        build().decode(indices, text=torch.zeros(1, 3, 5))


def test_sizes_and_errors(images):
    model = build()
    assert (model.num_tokens, model.vocab_size, model.image_size) == (6, 32, 16)
    assert model.encode(images).shape == (2, 6)
    with pytest.raises(ValueError, match=r"expected \[-1, 1\]"):
        model.encode(images * 3)
    with pytest.raises(ValueError, match=r"span \[0, 32\]"):
        model.decode(torch.tensor([[0, 0, 0, 0, 0, 32]]))
    with pytest.raises(ValueError, match="image_size=18 must be a multiple of patch_size=4"):
        build(image_size=18)
    with pytest.raises(ValueError, match="patch_size=8 must be 4"):
        build(patch_size=8, stage="proxy")
    with pytest.raises(ValueError, match="unknown nested dropout 'tail'"):
        ReconstructionObjective(build(ordered=True), ReconstructionConfig("tail"))
    with pytest.raises(ConfigError, match=r"nested_dropout=uniform .* model\.ordered=true"):
        ReconstructionObjective(build(), ReconstructionConfig("uniform"))
    with pytest.raises(ValueError, match="must be one of 'proxy', 'finetune', 'single'"):
        from_mapping(TiTokConfig, {"stage": "two"})


@pytest.mark.parametrize("stage", ["proxy", "finetune", "single"])
def test_saves_and_loads(images, stage, tmp_path):
    model = build(stage=stage)
    loaded = TiTok.from_pretrained(model.save_pretrained(tmp_path))
    assert loaded.config == model.config
    assert torch.equal(loaded.encode(images), model.encode(images))


def test_recomputed_blocks_change_nothing(images):
    plain, recomputed = build().train(), build().train()
    recompute_blocks(recomputed)
    for model in (plain, recomputed):
        ReconstructionObjective(model)({"image": images})["loss"].backward()
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
