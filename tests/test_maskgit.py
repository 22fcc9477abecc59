"""MaskGIT with its BERT-like and U-ViT backbones, against the published ones and in itself."""

import functools
from typing import NamedTuple

import pytest
import torch
from golden.titok.load import close, golden, load_case, published_shapes

from flextok.convert.maskgit import maskgit_config, maskgit_state
from flextok.draws import row_generators
from flextok.generators.conditioning import CONDITIONERS, Condition, Conditioner
from flextok.generators.maskgit import (
    MaskGIT,
    MaskGITConfig,
    MaskGITOptions,
    guidance_weight,
    gumbel,
    mask_schedule,
)
from flextok.objectives import MaskedTokensConfig, MaskedTokensObjective
from flextok.objectives.masked_tokens import sample_mask
from flextok.schema import from_mapping

BACKBONES = ["imagebert_tiny", "uvitbert_tiny"]


def load(name):
    weights, io = load_case(name)
    state = maskgit_state(weights)
    values, _ = maskgit_config(state)
    model = MaskGIT(from_mapping(MaskGITConfig, {**values, "num_heads": 4})).eval()
    model.load_weights(state, name)
    return model, io


def build(backbone="bert", **changes):
    torch.manual_seed(0)
    defaults = {"vocab_size": 20, "num_tokens": 8, "dim": 16, "depth": 3, "num_heads": 2}
    defaults["conditioner"] = {"name": "class", "num_classes": 5, "learned_null": True}
    model = MaskGIT(MaskGITConfig(**{**defaults, "backbone": backbone, **changes}))
    for parameter in model.parameters():  # so that untrained logits differ
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_golden_logits(name):
    model, io = load(name)
    ids, labels = io["input_ids"], io["labels"]
    close(model(ids, labels)[..., ::4], io["logits_cond_4"], 1e-4)
    dropped = torch.ones(2, dtype=torch.bool)
    close(model(ids, labels, dropped)[..., ::4], io["logits_uncond_4"], 1e-4)
    close(model(ids, torch.full_like(labels, -1))[..., ::4], io["logits_uncond_4"], 1e-4)


@pytest.mark.parametrize("name", BACKBONES)
def test_golden_loss(name):
    model, io = load(name)
    draws = torch.Generator().manual_seed(77)
    masked = sample_mask(torch.rand(2, generator=draws), torch.rand(2, 16, generator=draws))
    assert torch.equal(masked, io["mask_seed77_masks"])
    ids = io["input_ids"]
    features = model.features(ids, model.condition(io["labels"]))
    masked = ids == model.mask_index
    losses = MaskedTokensObjective(model).losses(features, io["mlm_targets"], masked)
    losses["loss"].backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert losses["loss"].item() == pytest.approx(golden()[name]["mlm_loss"], rel=1e-6)
    assert norm.item() == pytest.approx(golden()[name]["mlm_grad_norm_total"], rel=1e-5)
    assert losses["accuracy"] == golden()[name]["mlm_correct_tokens"]


def published_draws(case, batch):
    """Uniform draws in the published order from the global generator: each forward pass of a step
    draws (B,) for class dropout, even where it drops nothing, before the two Gumbel draws."""
    torch.manual_seed(case["seed"])
    step = 0

    def uniform(shape):
        nonlocal step
        if len(shape) == 3:
            unguided = case["guidance_decay"] == "linear" and step == 0
            for _ in range(1 if unguided else 2):
                torch.rand(batch)
            step += 1
        return torch.rand(shape)

    return uniform


@pytest.mark.parametrize(
    ("name", "case_name"), [(name, case) for name in BACKBONES for case in golden()[name]["cases"]]
)
def test_golden_generation(name, case_name):
    case = golden()[name]["cases"][case_name]
    model, io = load(name)
    steps = []
    model.embedding.register_forward_pre_hook(lambda _, args: steps.append(args[0][:2].clone()))
    indices = model.generate(
        io["labels"],
        num_steps=case["steps"],
        temperature=case["randomize_temperature"],
        guidance_scale=case["guidance_scale"],
        guidance_decay=case["guidance_decay"],
        guidance_pow=case.get("guidance_scale_pow"),
        anneal_logits=case["softmax_temperature_annealing"],
        uniform=published_draws(case, batch=2),
    )
    assert torch.equal(torch.stack(steps), io[f"{case_name}_step_input_ids"])
    assert torch.equal(indices, io[f"{case_name}_ids"])


@pytest.mark.parametrize(
    ("name", "size", "tensors"),
    [
        ("generator_titok_l32", 177_202_432, 391),
        ("generator_titok_b64", 177_227_008, 391),
        ("generator_titok_s128", 294_990_848, 257),
    ],
)
def test_published_keys_and_shapes(name, size, tensors):
    published = published_shapes()[name]
    assert len(published) == tensors
    state = maskgit_state(published)
    with torch.device("meta"):
        model = MaskGIT(from_mapping(MaskGITConfig, maskgit_config(state)[0]))
    model.load_weights(state, name)
    assert sum(p.numel() for p in model.parameters()) == size
    with pytest.raises(ValueError, match="unknown published key 'surprise'"):
        maskgit_state({**published, "surprise": torch.zeros(1)})


def test_published_config_agrees_with_shapes():
    generator = {
        "model_type": "UViT",
        "hidden_size": 1024,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "dropout": 0.1,
        "image_seq_len": 128,
        "condition_num_classes": 1000,
    }
    state = maskgit_state(published_shapes()["generator_titok_s128"])
    assert maskgit_config(state, generator)[0] == maskgit_config(state)[0]
    with pytest.raises(ValueError, match="image_seq_len = 64, the weights have 128"):
        maskgit_config(state, {"image_seq_len": 64})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("l32", MaskGITOptions(8, 9.5, guidance_scale=4.5)),
        ("b64", MaskGITOptions(8, 11.0, guidance_scale=3.0)),
        ("s128", MaskGITOptions(64, 2.8, guidance_scale=6.9, guidance_decay="power-cosine")),
    ],
)
def test_sampling_settings_are_the_published_ones(name, expected):
    state = maskgit_state(published_shapes()[f"generator_titok_{name}"])
    values, points = maskgit_config(state)
    assert from_mapping(MaskGITConfig, values).generate == expected
    assert points
    values, _ = maskgit_config(state, {"guidance_scale": 1.5, "randomize_temperature": 2.0})
    assert from_mapping(MaskGITConfig, values).generate.guidance_scale == 1.5


@pytest.mark.parametrize("case", golden()["arccos_masked_after_step"])
def test_schedule(case):
    tokens, steps = (int(part[1:]) for part in case.split("_"))
    assert mask_schedule(tokens, steps) == golden()["arccos_masked_after_step"][case]


def test_schedule_for_titok_l32():
    assert mask_schedule(32, 8) == [29, 26, 24, 21, 18, 14, 10, 0]


@pytest.mark.parametrize("backbone", ["bert", "uvit"])
@pytest.mark.parametrize("steps", [1, 2, 5, 8, 40])
def test_any_number_of_steps(backbone, steps):
    model = build(backbone)
    done = []
    draws = torch.Generator().manual_seed(0)
    indices = model.generate(
        torch.tensor([0, 4, -1]),
        generator=draws,
        num_steps=steps,
        callback=lambda n, _: done.append(n),
    )
    assert indices.shape == (3, 8)
    assert indices.min() >= 0
    assert indices.max() < 20
    assert done == list(range(1, steps + 1))


@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_any_number_of_tokens(tokens):
    model = build()
    assert model.generate(torch.tensor([1, 2]), num_tokens=tokens).shape == (2, tokens)


@pytest.mark.parametrize(
    ("scale", "decay"), [(0.0, "constant"), (0.0, "linear"), (1.0, "power-cosine")]
)
def test_no_guidance_equals_the_conditional_model(scale, decay):
    model, cond = build(), torch.tensor([1, 2])

    def run():
        draws = torch.Generator().manual_seed(1)
        return model.generate(
            cond, generator=draws, temperature=1, guidance_scale=scale, guidance_decay=decay
        )

    indices = run()
    model.guided_logits = lambda indices, condition, both, weight: model.logits(indices, condition)
    assert torch.equal(indices, run())


@torch.no_grad()
def test_guided_logits_are_the_two_branches():
    model, cond = build(), torch.tensor([1, 2])
    indices = torch.full((2, 8), model.mask_index)
    c, u = model(indices, cond), model(indices, torch.full_like(cond, -1))
    condition, null = model.conditioner(cond), model.conditioner(torch.full_like(cond, -1))
    guided = model.guided_logits(indices, condition, condition.join(null), 1.5)
    close(guided, c + 1.5 * (c - u), 1e-5)


def test_both_guidance_conventions():
    assert guidance_weight(0.5, 4.5, "constant") == 4.5
    assert [guidance_weight(s / 4, 4.0, "linear") for s in range(4)] == [0, 1, 2, 3]
    assert guidance_weight(0.0, 6.9, "power-cosine") == 0
    assert guidance_weight(1.0, 6.9, "power-cosine") == pytest.approx(5.9)  # u + s (c - u), s - 1
    with pytest.raises(ValueError, match="guidance_decay='cosine'"):
        guidance_weight(0.0, 1.0, "cosine")


def test_one_uniform_number_a_position_draws_as_the_published_gumbel_noise_does(monkeypatch):
    """Joint shares of the two positions, over many rows with the same logits."""
    model, rows = build(vocab_size=3), 30_000
    logits = torch.tensor([[[0.5, -1.0, 2.0], [1.0, 0.0, -0.5]]]).expand(rows, -1, -1)
    monkeypatch.setattr(model, "guided_logits", lambda *args: logits)
    cond, options = torch.zeros(rows, dtype=torch.long), {"num_steps": 3, "temperature": 4.0}
    draws = torch.Generator().manual_seed(0)
    inverted = model.generate(cond, num_tokens=2, generator=draws, **options)
    uniform = functools.partial(torch.rand, generator=draws)
    published = model.generate(cond, num_tokens=2, uniform=uniform, **options)
    shares = [
        torch.bincount(x[:, 0] * 3 + x[:, 1], minlength=9) / rows for x in (inverted, published)
    ]
    torch.testing.assert_close(shares[0], shares[1], atol=0.015, rtol=0)
    assert (shares[0] > 0.005).sum() >= 4  # not all rows alike


def test_a_row_does_not_depend_on_its_batch():
    model, cond = build().double(), torch.tensor([1, 2, 2])
    together = model.generate(cond, generator=row_generators(0, 6, range(3)))
    apart = [model.generate(cond[i : i + 1], generator=row_generators(0, 6, [i])) for i in range(3)]
    assert torch.equal(torch.cat(apart), together)
    assert not torch.equal(together[1], together[2])


def test_a_model_whose_weights_are_not_finite_is_refused():
    model = build()
    model.head.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="logits hold values that are not finite"):
        model.generate(torch.tensor([1]))


def test_seed_decides():
    model, cond = build("uvit"), torch.tensor([1, 2])
    a, b, c = (model.generate(cond, generator=torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    state = torch.get_rng_state()
    model.generate(cond, generator=torch.Generator())
    assert torch.equal(state, torch.get_rng_state())  # no hidden global draws


@torch.no_grad()
def test_temperature_zero_takes_the_likeliest():
    model, cond = build(), torch.tensor([3])
    masked = torch.full((1, 8), model.mask_index)
    greedy = model.generate(cond, num_steps=1, temperature=0, guidance_scale=0)
    assert torch.equal(greedy, model(masked, cond).argmax(dim=-1))


def test_loss_draws_come_from_the_generator():
    model = build(dropout=0.0).train()
    batch = {"indices": torch.randint(20, (4, 8)), "label": torch.tensor([0, 1, 2, -1])}
    a, b, c = (
        MaskedTokensObjective(model)(batch, torch.Generator().manual_seed(s))["loss"]
        for s in (3, 3, 4)
    )
    assert a == b
    assert a != c


def test_mask_ratio_and_gumbel():
    u = torch.rand(2000, generator=torch.Generator().manual_seed(0))
    order = torch.rand(2000, 16, generator=torch.Generator().manual_seed(1))
    masked = sample_mask(u, order)
    assert masked.sum(dim=1).min() >= 1
    assert masked.float().mean().item() == pytest.approx(
        2 / torch.pi, abs=0.02
    )  # E[arccos] / (pi/2)
    assert gumbel(torch.tensor([0.0, 0.5, 1.0])).isfinite().all()
    noise = gumbel(torch.rand(20_000, generator=torch.Generator().manual_seed(0)))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.03)


@pytest.mark.parametrize("backbone", ["bert", "uvit"])
def test_overfits_one_batch_of_classes(backbone):
    torch.manual_seed(0)
    classes = {"name": "class", "num_classes": 2}
    config = MaskGITConfig(20, 8, backbone, 32, 1, 2, conditioner=classes, dropout=0.0)
    model = MaskGIT(config).train()
    indices, cond = torch.randint(20, (2, 8)), torch.tensor([0, 1])
    objective = MaskedTokensObjective(model, MaskedTokensConfig(cond_drop=0.0))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    draws = torch.Generator().manual_seed(0)
    for _ in range(200):
        optimizer.zero_grad()
        objective({"indices": indices.repeat(16, 1), "label": cond.repeat(16)}, draws)[
            "loss"
        ].backward()
        optimizer.step()
    greedy = {"temperature": 0, "guidance_scale": 0}  # the null condition was not trained
    assert torch.equal(model.eval().generate(cond, generator=draws, **greedy), indices)


def test_unconditional():
    model = build(conditioner={"name": "none"})
    calls = []
    model.embedding.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    assert model.generate(torch.zeros(3)).shape == (3, 8)
    assert set(calls) == {3}


class Words(Conditioner):
    """A condition of features to attend to, ragged: cond (B, L) holds numbers, -1 = padding."""

    def __init__(self, dim):
        super().__init__()
        self.embedding = torch.nn.Embedding(9, dim)

    def prepare(self, cond, device):
        return cond.to(device)

    def forward(self, cond, drop=None):
        words = self.embedding(cond.clamp_min(0))
        return Condition(torch.zeros_like(words[:, 0]), Features(words, cond >= 0))

    def null_like(self, cond):
        return torch.zeros_like(cond)


class Features(NamedTuple):
    values: torch.Tensor
    mask: torch.Tensor

    def join(self, other):
        return Features(*(torch.cat(pair) for pair in zip(self, other, strict=True)))


@pytest.mark.parametrize("backbone", ["bert", "uvit"])
def test_attends_to_a_condition_with_features(backbone, monkeypatch):
    monkeypatch.setitem(CONDITIONERS, "words", Words)
    model = build(backbone, conditioner={"name": "words"})
    indices, words = torch.randint(20, (2, 8)), torch.tensor([[1, 2, -1], [3, 4, 5]])
    logits = model(indices, words)
    assert logits.shape == (2, 8, 20)
    assert not torch.allclose(logits, model(indices, words.flip(0)))
    close(model(indices[:1], words[:1, :2]), logits[:1], 1e-5)  # padding changes nothing
    draws = torch.Generator().manual_seed(0)
    assert model.generate(words, guidance_scale=2.0, generator=draws).shape == (2, 8)
    MaskedTokensObjective(model)({"indices": indices, "text": words}, draws)["loss"].backward()
    assert model.conditioner.embedding.weight.grad[1:6].any(dim=-1).all()


@pytest.mark.parametrize("backbone", ["bert", "uvit"])
def test_learns_what_prompts_say(backbone):
    torch.manual_seed(0)
    text = {"name": "text", "encoder": {"name": "bytes", "dim": 16, "depth": 1, "num_heads": 2}}
    config = MaskGITConfig(20, 8, backbone, 32, 1, 2, conditioner=text, dropout=0.0)
    model = MaskGIT(config).train()
    prompts, indices = ["a red heart", "a bomb left of a cat"], torch.randint(20, (2, 8))
    objective = MaskedTokensObjective(model, MaskedTokensConfig(cond_drop=0.0))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    draws = torch.Generator().manual_seed(0)
    for _ in range(150):
        optimizer.zero_grad()
        objective({"indices": indices.repeat(16, 1), "text": prompts * 16}, draws)[
            "loss"
        ].backward()
        optimizer.step()
    model.eval()
    greedy = {"temperature": 0, "guidance_scale": 0}
    assert torch.equal(model.generate(prompts, generator=draws, **greedy), indices)
    assert torch.equal(model.generate(prompts[::-1], generator=draws, **greedy), indices.flip(0))
    alone = model(indices[:1], prompts[:1])
    close(model(indices, prompts)[:1], alone, 1e-5)  # the longer prompt's padding changes nothing


def test_saves_and_loads(tmp_path):
    model, cond = build("uvit"), torch.tensor([1])
    loaded = MaskGIT.from_pretrained(model.save_pretrained(tmp_path))
    a, b = (m.generate(cond, generator=torch.Generator().manual_seed(0)) for m in (model, loaded))
    assert torch.equal(a, b)


def test_errors_name_the_remedy():
    model, cond = build(), torch.tensor([1])
    with pytest.raises(ValueError, match=r"num_tokens=9 must be in \[1, 8\]"):
        model.generate(cond, num_tokens=9)
    with pytest.raises(ValueError, match="num_steps=0"):
        model.generate(cond, num_steps=0)
    with pytest.raises(ValueError, match="temperature=-1"):
        model.generate(cond, temperature=-1)
    with pytest.raises(ValueError, match=r"span \[5, 5\], expected \[0, 4\]"):
        model.generate(torch.tensor([5]))
    with pytest.raises(ValueError, match=r"span \[20, 20\]"):
        MaskedTokensObjective(model)({"indices": torch.full((1, 8), 20), "label": cond})
    with pytest.raises(ValueError, match="depth=4 must be odd"):
        build("uvit", depth=4)


def test_an_unconditional_model_generates_in_half_precision():
    sizes = {"vocab_size": 12, "num_tokens": 8, "depth": 1, "dim": 16, "num_heads": 2}
    model = MaskGIT(MaskGITConfig(**sizes, conditioner={"name": "none"})).eval()
    indices = model.to(torch.bfloat16).generate(torch.zeros(3), num_steps=2)
    assert indices.shape == (3, 8)
    assert int(indices.min()) >= 0
    assert int(indices.max()) < 12
    with pytest.raises(ValueError, match="continues no prefix"):
        model.generate(torch.zeros(3), prefix=indices[:, :2])
