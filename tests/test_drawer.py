"""The drawer: images sampled around the mean one that a prefix stands for."""

import pytest
import torch
from helpers.models import DRAWER, TINY, bend, tiny_tokenizer

from flextok.data.datasets import ImageFolder
from flextok.data.latents import LatentDataset, build_latent_cache, latents_identity
from flextok.data.transforms import ImageTransform
from flextok.objectives import (
    DistillationObjective,
    DrawingConfig,
    DrawingDistillationConfig,
    DrawingDistillationObjective,
    DrawingObjective,
    FlowObjective,
    make_objective,
)
from flextok.objectives.base import draws_of
from flextok.schema import ConfigError, from_mapping
from flextok.tokenizers import FlexTok, FlexTokConfig
from flextok.tokenizers.decoding import DecodeOptions

KL = {"name": "kl", "channels": 2, "block_channels": [4, 8], "layers_per_block": 1}
ONE = {"num_steps": 1, "guidance": {"name": "cfg"}, "guidance_scale": 1.0}


def with_drawer(**changes) -> FlexTok:
    return tiny_tokenizer(drawer=DRAWER, decode={**ONE, "num_steps": 3, **changes})


def pictures(batch: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_tokens_are_those_of_the_first_decoder():
    plain, drawing = tiny_tokenizer(), with_drawer()
    parts = {name: part.state_dict() for name, part in plain.named_children()}
    for name, state in parts.items():
        drawing.get_submodule(name).load_state_dict(state)
    assert drawing.codes_id == plain.codes_id
    assert torch.equal(drawing.encode(pictures()), plain.encode(pictures()))


def test_the_draft_depends_on_the_codes_alone_and_the_drawing_on_the_noise_too():
    model = with_drawer()
    codes = model.codes_of(model.encode(pictures()))
    keep = torch.tensor([1, 2, 4, 8])
    drafts = model.draft(codes, keep)
    torch.testing.assert_close(model.draft(codes[2:], keep[2:]), drafts[2:], atol=1e-5, rtol=0)
    assert (model.draft(codes, torch.full((4,), 8))[:3] - drafts[:3]).abs().max() > 1e-3
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1, 1)]
    indices = model.encode(pictures())
    first, other, same = (model.decode(indices, keep=keep, generator=rng) for rng in seeds)
    assert torch.equal(other, same)
    assert (first - other).abs().mean() > 1e-3


@pytest.mark.parametrize("keep", [[1, 1], [1, 8]])
def test_the_draft_scales_its_noise_as_the_first_decoder_alone_does(keep):
    draft = {**ONE, "num_steps": 2, "noise_scale": [0.0, 2.0]}
    model = tiny_tokenizer(drawer={**DRAWER, "draft": draft}, decode=ONE)
    plain = tiny_tokenizer(drawer={**DRAWER, "draft": {**draft, "noise_scale": [1, 1]}}, decode=ONE)
    codes, kept = model.codes_of(model.encode(pictures()))[:2], torch.tensor(keep)
    drafts = model.draft(codes, kept)
    assert not torch.equal(drafts, plain.draft(codes, kept))
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).expand(
        2, -1, -1, -1
    )
    model.drop_drawer()
    alone = model.decode_codes(codes, kept, noise=noise).clamp(-1, 1)
    torch.testing.assert_close(drafts, alone, atol=1e-6, rtol=0)


def test_a_row_does_not_depend_on_its_batch():
    model = with_drawer(noise_scale=[1.0, 0.5], guidance_scale=2.0)
    indices, keep = model.encode(pictures()), torch.tensor([1, 2, 4, 8])
    noise = torch.randn(4, *model.noise_shape, generator=torch.Generator().manual_seed(0))
    together = model.decode(indices, keep=keep, noise=noise)
    for row in range(4):
        alone = model.decode(
            indices[row : row + 1], keep=int(keep[row]), noise=noise[row : row + 1]
        )
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=0)


def test_the_noise_is_scaled_by_the_number_of_tokens():
    options = DecodeOptions(noise_scale=[1.0, 0.6])
    scaled = options.scaled(torch.ones(4, 2), torch.tensor([1, 4, 16, 256]), 256)
    expected = [1 - 0.4 * (k - 1) / 255 for k in (1, 4, 16, 256)]
    torch.testing.assert_close(scaled[:, 0], torch.tensor(expected))
    noise = torch.randn(3, 2)
    assert torch.equal(DecodeOptions().scaled(noise, torch.tensor([1, 2, 3]), 8), noise)
    for wrong in ([1.0], [1.0, -0.1], [1.0, 11.0]):
        with pytest.raises(ValueError, match="noise_scale="):
            DecodeOptions(noise_scale=wrong)


def test_saved_and_loaded_it_decodes_the_same(tmp_path):
    model = with_drawer()
    model.save_pretrained(tmp_path)
    loaded, indices = FlexTok.from_pretrained(tmp_path), model.encode(pictures())
    draws = [torch.Generator().manual_seed(0) for _ in range(2)]
    assert torch.equal(
        model.decode(indices, generator=draws[0]), loaded.decode(indices, generator=draws[1])
    )


def trained(steps: int = 400) -> tuple[FlexTok, FlexTok]:
    """A drawer of images that are one of two, which the tokens do not tell apart, and its start."""
    start = tiny_tokenizer(decode=ONE)
    model = FlexTok(from_mapping(FlexTokConfig, {**TINY, "drawer": DRAWER, "decode": ONE}))
    spec = {"name": "drawing", "time_sampler": {"name": "logit_normal", "mean": 2.0, "std": 1.5}}
    objective = make_objective(model, spec, {"weights": start}).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    codes = model.codes_of(torch.zeros(1, 1, dtype=torch.long))
    draft, draws = model.draft(codes, torch.tensor([1])), torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - step / steps)
        signs = torch.randint(0, 2, (16,), generator=draws) * 2.0 - 1
        images = signs.view(-1, 1, 1, 1) * torch.full((16, 3, 16, 16), 0.8)
        batch = {"latents": images, "draft": draft.expand_as(images)}  # as a cache holds them
        loss = objective(batch, draws)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), start


def test_it_draws_one_of_the_images_and_not_their_mean():
    """The mean of both is grey; drawn images are bright or dark, and both occur."""
    model, start = trained()
    indices = torch.zeros(32, 1, dtype=torch.long)
    drawn = model.decode(
        indices, num_steps=12, time_shift=6.0, generator=torch.Generator().manual_seed(1)
    )
    means = drawn.mean(dim=(1, 2, 3))
    assert means.abs().mean() > 0.4, means
    assert 0.2 < (means > 0).float().mean() < 0.8
    state, before = model.state_dict(), start.state_dict()
    assert all(torch.equal(state[name], before[name]) for name in before), "the rest is frozen"


def test_a_cached_front_end_gives_the_same_loss():
    model = with_drawer()
    objective = DrawingObjective(model, weights=tiny_tokenizer())
    images, rows = pictures(8), torch.arange(8)
    draws = [torch.Generator().manual_seed(3) for _ in range(3)]
    plain = objective({"image": images, "row": rows}, draws[0])["loss"]
    found = objective.frozen({"image": images}, draws_of({"image": images}, "image", draws[1]))
    assert sorted(set(found["keep"].tolist())) == [1, 2, 4, 8]
    cached = objective({**found, "row": rows}, draws[2])["loss"]
    assert cached.item() == pytest.approx(plain.item(), rel=1e-5)


def test_latents_and_drafts_are_cached_for_the_decoder_that_made_them(picture_folder, tmp_path):
    vae = {**KL, "norm_groups": 2}

    def made(**spec):
        model = tiny_tokenizer(drawer={**DRAWER, "patch_size": 2, "vae": vae})
        model.drawer.vae.has_weights = True
        torch.manual_seed(0)
        for weight in model.drawer.vae.parameters():
            weight.data.normal_(std=0.1)
        return DrawingObjective(model, DrawingConfig(**spec), weights=tiny_tokenizer())

    def cache(objective):
        data, identity = ImageFolder(picture_folder), latents_identity(objective, {})
        plain = ImageTransform(16)
        return build_latent_cache(tmp_path, objective, data, plain, identity, 4, part_size=8)

    objective = made()
    assert cache(objective).is_finished
    found = LatentDataset(tmp_path)
    assert set(found[0]) == {"latents", "draft", "keep", "label"}
    assert found[0]["draft"].abs().max() <= 1
    drafts = torch.stack([found[i]["draft"] for i in range(4)])  # of one image, not augmented
    assert not torch.equal(drafts[0], drafts[1]), "each from a length of its own"
    batch = {name: torch.stack([found[i][name] for i in range(4)]) for name in found.columns}
    assert objective(batch)["loss"].isfinite()
    other = made()
    with torch.no_grad():
        other.model.decoder.head.weight.add_(0.1)
    for wrong, key in ((other, "weights"), (made(nested_dropout="uniform"), "lengths")):
        with pytest.raises(ValueError, match=rf"made from something else \({key} differ\)"):
            cache(wrong)


def test_a_drawer_goes_on_with_the_tokens_of_another_tokenizer():
    torch.manual_seed(0)
    tokens, other = tiny_tokenizer(num_registers=4), with_drawer()
    model = FlexTok(
        from_mapping(FlexTokConfig, {**TINY, "num_registers": 4, "drawer": DRAWER, "decode": ONE})
    )
    DrawingObjective(model, weights=tokens, drawer=other)
    codes, keep = model.codes_of(model.encode(pictures())), torch.tensor([1, 2, 4, 4])
    draft = model.draft(codes, keep)
    expected = other.drawer(pictures(seed=1), torch.tensor(0.7), draft)
    assert torch.equal(model.encode(pictures()), tokens.encode(pictures()))
    assert torch.equal(model.drawer(pictures(seed=1), torch.tensor(0.7), draft), expected)
    assert expected.abs().max() > 0.01


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"start\.drawer: this model has no drawer"):
        DrawingObjective(with_drawer(), weights=tiny_tokenizer(), drawer=tiny_tokenizer())
    with pytest.raises(ConfigError, match="does not have"):
        DrawingObjective(tiny_tokenizer(), weights=tiny_tokenizer())
    with pytest.raises(ConfigError, match=r"start\.weights \(got nothing\)"):
        DrawingObjective(with_drawer())
    with pytest.raises(ConfigError, match="sizes of what"):
        DrawingObjective(with_drawer(), weights=tiny_tokenizer(decoder_dim=48))
    with pytest.raises(ConfigError, match="image_size=16 must be a multiple of 5"):
        tiny_tokenizer(drawer={**DRAWER, "patch_size": 5})
    with pytest.raises(ConfigError, match="dim=32 must be a multiple of head_dim=12"):
        tiny_tokenizer(drawer={**DRAWER, "head_dim": 12})
    with pytest.raises(ValueError, match="no drawer"):
        tiny_tokenizer().draft(torch.zeros(1, 1, 3), torch.ones(1, dtype=torch.long))
    kl = tiny_tokenizer(drawer={**DRAWER, "patch_size": 2, "vae": {**KL, "norm_groups": 2}})
    objective = DrawingObjective(kl, weights=tiny_tokenizer())
    with pytest.raises(ValueError, match=r"drawer\.vae\.weights"):
        objective({"image": pictures()})


def test_training_the_tokens_again_leaves_the_drawer_out():
    """Its drafts would change under it."""
    model = FlowObjective(with_drawer(), weights=with_drawer()).model
    assert model.drawer is None
    assert model.config.drawer is None
    assert model.config.decode.num_steps == 1, "the first decoder's"


def bent_teacher() -> FlexTok:
    model = with_drawer(num_steps=6, guidance_scale=2.0, noise_scale=[1.0, 0.7])
    bend(model.drawer)
    return model


def student_of(teacher: FlexTok, **changes) -> DrawingDistillationObjective:
    config = DrawingDistillationConfig(**{"num_steps": 2, "teacher_steps": 3, **changes})
    model = with_drawer(noise_scale=[1.0, 0.7])
    return DrawingDistillationObjective(model, config, teacher=teacher)


@pytest.mark.parametrize("weight", [0.0, 0.01])
def test_the_student_comes_to_the_teachers_many_steps(weight):
    teacher = bent_teacher()
    objective = student_of(teacher, weight=weight, dim=32)
    student, indices = objective.model, teacher.encode(pictures(8, seed=7))
    noise = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(8))
    keep = torch.tensor([1, 2, 4, 8] * 2)
    many = teacher.decode(indices, keep=keep, noise=noise)

    def error() -> float:
        return float((student.decode(indices, keep=keep, noise=noise) - many).square().mean())

    before = error()
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-3)
    draws, batch = torch.Generator().manual_seed(0), None
    for step in range(100):
        if step % 10 == 0:
            batch = {"image": pictures(16, seed=100 + step)}
            batch = objective.frozen(batch, draws_of(batch, "image", draws))
        loss = objective.train()(batch, draws)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert error() < before / 2
    assert student.codes_id == teacher.codes_id
    with pytest.raises(ValueError, match="num_steps=4 must be 2"):
        student.decode(indices, num_steps=4)


def test_the_discriminator_acts_on_the_last_step_only():
    objective = student_of(bent_teacher(), weight=1.0, dim=32).train()
    alone = student_of(bent_teacher()).train()  # distilled without a discriminator
    batch = {"image": pictures(8)}
    batch = objective.frozen(batch, draws_of(batch, "image", torch.Generator()))
    judged = {}
    for seed in range(8):
        draws = torch.Generator().manual_seed(seed)
        last = draws_of(batch, "latents", draws).of_step("stretch").randrange(2) == 1
        losses = objective(batch, torch.Generator().manual_seed(seed))
        objective.zero_grad()
        losses["loss"].backward()
        grads = [p.grad.abs().max() for p in objective.discriminator.parameters()]
        alone.zero_grad()
        alone(batch, torch.Generator().manual_seed(seed))["loss"].backward()
        heads = [each.model.drawer.head.weight.grad for each in (objective, alone)]
        objective.before_step()  # or AdamW moved the discriminator by what it remembers
        moves = all(p.grad is not None for p in objective.discriminator.parameters())
        differ = not torch.equal(*heads)
        judged[last] = ("adversarial" in losses, bool(max(grads) > 0), differ, moves)
    assert judged == {True: (True,) * 4, False: (False,) * 4}
    assert all(p.grad is None for p in objective.teacher.network.parameters())


def test_each_distillation_names_the_other():
    with pytest.raises(ConfigError, match="name: drawing_distillation"):
        DistillationObjective(with_drawer(), teacher=with_drawer())
    with pytest.raises(ConfigError, match="name: distillation"):
        DrawingDistillationObjective(tiny_tokenizer(), teacher=tiny_tokenizer())


def test_a_student_of_other_codes_is_refused():
    other = {"name": "fsq", "levels": [8, 5, 5], "bound": "ifsq"}
    model = tiny_tokenizer(drawer=DRAWER, quantizer=other)
    with pytest.raises(ConfigError, match=r"bound.*is not the teacher's.*leave it out"):
        DrawingDistillationObjective(model, teacher=bent_teacher())
