"""Calls from Python: values of other types, modes and shapes than the commands give."""

import numpy as np
import pytest
import torch
from helpers.models import DRAWER, TITOK, VQGAN, tiny_gpt, tiny_tokenizer
from torch import nn

from flextok.data.transforms import ImageTransform
from flextok.draws import BatchDraws, derived_generator
from flextok.editing import vary
from flextok.evaluation.adaptive import encode
from flextok.evaluation.sources import Images
from flextok.generators import GPT, GPTConfig, MaskGIT, MaskGITConfig
from flextok.integrations.diffusers import AutoencoderFlexTok, FlexTokReconstructionPipeline
from flextok.objectives import make_objective
from flextok.pipeline import load, reconstruct_prefixes
from flextok.quantizers import VQ
from flextok.schema import ConfigError
from flextok.tokenizers import (
    FlexTok,
    FlexTokConfig,
    MaskGITVQGAN,
    TiTok,
    TiTokConfig,
    VQGANConfig,
)
from flextok.tree_search import likelihood, search

ONE_STEP = {"num_steps": 1}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def images():
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def maskgit(**conditioner):
    conditioner = conditioner or {"name": "class", "num_classes": 5, "learned_null": True}
    sizes = {"depth": 1, "dim": 16, "num_heads": 2, "conditioner": conditioner}
    return MaskGIT(MaskGITConfig(vocab_size=200, num_tokens=8, **sizes))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: ImageTransform(16).prepare({"image": x})["image"],
        lambda x: Images([{"image": x, "label": 0}], 16)[0]["image"],
        lambda x: tiny_tokenizer().transform(x),
    ],
    ids=["training", "evaluation", "transform"],
)
def test_pictures_of_another_range_are_refused_or_warned_of_wherever_they_are_read(read, images):
    """torchvision's ToTensor gives [0, 1], which trained on washed-out images without a word."""
    torch.testing.assert_close(read(images[0]), images[0], atol=1 / 127, rtol=0)
    with pytest.raises(ValueError, match=r"span \[0, 255\].*expected \[-1, 1\]"):
        read(torch.linspace(0, 255, 3 * 16 * 16).view(3, 16, 16))
    with pytest.warns(UserWarning, match=r"if they are in \[0, 1\]"):
        read(images[0] / 2 + 0.5)


def test_an_image_has_the_same_indices_whatever_stands_beside_it(tokenizer, images):
    """Beside a picture, float tensors were rounded to 8 bits and resized."""
    picture = np.full((20, 20, 3), 77, dtype=np.uint8)
    alone = tokenizer.encode(list(images))
    assert torch.equal(tokenizer.encode([*images, picture])[:-1], alone)
    with pytest.raises(ValueError, match=r"shape \(1, 3, 30, 20\), expected"):
        tokenizer.encode([torch.zeros(3, 30, 20), picture])


def test_rectangles_come_back_in_their_shape(images):
    model = tiny_tokenizer(shapes=[[24, 16]])
    tall = torch.rand(2, 3, 24, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert [image.size for image in model.reconstruct(tall, **ONE_STEP)] == [(16, 24)] * 2
    assert reconstruct_prefixes(model, tall, [8], decoding=ONE_STEP)[8].shape == tall.shape
    square = reconstruct_prefixes(model, images, [8], decoding=ONE_STEP)[8]
    assert square.shape == images.shape
    wide = {**ONE_STEP, "height": 16, "width": 16}  # what is asked for counts
    assert reconstruct_prefixes(model, tall, [8], decoding=wide)[8].shape == (2, 3, 16, 16)
    assert encode(model, tall, "psnr=90", decoding=ONE_STEP).indices.shape == (2, 8)
    wrapped = AutoencoderFlexTok.from_flextok(model)
    assert wrapped(tall).sample.shape == tall.shape
    asked = {"num_inference_steps": 1, "output_type": "pt"}
    made = FlexTokReconstructionPipeline(wrapped)(tall, **asked).images
    assert made.shape == tall.shape


def test_whole_numbers_of_any_type_are_seeds_rows_and_lengths(tokenizer, images):
    expected = reconstruct_prefixes(tokenizer, images, [1, 4], 3, ONE_STEP)
    for three in (np.int64(3), np.uint8(3), torch.tensor(3)):
        found = reconstruct_prefixes(tokenizer, images, torch.tensor([1, 4]), three, ONE_STEP)
        assert list(found) == [1, 4]
        assert torch.equal(found[4], expected[4])
    with pytest.raises(ValueError, match=r"seed=1\.0 must be a whole number"):
        derived_generator(1.0)
    draws = [BatchDraws(2, torch.Generator().manual_seed(0), rows)(torch.rand, (), images.device)
             for rows in ([3, 1], np.array([3, 1]))]  # fmt: skip
    assert torch.equal(*draws)
    gpt = tiny_gpt()
    assert torch.equal(vary(gpt, np.int64(2), [1, 2], 2), vary(gpt, 2, [1, 2], 2))
    found = search(gpt, tokenizer, np.int64(2), likelihood(gpt), budget=2, decoding=ONE_STEP)
    assert len(found.indices) == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda tokenizer, x: tokenizer.reconstruct(x, num_tokens=4.0),
        lambda tokenizer, x: reconstruct_prefixes(tokenizer, x, [1], batch_size=2.0),
        lambda tokenizer, x: tiny_gpt().generate([0], top_k=5.0),
        lambda tokenizer, x: maskgit().generate([0], num_steps=4.0),
    ],
)
def test_a_number_of_things_is_whole_by_its_type(tokenizer, images, call):
    """4.0 passed the check and failed at its use."""
    with pytest.raises(ConfigError, match="must be a whole number"):
        call(tokenizer, images)


def test_draws_do_not_depend_on_the_default_type(tokenizer, images):
    expected = reconstruct_prefixes(tokenizer, images, [4], decoding=ONE_STEP)[4]
    torch.set_default_dtype(torch.float64)
    try:
        found = reconstruct_prefixes(tokenizer, images, [4], decoding=ONE_STEP)[4]
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_codes_have_gradients_through_a_drawer_too(images):
    model = tiny_tokenizer(drawer=DRAWER, decode=ONE_STEP)
    codes = model.quantizer(model.encoder(model.vae.encode(images * 0.1)))[0]
    leaf = codes.detach().requires_grad_()
    model.decode_codes(leaf).square().mean().backward()
    assert leaf.grad.abs().sum() > 0


def test_another_objective_trains_what_an_earlier_one_froze():
    model = tiny_tokenizer()
    every = sum(p.requires_grad for p in model.parameters())

    def trained(spec):
        make_objective(model, spec)
        return {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}

    assert trained({"name": "flow", "train": ["decoder"]}) == {"decoder"}
    assert trained({"name": "flow", "train": ["encoder"]}) == {"encoder"}
    assert trained({"name": "flow"}) >= {"encoder", "decoder"}
    assert sum(p.requires_grad for p in model.parameters()) == every
    model.requires_grad_(False)  # by its owner: an objective leaves that
    with pytest.raises(ConfigError, match="nothing of the model is trained"):
        make_objective(model, {"name": "flow"})


def test_mappings_are_read_in_constructors_and_merged_in_overrides(tmp_path):
    decode = {"num_steps": 8, "guidance_scale": 1.5, "noise_scale": [0.5, 0.7]}
    tiny_tokenizer(decode=decode).save_pretrained(tmp_path)
    found = load(tmp_path, overrides={"decode": {"num_steps": 4}}).config.decode
    assert (found.num_steps, found.guidance_scale, found.noise_scale) == (4, 1.5, [0.5, 0.7])
    sizes = {"image_size": 16, "patch_size": 4, "num_registers": 8, "head_dim": 16}
    model = FlexTok(FlexTokConfig(**sizes, vae={"name": "identity"}, decode={"num_steps": 4}))
    assert model.config.decode.num_steps == 4
    assert GPT(GPTConfig(200, 8, depth=1, dim=32, generate={"top_k": 5})).config.generate.top_k == 5
    with pytest.raises(ConfigError, match="image_size"):
        FlexTok(FlexTokConfig(**sizes | {"image_size": "large"}))


@pytest.mark.parametrize(
    "make",
    [
        lambda kl: FlexTok(FlexTokConfig(image_size=16, patch_size=4, quantizer=kl)),
        lambda kl: MaskGITVQGAN(VQGANConfig(**VQGAN | {"quantizer": kl})),
    ],
)
def test_a_continuous_bottleneck_is_a_titoks(make):
    kl = {"name": "kl", "dim": 4}
    with pytest.raises(ConfigError, match=r"'kl'.* has indices, take"):
        make(kl)
    assert TiTok(TiTokConfig(**TITOK | {"quantizer": kl})).vocab_size == 0


def test_generating_has_no_dropout_in_any_mode_and_leaves_the_mode():
    for model in (maskgit(), tiny_gpt(dropout=0.5)):
        expected = model.eval().generate([0, 1], generator=torch.Generator().manual_seed(0))
        model.train()
        model.head.eval()  # a part in a mode of its own
        modes = [module.training for module in model.modules()]
        found = model.generate([0, 1], generator=torch.Generator().manual_seed(0))
        assert torch.equal(found, expected)
        assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("make", [tiny_gpt, maskgit])
def test_indices_of_any_integer_type_are_trained_on(make, dtype):
    objective = make_objective(make().eval())
    batch = {"indices": torch.randint(0, 200, (2, 8)), "label": torch.tensor([0, 1])}

    def loss(batch):
        return objective(batch, torch.Generator().manual_seed(0))["loss"]

    assert loss({**batch, "indices": batch["indices"].to(dtype)}) == loss(batch)


@pytest.mark.parametrize("make", [tiny_gpt, maskgit])
def test_no_condition_has_a_name_without_conditions_too(make):
    model = make(conditioner={"name": "none"}) if make is tiny_gpt else make(name="none")
    model.eval()
    expected = model.generate(torch.zeros(2), generator=torch.Generator().manual_seed(0))
    found = model.generate(["none", ""], generator=torch.Generator().manual_seed(0))
    assert torch.equal(found, expected)
    assert model.generate("none").shape == (1, 8)
    with pytest.raises(ValueError, match="takes no condition, not"):
        model.generate(["a cat"])


@pytest.mark.parametrize("l2_norm", [True, False])
def test_the_nearest_code_is_found_in_fp32(l2_norm):
    quantizer = VQ(256, 12, l2_norm=l2_norm)
    nn.init.normal_(quantizer.codebook, generator=torch.Generator().manual_seed(0))
    codes = quantizer.indices_to_codes(torch.arange(256))
    middles = codes.lerp(codes.roll(1, 0), 0.49)
    expected = quantizer.codes_to_indices(middles)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer.codes_to_indices(middles), expected)


def test_texts_in_the_metadata_come_back_and_paths_do_not(tmp_path):
    model = tiny_tokenizer()
    texts = {"note": "~20 dB at 4/8 tokens", "unit": "/255 levels, mean/std", "ratio": "/"}
    paths = {"data": "/data/my pictures/a.png", "home": "~/pictures/b", "disk": r"C:\My files\c"}
    model.metadata.update(texts | paths)
    model.save_pretrained(tmp_path)
    found = load(tmp_path).metadata
    assert {key: found[key] for key in texts} == texts
    assert [found[key] for key in paths] == ["a.png", "b", "c"]
