"""What people who come from timm, transformers and diffusers type first, on the models that come
with the package, and what encode, decode and generate take."""

import pickle

import numpy as np
import pytest
import torch
from helpers.files import draw_pictures
from helpers.models import DRAWER, TITOK, VQGAN, randomize, tiny_gpt, tiny_tokenizer
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import flextok
from flextok.cli import main
from flextok.data.transforms import ImageTransform
from flextok.draws import NOISE, row_generators
from flextok.generators import MaskGIT, MaskGITConfig
from flextok.images import image_tensor, to_image, to_uint8
from flextok.integrations.diffusers import FlexTokPipeline
from flextok.pipeline import generate_images, reconstruct_prefixes
from flextok.tokenizers import MaskGITVQGAN, TiTok, TiTokConfig, VQGANConfig

shipped = pytest.mark.skipif(not flextok.list_models(), reason="no weights in flextok/releases")


@pytest.fixture
def cat(tmp_path) -> str:
    draw_pictures(tmp_path, ["cat.png"], width=30, height=20)
    return str(tmp_path / "cat.png")


# ---- the first lines


@shipped
def test_the_first_lines_of_a_timm_user(picture_folder, cat):
    assert flextok.list_models("emoji-*") == [n for n in flextok.list_models() if n != "emoji"]
    tokenizer = flextok.load("emoji").eval()
    x = tokenizer.transform(Image.open(cat).convert("RGB")).unsqueeze(0)
    assert torch.equal(tokenizer.encode(x), tokenizer.encode(cat))
    dataset = ImageFolder(str(picture_folder), transform=tokenizer.transform)
    images, _ = next(iter(DataLoader(dataset, batch_size=2)))
    with torch.inference_mode():
        indices = tokenizer.encode(images)
        assert indices.shape == (2, tokenizer.num_tokens)
        assert tokenizer.decode(indices[:, :4], num_steps=1).shape == images.shape
    for name in ("create_model", "AutoModel", "from_pretrained"):
        with pytest.raises(AttributeError, match=rf"{name}'\. Any model loads by flextok\.load"):
            getattr(flextok, name)
    with pytest.raises(NotImplementedError, match="it has encode, decode and reconstruct"):
        tokenizer(x)


@shipped
def test_the_first_lines_of_a_transformers_user(cat, tmp_path):
    generator = flextok.load("emoji-class", device_map="auto", dtype="float32").eval()
    tokenizer = flextok.load_tokenizer_of(generator).to(generator.device)
    assert (generator.dtype, generator.config.num_tokens) == (torch.float32, 64)
    drawn = generator.generate(["heart", "food-fruit"], num_tokens=4, temperature=0)
    pictures = tokenizer.decode(drawn, num_steps=1)
    assert pictures.shape == (2, 3, 64, 64)
    labels = torch.tensor([generator.class_names.index(n) for n in ("heart", "food-fruit")])
    assert torch.equal(generator.generate(labels, num_tokens=4, temperature=0), drawn)
    assert generator.generate("heart", num_tokens=2, top_k=5, top_p=0.9).shape == (1, 2)
    with pytest.raises(ValueError, match="no option 'max_new_tokens': state num_tokens"):
        generator.generate("heart", max_new_tokens=4)
    generator.save_pretrained(tmp_path)
    half = flextok.GPT.from_pretrained(tmp_path, torch_dtype="bfloat16", local_files_only=True)
    assert half.dtype == torch.bfloat16
    assert half.generate("heart", num_tokens=4).shape == (1, 4)
    with pytest.raises(TypeError, match="no argument 'trust_remote_code': leave it out, no code"):
        flextok.load("emoji", trust_remote_code=True)


@shipped
def test_the_first_lines_of_a_diffusers_user(cat, tmp_path):
    tokenizer = flextok.FlexTok.from_pretrained("emoji", torch_dtype=torch.float16).to("cpu")
    picture = tokenizer.reconstruct(cat, num_tokens=16, num_steps=2)
    assert isinstance(picture, Image.Image)
    assert picture.size == (64, 64)
    with pytest.raises(ValueError, match="Did you mean 'num_steps'"):
        tokenizer.decode([1, 2], num_inference_steps=2)
    with pytest.raises(ValueError, match=r"torch\.Generator\(\)\.manual_seed\(7\)"):
        tokenizer.decode([1, 2], num_steps=2, generator=7)
    assert main(["convert", "emoji-text", str(tmp_path / "pipe"), "--to", "diffusers"]) == 0
    pipe = FlexTokPipeline.from_pretrained(tmp_path / "pipe", torch_dtype=torch.float16).to("cpu")
    pipe.set_progress_bar_config(disable=True)
    rngs = [torch.Generator("cpu").manual_seed(i) for i in range(2)]
    how = {"num_tokens": 2, "num_inference_steps": 1, "guidance_scale": 2.0, "generator": rngs}
    images = pipe("a red heart", num_images_per_prompt=2, **how).images
    assert [image.size for image in images] == [(64, 64)] * 2
    arrays = pipe(prompt=["a red heart", "a dog"], output_type="np", **how).images
    assert arrays.shape == (2, 64, 64, 3)
    z = pipe.autoencoder.encode(picture).latents
    assert z.shape == (1, tokenizer.num_tokens, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_drawer_decodes_in_half_precision(dtype):
    """It once added fp32 drafts to weights of half precision."""
    tokenizer = tiny_tokenizer(drawer=DRAWER, decode={"num_steps": 2})
    noise = torch.randn(1, *tokenizer.noise_shape, generator=torch.Generator().manual_seed(0))
    expected = tokenizer.decode([1, 2, 3], noise=noise)
    made = tokenizer.to(dtype).decode([1, 2, 3], noise=noise)
    torch.testing.assert_close(made.float(), expected, atol=0.05, rtol=0)


# ---- what encode takes


def make(name):
    if name == "flextok":
        return tiny_tokenizer()
    if name == "titok":
        return randomize(TiTok(TiTokConfig(**TITOK, stage="single"))).eval()
    return randomize(MaskGITVQGAN(VQGANConfig(**VQGAN))).eval()


@pytest.mark.parametrize("name", ["flextok", "vqgan"])
def test_encode_takes_whatever_a_picture_is(tmp_path, name):
    """A path, its bytes, an open file, PIL's, an array and a tensor are the same picture."""
    draw_pictures(tmp_path, ["a.png", "b.png"], width=30, height=20)
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    opened = [Image.open(path).convert("RGB") for path in paths]
    arrays = np.stack([np.asarray(picture) for picture in opened])
    tokenizer = make(name)
    floats = torch.stack([ImageTransform(tokenizer.image_size)(path) for path in paths])
    expected = tokenizer.encode(floats)
    assert not torch.equal(expected[0], expected[1])
    several = [paths, tuple(map(str, paths)), [p.read_bytes() for p in paths], opened, arrays]
    several += [list(arrays), torch.from_numpy(arrays).permute(0, 3, 1, 2), list(floats)]
    several += [[paths[0], arrays[1]]]
    for images in several:
        assert torch.equal(tokenizer.encode(images), expected)
    with pytest.raises(ValueError, match=r"images span \[230, 230\]"):  # it was clamped
        tokenizer.encode([paths[0], torch.full_like(floats[1], 230.0)])
    for image in (paths[1], str(paths[1]), opened[1], arrays[1], floats[1]):
        assert torch.equal(tokenizer.encode(image), expected[1:])
    with open(paths[0], "rb") as file:
        assert torch.equal(tokenizer.encode(file), expected[:1])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no image to encode"),
        (7, "7 of type int: no picture: give a path"),
        (["nowhere.png"], "nowhere.png"),
        (np.zeros((8, 8, 3)), "type float64: expected uint8"),
        (np.zeros((8, 8, 2), np.uint8), r"shape \(8, 8, 2\)"),
        (torch.zeros(3, 8, 8, dtype=torch.long), "torch.int64 is no picture"),
        (torch.zeros(1, 8, 8, dtype=torch.uint8), r"expected \(3, H, W\)"),
        (torch.zeros(2, 3, 8, 8), r"expected \(B, 3, 16, 16\)"),
    ],
)
def test_what_is_no_picture_is_named(images, message):
    with pytest.raises(ValueError, match=message):
        tiny_tokenizer().encode(images)


def test_the_transform_goes_into_data_workers(cat):
    """Without the model: it would be copied into each of them."""
    transform = tiny_tokenizer().transform
    copy = pickle.loads(pickle.dumps(transform))
    assert len(pickle.dumps(transform)) < 1000
    assert torch.equal(copy(cat), image_tensor(cat, 16, 16))


def test_reconstruct_is_what_the_command_writes(cat):
    tokenizer = tiny_tokenizer()
    indices = tokenizer.encode([cat, cat])
    noise = row_generators(3, NOISE, range(2))
    expected = tokenizer.decode(indices[:, :5], num_steps=2, generator=noise)
    one = tokenizer.reconstruct(cat, num_tokens=5, seed=3, num_steps=2)
    both = tokenizer.reconstruct([cat, cat], num_tokens=5, seed=3, num_steps=2)
    assert one == to_image(expected[0])
    assert both == [to_image(image) for image in expected]
    for wrong in ({"num_tokens": 0}, {"num_tokens": 9}, {"steps": 2}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            tokenizer.reconstruct(cat, **wrong)


def test_a_continuous_tokenizer_reconstructs_too(cat):
    config = {**TITOK, "quantizer": {"name": "kl", "dim": 4}, "stage": "single"}
    tokenizer = TiTok(TiTokConfig(**config)).eval()
    made = np.asarray(tokenizer.reconstruct(cat))
    decoded = tokenizer.decode_codes(tokenizer.encode_codes(cat)).clamp(-1, 1)
    assert np.array_equal(made, to_uint8(decoded)[0])


# ---- what decode and generate take


@pytest.mark.parametrize("name", ["flextok", "titok", "vqgan"])
def test_decode_takes_indices_of_any_kind(name):
    tokenizer = make(name)
    indices = torch.arange(2 * tokenizer.num_tokens).view(2, -1) % tokenizer.vocab_size

    def decode(some, rows=2):
        return tokenizer.decode(some, generator=row_generators(0, NOISE, range(rows)))

    expected = decode(indices)
    kinds = [indices.to(torch.uint16), indices.int(), indices.numpy().astype(np.uint16)]
    for some in [*kinds, indices.tolist()]:
        assert torch.equal(decode(some), expected)
    assert torch.equal(decode(indices[0].tolist(), 1), decode(indices[:1], 1))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([[1, 2], [3]], "pad them to one length and state keep="),
        ([0.5, 1.0], "expected integers"),
        ([[1, 200]], r"span \[1, 200\]"),
    ],
)
def test_wrong_indices_are_named(indices, message):
    with pytest.raises(ValueError, match=message):
        tiny_tokenizer().decode(indices)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_callback_is_given_the_current_prediction(solver):
    """Of Euler's last step it is the result; a straight velocity predicts it from the first on."""
    tokenizer, seen = tiny_tokenizer(), []
    options = {"num_steps": 3, "guidance_scale": 2.0, "solver": solver}
    noise = torch.randn(1, *tokenizer.noise_shape, generator=torch.Generator().manual_seed(0))
    made = tokenizer.decode(
        [1, 2], noise=noise, callback=lambda n, x: seen.append((n, x)), **options
    )
    assert [n for n, _ in seen] == list(range(1, (3 if solver == "euler" else 5) + 1))
    predicted = [tokenizer.to_images(x) for _, x in seen]
    assert torch.allclose(predicted[-1], made, atol=1e-6)
    assert not torch.allclose(predicted[0], made, atol=1e-2)
    assert torch.equal(tokenizer.decode([1, 2], noise=noise, **options), made)


def test_indices_stream_as_they_are_drawn():
    model = tiny_gpt()
    rng = torch.Generator()
    whole = model.generate([0, 3], generator=rng.manual_seed(0))
    streamed = list(model.stream([0, 3], generator=rng.manual_seed(0)))
    assert [x.shape[1] for x in streamed] == list(range(1, 9))
    assert all(torch.equal(x, whole[:, : x.shape[1]]) for x in streamed)
    seen = []
    model.generate([0, 3], generator=rng.manual_seed(0), callback=lambda *x: seen.append(x))
    assert [n for n, _ in seen] == list(range(1, 9))
    assert all(torch.equal(x, whole[:, :n]) for n, x in seen)
    first = next(iter(model.stream([0, 3], generator=rng.manual_seed(0))))  # the rest is not drawn
    assert torch.equal(first, whole[:, :1])


def test_maskgit_shows_what_is_still_masked():
    conditioner = {"name": "class", "num_classes": 3, "learned_null": True}
    sizes = {"vocab_size": 12, "num_tokens": 8, "depth": 1, "dim": 16, "num_heads": 2}
    model, seen = MaskGIT(MaskGITConfig(**sizes, conditioner=conditioner)).eval(), []
    made = model.generate([0, 2], num_steps=3, callback=lambda n, x: seen.append(x))
    masked = [(x == model.mask_index).sum(dim=1).tolist() for x in seen]
    assert masked == sorted(masked, reverse=True)
    assert masked[0][0] > masked[1][0] > 0 == masked[2][0]
    for x in seen:
        assert torch.equal(x[x != model.mask_index], made[x != model.mask_index])


def test_classes_go_by_name_number_and_label():
    model = tiny_gpt()
    model.metadata["class_names"] = ["cat", "dog", "3", "cow", "hen"]
    labels = torch.tensor([1, 2, 4, -1])
    drawn = model.generate(labels, temperature=0)
    # a number is a label, as in a tensor; a text is a name first
    numbers = np.array([1, 2, 4, -1])
    several = [numbers, list(numbers), list(labels), labels.to(torch.int8), labels.to(torch.int16)]
    for asked in (["dog", "3", 4, "none"], ["dog", 2, "hen", -1], [1, 2, "4", ""], *several):
        assert torch.equal(model.generate(asked, temperature=0), drawn)
    assert torch.equal(model.generate(numbers[2], temperature=0), drawn[2:3])
    made = generate_images(model, tiny_tokenizer(), "dog", [8], sampling={"temperature": 0})
    alike = generate_images(model, tiny_tokenizer(), ["dog"], [8], sampling={"temperature": 0})
    assert torch.equal(made[8], alike[8])
    with pytest.raises(ValueError, match="nothing to generate from"):
        generate_images(model, tiny_tokenizer(), [])
    with pytest.raises(ValueError, match="no image to reconstruct"):
        reconstruct_prefixes(tiny_tokenizer(), torch.empty(0, 3, 16, 16), [1])
    assert torch.equal(model.generate("dog", temperature=0), drawn[:1])
    assert torch.equal(model.generate(4, temperature=0), drawn[2:3])
    for wrong, hint in (("dgo", "did you mean 'dog'"), (5, "or 0 to 4"), (-2, "unknown class -2")):
        with pytest.raises(ValueError, match=hint):
            model.generate([wrong])


def test_one_prompt_is_a_batch_of_one():
    encoder = {"name": "bytes", "dim": 16, "depth": 1, "num_heads": 2, "max_length": 64}
    model = tiny_gpt(conditioner={"name": "text", "encoder": encoder})
    one = model.generate("a heart", temperature=0)
    assert torch.equal(one, model.generate(["a heart"], temperature=0))


@shipped
def test_a_folder_of_pictures_is_no_model_of_that_name(tmp_path, monkeypatch, capsys):
    """A folder of emoji, called emoji, stood in the way of each command's default model."""
    monkeypatch.chdir(tmp_path)
    draw_pictures(tmp_path / "emoji", ["a.png"])
    (tmp_path / "emoji-class").write_text("a note")
    assert flextok.load("emoji", device="meta").model_type == "flextok"
    assert flextok.load("emoji-class", device="meta").model_type == "gpt"
    assert main(["models"]) == 0
    assert "emoji-text" in capsys.readouterr().out
    tiny_tokenizer().save_pretrained(tmp_path / "emoji")
    assert flextok.load("emoji", device="meta").num_tokens == 8


def test_the_first_gpu_may_be_asked_for_by_its_number(tmp_path, monkeypatch):
    """0 is false: device_map=0 was the CPU."""
    asked = []
    monkeypatch.setattr("flextok.hub.one_device", lambda d: asked.append(d) or torch.device("cpu"))
    tiny_tokenizer().save_pretrained(tmp_path)
    flextok.load(tmp_path, device_map=0)
    flextok.FlexTok.from_pretrained(tmp_path, device_map=0)
    flextok.load(tmp_path, device=0)
    flextok.load(tmp_path)
    assert asked == [0, 0, 0, "cpu"]
