"""Our modules against numbers made by the published implementations with random weights.

The state dicts keep their published names and go through flextok.convert.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flextok.convert.ar import ar_config, ar_state
from flextok.convert.flextok import flextok_state
from flextok.flow import path
from flextok.flow.guidance import GUIDANCE
from flextok.flow.solvers import euler
from flextok.generators import GPT, GPTConfig
from flextok.generators.sampling import filtered_probabilities
from flextok.generators.text import Text
from flextok.objectives import NextTokenObjective
from flextok.schema import from_mapping
from flextok.tokenizers import FlexTok, FlexTokConfig

GOLDEN = Path(__file__).parent / "golden" / "flextok"


def close(ours: torch.Tensor, golden: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, golden, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "tokenizer_golden.safetensors")


def load_tokenizer(max_timestep: float = 1000.0) -> FlexTok:
    """The goldens' model: 16-channel latents of 16x16, 64 registers."""
    config = FlexTokConfig(
        image_size=16,
        num_registers=64,
        encoder_depth=2,
        encoder_dim=64,
        decoder_depth=2,
        decoder_dim=128,
        max_timestep=max_timestep,
        vae={"name": "kl", "block_channels": [32], "channels": 16},
    )
    model = FlexTok(config)
    state = flextok_state(load_file(GOLDEN / "tokenizer_state_dict.safetensors"))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.startswith("vae.") for key in missing)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> FlexTok:
    return load_tokenizer()


def velocity(model, golden, keep, null=None):
    keep, null = torch.tensor(keep), None if null is None else torch.tensor(null)
    registers, mask = model.decoder.embed_codes(golden["fsq_quant"], keep, null)
    return model.decoder(golden["flow_xt"], golden["flow_sigma"], registers, mask)


@torch.no_grad()
def test_encoder_and_fsq(tokenizer, golden):
    z = tokenizer.encoder(golden["latents"])
    close(z, golden["enc_z_pre_fsq"])
    codes, indices, _ = tokenizer.quantizer(z)
    assert torch.equal(indices, golden["fsq_indices"])
    close(codes, golden["fsq_quant"])


def test_fsq_unit_cases(tokenizer, golden):
    fsq = tokenizer.quantizer
    codes, indices, _ = fsq(golden["fsq_unit_z"][None])
    assert torch.equal(indices[0], golden["fsq_unit_indices"])
    close(codes[0], golden["fsq_unit_quant"])
    close(fsq.bound(golden["fsq_unit_z"]), golden["fsq_unit_bounded"])
    close(fsq.indices_to_codes(golden["fsq_probe_indices"]), golden["fsq_probe_codes"])


def test_flow_path(golden):
    close(path.mode(golden["mode_u"], 0.25), golden["mode_sigma_s025"])
    x_t = path.interpolate(golden["latents"], golden["flow_noise"], golden["flow_sigma"])
    close(x_t, golden["flow_xt"])


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "keep", "null"),
    [
        ("velocity_k64", [64, 64], None),
        ("velocity_k1", [1, 1], None),
        ("velocity_k2", [2, 2], None),
        ("velocity_k5_k33", [5, 33], None),
        ("velocity_uncond", [64, 64], [True, True]),
        ("velocity_uncond_sample1_only", [64, 64], [False, True]),
    ],
)
def test_velocity(tokenizer, golden, name, keep, null):
    close(velocity(tokenizer, golden, keep, null).prediction, golden[name])


@torch.no_grad()
def test_velocity_at_the_other_time_scale(golden):
    model = load_tokenizer(max_timestep=1.0)
    close(velocity(model, golden, [64, 64]).prediction, golden["velocity_k64_max_timestep_1"])
    close(velocity(model, golden, [2, 2]).prediction, golden["velocity_k2_max_timestep_1"])


@torch.no_grad()
def test_time_embedding_features_and_loss(tokenizer, golden):
    close(tokenizer.decoder.time_embed(golden["flow_sigma"]), golden["dec_temb"])
    output = velocity(tokenizer, golden, [64, 64])
    close(output.features.view(2, 8, 8, 128), golden["dec_repa_layer1_patches"])
    target = path.velocity_target(golden["latents"], golden["flow_noise"])
    loss = (output.prediction - target).square().mean(dim=(1, 2, 3))
    close(loss, golden["flow_loss_k64_per_sample"])


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "keep", "rule", "scale", "steps"),
    [
        ("ode_s4_g1_k64", [64, 64], "cfg", 1.0, 4),
        ("ode_s4_g3_k64", [64, 64], "cfg", 3.0, 4),
        ("ode_s4_apg7.5_k64", [64, 64], "apg", 7.5, 4),
        ("ode_s4_apg7.5_k1_k16", [1, 16], "apg", 7.5, 4),
        ("ode_s3_gcallable_k8", [8, 8], "cfg", lambda t: 1 + 4 * float(t), 3),
    ],
)
def test_guided_ode(tokenizer, golden, name, keep, rule, scale, steps):
    codes, everyone = golden["fsq_quant"], torch.ones(2, dtype=torch.bool)
    conditional = tokenizer.decoder.embed_codes(codes, torch.tensor(keep))
    null = tokenizer.decoder.embed_codes(codes, torch.tensor(keep), everyone)
    guided = GUIDANCE[rule](
        lambda x, t: tokenizer.velocity(x, t, *conditional),
        lambda x, t: tokenizer.velocity(x, t, *null),
        scale,
    )
    close(euler(guided, golden["ode_noise"], path.linear_times(steps)), golden[name], atol=1e-4)


@pytest.fixture(scope="module")
def gpt() -> GPT:
    config = GPTConfig(
        vocab_size=200,
        num_tokens=16,
        depth=2,
        dim=32,
        conditioner={"name": "class", "num_classes": 10},
    )
    model = GPT(config)
    model.load_weights(ar_state(load_file(GOLDEN / "ar_c2i_state_dict.safetensors")), "golden")
    return model.eval()


@pytest.fixture(scope="module")
def ar() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "ar_golden.safetensors")


@torch.no_grad()
def test_ar_logits(gpt, ar):
    ids, label = ar["ids"], ar["class"]
    close(gpt.join_start(ids[:, :-1], gpt.condition(label)), ar["tf_input_embeddings"])
    close(gpt(ids[:, :-1], label), ar["tf_logits"])
    close(gpt(ids[:, :-1], torch.full_like(label, -1)), ar["tf_logits_uncond"])
    close(NextTokenObjective(gpt)({"indices": ids, "label": label})["loss"], ar["tf_ce_mean"][0])


def test_ar_generation(gpt, ar):
    label = ar["class"]
    greedy = gpt.generate(label, temperature=0, guidance_scale=1)
    assert torch.equal(greedy, ar["greedy_no_cfg"])
    guided = gpt.generate(label, temperature=0, guidance_scale=1.5)
    assert torch.equal(guided, ar["greedy_cfg1.5_correct_uncond"])
    # the published sampler's unconditional branch is class 0 from the second token on: not ours
    assert not torch.equal(guided, ar["greedy_cfg1.5_reference_as_is"])
    # the published sampler draws by torch.multinomial, ours inverts one uniform number: the same
    # probabilities, from which its draws give its indices
    sampled, draws = ar["sampled_seed11_t1_no_cfg"], torch.Generator().manual_seed(11)
    for j in range(sampled.shape[1]):
        with torch.no_grad():
            logits = gpt(sampled[:, :j], label)[:, -1]
        drawn = torch.multinomial(filtered_probabilities(logits), 1, generator=draws)[:, 0]
        assert torch.equal(drawn, sampled[:, j])


def test_ar_filters(ar):
    logits = ar["filter_logits"][:, 0]
    for name, options in {
        "filter_probs_k10": {"top_k": 10},
        "filter_probs_p0.9_t0.8": {"temperature": 0.8, "top_p": 0.9},
        "filter_probs_k20_p0.5": {"top_k": 20, "top_p": 0.5},
    }.items():
        close(filtered_probabilities(logits, **options), ar[name].view_as(logits))


@torch.no_grad()
def test_ar_text_logits(ar):
    """The goldens' context has the trunk's width: nothing stands between encoder and trunk."""
    state = ar_state(load_file(GOLDEN / "ar_t2i_state_dict.safetensors"))
    model = GPT(from_mapping(GPTConfig, ar_config(state)))
    model.load_weights(state, "golden")
    text = Text(ar["t2i_text_embeddings"], ar["t2i_text_valid"].bool())
    assert not text.mask.all()  # the second prompt is padded
    ids = ar["ids"]
    close(model.eval()(ids[:, :-1], text), ar["t2i_tf_logits"])
    alone = Text(text.values[1:, :3], text.mask[1:, :3])
    close(model(ids[1:, :-1], alone), ar["t2i_tf_logits"][1:])


@pytest.mark.parametrize("name", ["d12_d12", "d18_d18", "d18_d28"])
def test_full_size_models_have_the_published_keys_shapes_and_counts(name):
    published = json.loads((GOLDEN / f"keys_{name}.json").read_text())
    encoder_depth, decoder_depth = (int(part[1:]) for part in name.split("_"))
    with torch.device("meta"):
        model = FlexTok(FlexTokConfig(encoder_depth=encoder_depth, decoder_depth=decoder_depth))
        state = {k: torch.empty(shape) for k, shape in published["state_dict"].items()}
    model.load_weights(flextok_state(state), name)  # strict: every key, every shape
    count = {
        part: sum(p.numel() for p in getattr(model, part).parameters())
        for part in ("encoder", "decoder", "vae")
    }
    report = published["report"]
    assert count == {"encoder": report["enc"], "decoder": report["dec"], "vae": report["vae"]}
    assert sum(p.numel() for p in model.parameters()) == report["total_with_vae"]


CLASSES = {"name": "class", "num_classes": 1000}
TEXT = {"name": "text", "encoder": {"name": "pretrained", "dim": 2048}}


@pytest.mark.parametrize(
    ("conditioner", "depth", "millions"),
    [
        *((CLASSES, *size) for size in ((10, 49), (12, 85), (16, 201), (20, 393), (24, 679))),
        (CLASSES, 30, 1330),
        *((TEXT, *size) for size in ((12, 113), (18, 382), (26, 1150), (36, 3060))),
    ],
)
def test_ar_sizes_are_the_published_ones(conditioner, depth, millions):
    with torch.device("meta"):
        model = GPT(GPTConfig(depth=depth, conditioner=conditioner))
    tables = (model.embedding, model.head, model.conditioner)
    count = sum(p.numel() for p in model.parameters())
    count -= sum(p.numel() for table in tables for p in table.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.03)
