"""Objectives by name: which model each trains, what it may begin with, what is refused."""

import pytest
import torch
from helpers.models import AUTOENCODER, DRAWER, TITOK, VQGAN, tiny_gpt, tiny_tokenizer

from flextok.autoencoder import Autoencoder, AutoencoderConfig
from flextok.generators import MaskGIT, MaskGITConfig
from flextok.objectives import OBJECTIVES, default_objective, make_objective
from flextok.schema import ConfigError
from flextok.tokenizers import MaskGITVQGAN, TiTok, TiTokConfig, VQGANConfig


def titok(stage):
    return TiTok(TiTokConfig(**TITOK, stage=stage, proxy=VQGANConfig(**VQGAN)))


def maskgit():
    classes = {"name": "class", "num_classes": 5}
    return MaskGIT(MaskGITConfig(200, 8, dim=32, depth=1, num_heads=2, conditioner=classes))


def vqgan():
    return MaskGITVQGAN(VQGANConfig(**VQGAN))


def autoencoder():
    return Autoencoder(AutoencoderConfig(**AUTOENCODER))


def drawing():
    return tiny_tokenizer(drawer=DRAWER)


CASES = {
    "flow": (tiny_tokenizer, {}),
    "cross_length": (tiny_tokenizer, {}),
    "distillation": (tiny_tokenizer, {"teacher": tiny_tokenizer}),
    "drawing": (drawing, {"weights": tiny_tokenizer}),
    "drawing_distillation": (drawing, {"teacher": drawing}),
    "proxy_codes": (lambda: titok("proxy"), {"proxy": vqgan}),
    "reconstruction": (
        lambda: titok("finetune"),
        {"first": lambda: titok("proxy"), "proxy": vqgan},
    ),
    "adversarial": (vqgan, {}),
    "autoencoder": (autoencoder, {}),
    "next_token": (tiny_gpt, {}),
    "masked_tokens": (maskgit, {}),
}
SMALL = {"adversarial": {"start_step": 0, "dim": 32, "num_stages": 1}}


def batch():
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 16, 16, generator=rng) * 2 - 1
    indices = torch.randint(0, 200, (4, 8), generator=rng)
    return {"image": images, "indices": indices, "label": torch.arange(4)}


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_every_objective_gives_finite_losses_and_repeats_them_for_a_seed(name):
    model, start = CASES[name]
    torch.manual_seed(0)
    given = {key: make() for key, make in start.items()}
    objective = make_objective(model(), {"name": name, **SMALL.get(name, {})}, given).eval()
    objective.prepare()
    first, again, other = (
        objective(batch(), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert all(value.ndim == 0 and value.isfinite() for value in first.values())
    assert first == again
    draws = name not in ("proxy_codes", "reconstruction", "adversarial", "next_token")
    assert (first["loss"] != other["loss"]) == draws  # in eval mode, and without prefixes
    assert objective.model.metadata["objective"]["name"] == name
    # what is exported is the model alone
    beside = {key for key in objective.state_dict() if not key.startswith("model.")}
    assert bool(beside) == (name == "adversarial")


def test_an_objective_follows_from_the_model():
    expected = {"flow": tiny_tokenizer, "next_token": tiny_gpt, "masked_tokens": maskgit}
    expected |= {"autoencoder": autoencoder, "drawing": drawing}
    for name, make in expected.items():
        assert default_objective(make()) == name
    names = [default_objective(titok(stage)) for stage in ("proxy", "finetune", "single")]
    assert names == ["proxy_codes", "reconstruction", "reconstruction"]
    assert default_objective(vqgan()) == "reconstruction"


@pytest.mark.parametrize(
    ("model", "spec", "start", "message"),
    [
        (tiny_gpt, {"name": "flow"}, {}, "FlowObjective trains flextok models, not a gpt"),
        (tiny_gpt, {"name": "flowe"}, {}, "Did you mean 'flow'"),
        (tiny_gpt, {"cond_dropp": 0.1}, {}, "Did you mean 'cond_drop'"),
        (tiny_gpt, {}, {"teacher": tiny_gpt}, "unknown model to start from 'teacher'"),
        (tiny_tokenizer, {}, {"weights": tiny_gpt}, r"start.weights \(got a gpt model\)"),
        (vqgan, {}, {"first": vqgan}, "has no use for start.first"),
        (lambda: titok("proxy"), {"name": "adversarial"}, {}, "learns no pixels"),
        (lambda: titok("single"), {"name": "proxy_codes"}, {}, "learns pixels, not a proxy's"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(model, spec, start, message):
    with pytest.raises(ConfigError, match=message):
        make_objective(model(), spec, {key: make() for key, make in start.items()})


MIDDLE = {"name": "logit_normal", "mean": 0.0, "std": 1.0}
LEFT_OUT = [  # whether the model goes on from one that has learnt the times near the noise
    (tiny_tokenizer, {"name": "flow", "time_sampler": MIDDLE}, {}, True),
    (
        tiny_tokenizer,
        {"name": "flow", "time_sampler": {"name": "logit_normal", "std": 0.5}},
        {},
        True,
    ),
    (tiny_tokenizer, {"name": "flow", "time_sampler": MIDDLE}, {"weights": tiny_tokenizer}, False),
    (tiny_tokenizer, {"name": "flow", "time_sampler": MIDDLE | {"mean": 3.0}}, {}, False),
    (
        tiny_tokenizer,
        {"name": "flow", "time_sampler": MIDDLE | {"name": "thick_tailed"}},
        {},
        False,
    ),
    (tiny_tokenizer, {"name": "flow", "time_sampler": {"name": "uniform"}}, {}, False),
    (tiny_tokenizer, {"name": "flow"}, {}, False),
    (drawing, {"name": "drawing", "time_sampler": MIDDLE}, {"weights": tiny_tokenizer}, True),
    (drawing, {"name": "drawing", "time_sampler": MIDDLE}, {"weights": drawing}, False),
    (drawing, {"name": "drawing"}, {"weights": tiny_tokenizer}, False),
]


@pytest.mark.parametrize(("model", "spec", "start", "warned"), LEFT_OUT)
def test_times_that_decoding_begins_with_and_training_leaves_out_are_warned_of(
    model, spec, start, warned
):
    given = {name: made() for name, made in start.items()}
    warnings = make_objective(model(), spec, given).warnings
    assert [text.partition(":")[0].partition("=")[0] for text in warnings] == (
        ["objective.time_sampler"] if warned else []
    )


SENSELESS = [
    (tiny_tokenizer, {"name": "flow", "repa": {"weight": -1.0}}, "weight=-1.0 must be at least 0"),
    (tiny_tokenizer, {"name": "flow", "prefix_alignment": {"weight": -1}}, "at least 0"),
    (
        tiny_tokenizer,
        {"name": "flow", "time_sampler": {"name": "mode", "scale": -4}},
        "at least -1",
    ),
    (
        tiny_tokenizer,
        {"name": "flow", "time_sampler": {"name": "logit_normal", "std": 0}},
        "above 0",
    ),
    (autoencoder, {"name": "autoencoder", "perceptual": {"efficientnet_lite0": -1}}, "at least 0"),
    (vqgan, {"name": "adversarial", "perceptual": {"lpips": -0.5}}, "at least 0"),
    (lambda: tiny_tokenizer(quantizer={"name": "fsq", "levels": [8], "eps": -1}), {}, "at least 0"),
    (lambda: tiny_tokenizer(quantizer={"name": "fsq", "levels": [8], "eps": 1.5}), {}, "below 1"),
    (lambda: tiny_tokenizer(quantizer={"name": "vq", "commitment": -1}), {}, "at least 0"),
]


@pytest.mark.parametrize(("model", "spec", "message"), SENSELESS)
def test_values_that_make_no_sense_are_refused(model, spec, message):
    """A negative weight drove the images away from the data."""
    with pytest.raises(ConfigError, match=message):
        make_objective(model(), spec).prepare(pretrained=False)


def test_all_that_a_student_trains_gets_a_gradient():
    """A codebook got none, at which DDP gave up at the second step."""
    quantizer = {"name": "vq", "codebook_size": 20, "dim": 3}
    student, teacher = (tiny_tokenizer(quantizer=quantizer) for _ in range(2))
    objective = make_objective(student, {"name": "distillation"}, {"teacher": teacher}).train()
    objective(batch(), torch.Generator().manual_seed(0))["loss"].backward()
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    assert trained
    assert [name for name, p in trained.items() if p.grad is None] == []
