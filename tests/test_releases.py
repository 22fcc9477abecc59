"""The models that come with the package, themselves: elsewhere tiny ones stand in their places."""

import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from flextok.cli import main
from flextok.data.datasets import take
from flextok.data.emoji import Emoji
from flextok.data.transforms import ImageTransform
from flextok.evaluation.metrics import psnr
from flextok.pipeline import generate_images, load_model, load_tokenizer_of, reconstruct_prefixes
from flextok.storage import RELEASES, read_tensors, released
from flextok.tokenizers.common import codes_id

ROOT = Path(__file__).parent.parent
NAMES = ["emoji", "emoji-class", "emoji-few-step", "emoji-one-step", "emoji-text"]
pytestmark = pytest.mark.skipif(not released(), reason="no weights in flextok/releases")


def test_they_are_small_and_complete():
    assert released() == NAMES
    files = [path for path in RELEASES.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"model.safetensors", "config.json", "README.md"}
    assert sum(path.stat().st_size for path in files) < 40e6
    for name in NAMES:
        tensors, _ = read_tensors(RELEASES / name / "model.safetensors")
        assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float16}


TOKENIZERS = ["emoji", "emoji-few-step", "emoji-one-step"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_held_out_emoji_sharpen_with_every_token(name):
    tokenizer = load_model(name)
    emoji = take(Emoji("validation"), 16)
    transform = ImageTransform(tokenizer.image_size)
    images = torch.stack([transform(emoji[i]["image"]) for i in range(len(emoji))])
    lengths = [1, 16, 256]
    decoded = reconstruct_prefixes(tokenizer, images, lengths)
    first, some, all_of_them = (psnr(decoded[k], images).mean().item() for k in lengths)
    assert first + 0.5 < some < all_of_them - 0.5


def test_few_steps_speak_the_same_tokens():
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first, *others = (load_model(name).encode(images) for name in TOKENIZERS)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("name", ["emoji-class", "emoji-text"])
def test_the_generators_take_every_decoder_of_their_codes(name):
    generator = load_model(name)
    for tokenizer in [None, *TOKENIZERS]:
        found = load_tokenizer_of(generator, name, tokenizer)
        assert codes_id(found) == generator.metadata["codes_id"]


def test_classes_and_prompts_change_the_picture():
    by_class, by_prompt = load_model("emoji-class"), load_model("emoji-text")
    names = by_class.metadata["class_names"]
    assert len(names) == 96
    conds = torch.tensor([names.index("heart"), names.index("animal-mammal")]), ["a key", "a frog"]
    for generator, cond in zip((by_class, by_prompt), conds, strict=True):
        name = "emoji-class" if generator is by_class else "emoji-text"
        tokenizer = load_tokenizer_of(generator, name)
        one, other = generate_images(generator, tokenizer, cond, [16])[16]
        assert not torch.equal(one, other)


@pytest.mark.parametrize(
    "asked",
    [[], ["--classes", "heart", "food-fruit"], ["--prompt", "a red heart"]],
    ids=["reconstruct", "class", "prompt"],
)
def test_the_first_sample_is_there_within_a_minute(tmp_path, asked):
    began = time.process_time()
    assert main(["sample", *asked, "--output", str(tmp_path / "sample.png")]) == 0
    assert time.process_time() - began < 60
    assert Image.open(tmp_path / "sample.png").width > 400


def test_the_pictures_in_the_readme_are_small():
    pictures = sorted((ROOT / "docs/pictures").glob("*.png"))
    assert [path.stem for path in pictures] == ["classes", "coarse_to_fine", "prompts"]
    assert all(path.stat().st_size < 300_000 for path in pictures)
