"""From conditions to pictures: what a picture depends on, and what is checked before the work."""

import math

import pytest
import torch
from helpers.models import tiny_gpt, tiny_tokenizer

from flextok.data.tokens import encode as encode_for_cache
from flextok.draws import CODES, NOISE, row_generators
from flextok.evaluation import Cell, Options, sources
from flextok.evaluation.job import make_job
from flextok.evaluation.metrics import mse, psnr
from flextok.generators.ar import GenerateOptions
from flextok.generators.maskgit import MaskGITOptions
from flextok.images import to_uint8
from flextok.pipeline import generate_images, grow_images, reconstruct_prefixes
from flextok.schema import NotFinite
from flextok.tokenizers.base import encode_rows

FEW = {"num_steps": 1, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def tokenizer():
    """In float64, so that another batch size rounds no draw across a boundary."""
    return tiny_tokenizer().double()


@pytest.fixture(scope="module")
def gpt():
    return tiny_gpt().double()


def pictures_of(gpt, tokenizer, number, seed=0, batch_size=64):
    cond = torch.zeros(number, dtype=torch.long)
    return generate_images(gpt, tokenizer, cond, [2, 8], seed, None, FEW, batch_size=batch_size)


def test_a_generated_picture_does_not_depend_on_the_batch_size(gpt, tokenizer):
    whole = pictures_of(gpt, tokenizer, 7)
    for size in (1, 3, 6):
        parts = pictures_of(gpt, tokenizer, 7, batch_size=size)
        for k in (2, 8):
            torch.testing.assert_close(parts[k], whole[k], atol=1e-6, rtol=0)
    few = pictures_of(gpt, tokenizer, 2)
    torch.testing.assert_close(few[8], whole[8][:2], atol=1e-6, rtol=0)


def test_no_two_pictures_of_any_two_seeds_are_the_same(gpt, tokenizer):
    """Pictures 64 and on of seed 0 were once those of seed 64."""
    size = 3
    drawn = [pictures_of(gpt, tokenizer, 7, seed, size)[8] for seed in (0, 1, size, 2 * size)]
    assert len(torch.cat(drawn).flatten(1).unique(dim=0)) == 4 * 7


def test_a_reconstruction_depends_on_seed_and_number_alone(tokenizer):
    images = torch.rand(1, 3, 16, 16, dtype=torch.float64).expand(5, -1, -1, -1) * 2 - 1
    whole = reconstruct_prefixes(tokenizer, images, [1, 8], 3, FEW)
    parts = reconstruct_prefixes(tokenizer, images, [1, 8], 3, FEW, batch_size=2)
    last = reconstruct_prefixes(tokenizer, images[:2], [1, 8], 3, FEW, rows=[3, 4])
    for k in (1, 8):
        torch.testing.assert_close(parts[k], whole[k], atol=1e-6, rtol=0)
        torch.testing.assert_close(last[k], whole[k][3:], atol=1e-6, rtol=0)
        assert len(whole[k].flatten(1).unique(dim=0)) == 5  # five noises of the same picture
    other = reconstruct_prefixes(tokenizer, images, [8], 4, FEW)[8]
    assert len(torch.cat([whole[8], other]).flatten(1).unique(dim=0)) == 10


def test_pictures_and_evaluation_draw_alike(gpt, tokenizer):
    """Picture r of a command is picture r of the evaluation under the same seed."""
    job = make_job(gpt, [Cell(8, 1, 1.0)], Options(networks=(), seed=5), tokenizer)
    batch = {"index": torch.arange(3), "condition": torch.zeros(3).long()}
    shown = dict(sources.generated(job, batch))
    made = generate_images(gpt, tokenizer, torch.zeros(3).long(), [8], 5, None, FEW)[8]
    assert torch.equal(made, shown["0"]["images"])


def test_no_seed_purpose_and_row_share_a_stream():
    rows = range(40)
    seeds = [
        one.initial_seed()
        for seed in (*range(40), 64, 2**31, -1)
        for purpose in (NOISE, CODES)
        for one in row_generators(seed, purpose, rows)
    ]
    assert len(set(seeds)) == len(seeds)


def test_latents_that_are_drawn_belong_to_the_picture():
    """They came from the global generator, in a command and in a token cache alike."""
    vae = {"name": "kl", "channels": 4, "block_channels": [32, 32], "layers_per_block": 1}
    drawn = tiny_tokenizer(vae={**vae, "sample_posterior": True}, patch_size=2).double()
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64) * 2 - 1
    whole = encode_rows(drawn, images, 0, range(3))
    assert torch.equal(encode_rows(drawn, images[1:], 0, [1, 2]), whole[1:])
    numbers = torch.arange(3)
    batch = {"image": images, "position": numbers, "label": numbers, "caption": [""] * 3}
    for first in (0, 2):
        some = {key: value[first:] for key, value in batch.items()}
        cached = encode_for_cache(drawn, some, 0, bf16=False)["indices"]
        assert torch.equal(cached.long(), whole[first:])
    assert not torch.equal(encode_rows(drawn, images, 1, range(3)), whole)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, 1e9, 1e-45, True, "1"])
def test_options_out_of_range_are_refused_before_the_work(gpt, tokenizer, value, monkeypatch):
    def work(*args, **options):
        raise AssertionError("the work began")

    monkeypatch.setattr(gpt, "forward", work)
    monkeypatch.setattr(gpt, "new_caches", work)
    cond = torch.zeros(2, dtype=torch.long)
    for key in ("temperature", "top_k", "top_p", "guidance_scale"):
        if (key == "guidance_scale" and value == 1e-45) or (key == "top_k" and value == 1e9):
            continue  # in range
        if key == "top_p" and value == 1e-45:
            continue
        with pytest.raises(ValueError, match=rf"{key}={value!r} must be"):
            generate_images(gpt, tokenizer, cond, sampling={key: value})
    for key in ("num_steps", "guidance_scale", "time_shift"):
        if key == "guidance_scale" and value == 1e-45:
            continue
        with pytest.raises(ValueError, match=rf"{key}={value!r} must be"):
            generate_images(gpt, tokenizer, cond, decoding={key: value})
        with pytest.raises(ValueError, match=rf"{key}={value!r} must be"):
            list(grow_images(gpt, tokenizer, cond, [8], decoding={key: value}))


@pytest.mark.parametrize(
    ("decoding", "said"),
    [
        ({"solver": "rk9"}, "unknown solver 'rk9'"),
        ({"guidance_interval": [0.5, math.nan]}, "guidance_interval"),
        ({"guidance_interval": [0.2]}, r"must be \[low, high\]"),
        ({"num_steps": 1.5}, "num_steps=1.5 must be a whole number"),
        ({"num_stepz": 3}, "Did you mean 'num_steps'"),
    ],
)
def test_a_wrong_way_to_decode_is_refused_before_generating(
    gpt, tokenizer, decoding, said, monkeypatch
):
    monkeypatch.setattr(gpt, "new_caches", None)  # what generating would call
    with pytest.raises(ValueError, match=said):
        generate_images(gpt, tokenizer, torch.zeros(2, dtype=torch.long), decoding=decoding)


@pytest.mark.parametrize("changes", [{"temperature": math.nan}, {"guidance_scale": math.inf}])
def test_a_stored_default_out_of_range_is_refused(changes):
    with pytest.raises(ValueError, match="must be a number"):
        GenerateOptions(**changes)
    with pytest.raises(ValueError, match="must be a number"):
        MaskGITOptions(**changes)


@pytest.mark.parametrize("part", ["encoder.registers", "decoder.mask_token"])
def test_a_model_that_is_not_finite_gives_no_picture(part, images):
    """It gave a black picture and 100 dB."""
    model = tiny_tokenizer()
    model.get_parameter(part).data.view(-1)[0] = math.nan
    with pytest.raises(NotFinite, match="are not finite"):
        reconstruct_prefixes(model, images, [1], decoding=FEW)


def test_pictures_and_scores_that_are_not_finite_are_refused():
    picture = torch.zeros(1, 3, 4, 4)
    broken = picture.clone()
    broken[0, 0, 0, 0] = math.nan
    for compare in (psnr, mse):
        with pytest.raises(NotFinite):
            compare(picture, broken)
    with pytest.raises(NotFinite):
        to_uint8(broken)
