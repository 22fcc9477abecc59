"""What encode takes: tensors in [-1, 1], and PIL pictures as the commands read them."""

import sys
import warnings

import numpy as np
import pytest
import torch
from helpers.models import TITOK, VQGAN, randomize, tiny_tokenizer
from PIL import Image

import flextok
from flextok.data.transforms import ImageTransform
from flextok.tokenizers import MaskGITVQGAN, TiTok, TiTokConfig, VQGANConfig

TOKENIZERS = {
    "flextok": tiny_tokenizer,
    "titok": lambda: randomize(TiTok(TiTokConfig(**TITOK))).eval(),
    "vqgan": lambda: randomize(MaskGITVQGAN(VQGANConfig(**VQGAN))).eval(),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pil_pictures_are_encoded_as_their_files_are(tmp_path, name):
    """They ended in "no attribute 'ndim'"."""
    tokenizer = TOKENIZERS[name]()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 4), dtype=np.uint8)
    expected, pictures = [], []
    for number, one in enumerate(pixels):
        exif = Image.Exif()
        exif[0x0112] = 6
        path = tmp_path / f"{number}.png"
        Image.fromarray(one).save(path, exif=exif)
        expected.append(ImageTransform(tokenizer.image_size)(path))
        pictures.append(Image.open(path))
    indices = tokenizer.encode(torch.stack(expected))
    assert torch.equal(tokenizer.encode(pictures), indices)
    assert torch.equal(tokenizer.encode(pictures[1]), indices[1:])
    if hasattr(tokenizer, "quantizer"):
        codes = tokenizer.encode_codes(torch.stack(expected))
        assert torch.equal(tokenizer.encode_codes(tuple(pictures)), codes)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_batch_in_zero_to_one_is_warned_of_once(name):
    tokenizer = TOKENIZERS[name]()
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer.encode(2 * images - 1)
        tokenizer.encode(Image.new("RGB", (16, 16), "white"))  # its scale is known
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            tokenizer.encode(images)
    (warning,) = caught
    assert "[-1, 1] with 2 * x - 1" in str(warning.message)
    assert warning.filename == __file__


def test_the_classes_are_listed():
    names = dir(flextok)
    assert {"FlexTok", "TiTok", "MaskGITVQGAN", "GPT", "MaskGIT", "__version__"} <= set(names)
    assert names == dir(sys.modules["flextok"])
    for name in flextok.__all__:  # which imports more modules
        assert getattr(flextok, name) is not None


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_empty_batch_is_refused_by_its_shape(name):
    tokenizer = TOKENIZERS[name]()
    size = tokenizer.image_size
    with pytest.raises(ValueError, match=rf"empty batch, of shape \(0, 3, {size}, {size}\)"):
        tokenizer.encode(torch.empty(0, 3, size, size))
    with pytest.raises(ValueError, match="empty batch, of shape"):
        tokenizer.decode(torch.empty(0, tokenizer.num_tokens, dtype=torch.long))


def test_options_may_be_numbers_of_numpy(generator):
    """As a loop over numpy.arange gives them."""
    tokenizer = tiny_tokenizer()
    indices = torch.randint(0, 200, (2, 8), generator=generator)
    noise = torch.randn(2, *tokenizer.noise_shape, generator=generator)
    plain = tokenizer.decode(indices, num_steps=3, guidance_scale=1.5, time_shift=2, noise=noise)
    asked = {"num_steps": np.int64(3), "guidance_scale": np.float32(1.5), "time_shift": np.int8(2)}
    assert torch.equal(tokenizer.decode(indices, **asked, noise=noise), plain)
    for wrong in ({"num_steps": np.float32(2.5)}, {"guidance_scale": np.float32("nan")}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.* must be a"):
            tokenizer.decode(indices, **wrong, noise=noise)
