"""Images that are no squares: encoded, decoded from any prefix, and trained in buckets."""

import pytest
import torch
from helpers.models import DRAWER, tiny_gpt, tiny_tokenizer
from PIL import Image

import flextok
from flextok.cli import main
from flextok.nn.embeddings import patch_positions, sincos_2d
from flextok.objectives import DrawingObjective, FlowObjective
from flextok.pipeline import generate_images
from flextok.schema import ConfigError
from flextok.tokenizers import FlexTok

SHAPES = [[24, 12], [12, 24]]


def shaped(**options):
    """A tiny tokenizer of 16 x 16, 24 x 12 and 12 x 24 pixels, whose head is not zero."""
    model = tiny_tokenizer(shapes=SHAPES, **options)
    return model


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tall(count=2):
    return torch.rand(count, 3, 24, 12, generator=seeded()) * 2 - 1


def test_positions_of_another_grid_keep_their_places_in_the_image():
    table = sincos_2d(16, 4, 4, temperature=10)
    assert torch.equal(patch_positions(table, 4, 4), table.flatten(2).transpose(1, 2))
    other = patch_positions(table, 6, 3).transpose(1, 2).view(1, 16, 6, 3)
    # the row's half does not depend on the column, nor the column's on the row
    assert torch.allclose(other[:, :8], other[:, :8, :, :1].expand(-1, -1, -1, 3), atol=1e-6)
    assert torch.allclose(other[:, 8:], other[:, 8:, :1].expand(-1, -1, 6, -1), atol=1e-6)
    # mirrored tables stay mirrored: no side of the image is preferred
    mirrored = patch_positions(table.flip(2), 6, 3).transpose(1, 2).view(1, 16, 6, 3)
    assert torch.allclose(mirrored, other.flip(2), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("drawer", [None, DRAWER])
@pytest.mark.parametrize("drop_mode", ["mask", "truncate"])
def test_a_rectangle_decodes_from_any_prefix_at_the_shape_asked_for(drawer, drop_mode):
    model = shaped(drawer=drawer, drop_mode=drop_mode)
    indices = model.encode(tall())
    assert indices.shape == (2, 8)
    for k in (1, 3, 8):
        for height, width in ((24, 12), (12, 24), (16, 16)):
            asked = {"height": height, "width": width, "num_steps": 2, "guidance_scale": 1.5}
            images = model.decode(indices[:, :k], generator=seeded(), **asked)
            assert images.shape == (2, 3, height, width)
            ragged = model.decode(indices, keep=torch.tensor([k, 8]), generator=seeded(), **asked)
            torch.testing.assert_close(ragged[0], images[0], atol=2e-5, rtol=0)


@torch.no_grad()
def test_squares_are_what_they_were_without_shapes():
    """Weights, indices and images, bit by bit."""
    with_shapes, plain = shaped(), tiny_tokenizer()
    images = torch.rand(2, 3, 16, 16, generator=seeded()) * 2 - 1
    assert with_shapes.codes_id == plain.codes_id
    indices = plain.encode(images)
    assert torch.equal(with_shapes.encode(images), indices)
    decoded = [m.decode(indices, num_steps=2, generator=seeded()) for m in (with_shapes, plain)]
    assert torch.equal(*decoded)
    assert torch.equal(
        decoded[0], with_shapes.decode(indices, num_steps=2, generator=seeded(), height=16)
    )


@torch.no_grad()
def test_what_a_token_means_depends_on_where_its_patches_lie():
    """The same patches in another shape get other indices, and mirrored images other ones."""
    model = shaped()
    images = tall(4)
    turned = images.transpose(2, 3)
    assert not torch.equal(model.encode(images), model.encode(turned))
    assert not torch.equal(model.encode(images), model.encode(images.flip(2)))


def test_pictures_are_cropped_to_the_shape_asked_for(tmp_path):
    model = shaped()
    picture = Image.linear_gradient("L").resize((50, 90)).convert("RGB")
    picture.save(tmp_path / "a.png")
    tensor = model.transform(tmp_path / "a.png", height=24, width=12)
    assert tensor.shape == (3, 24, 12)
    indices = model.encode(picture, height=24, width=12)
    assert torch.equal(indices, model.encode(tensor))
    assert not torch.equal(indices, model.encode(picture))  # a square is the default
    made = model.reconstruct(picture, num_tokens=2, height=24, width=12, num_steps=1)
    assert made.size == (12, 24)
    assert model.reconstruct(picture, num_steps=1).size == (16, 16)


def test_shapes_that_a_model_does_not_have_are_named():
    model = shaped()
    for wrong in ({"height": 24}, {"height": 20, "width": 12}, {"height": 0}):
        with pytest.raises(
            ValueError, match=r"height=.* and width=.* are no shape of this flextok"
        ):
            model.decode([[0, 1]], **wrong)
        with pytest.raises(ValueError, match="16 x 16, 24 x 12, 12 x 24"):
            model.encode(tall(), **wrong)
    with pytest.raises(
        ValueError, match=r"\(B, 3, 16, 16\) or \(B, 3, 24, 12\) or \(B, 3, 12, 24\)"
    ):
        model.encode(torch.zeros(1, 3, 24, 16))
    with pytest.raises(ValueError, match=r"expected \(B, 3, 12, 24\)"):
        model.encode(tall(), height=12, width=24)
    with pytest.raises(ValueError, match="which has 16 x 16"):
        tiny_tokenizer().decode([[0, 1]], height=24, width=12)
    for shapes, message in (([[24, 10]], "multiples of 4"), ([[24]], "height, width")):
        with pytest.raises(ConfigError, match=message):
            tiny_tokenizer(shapes=shapes)
    with pytest.raises(ConfigError, match="a model with a token_grid has squares only"):
        tiny_tokenizer(shapes=SHAPES, token_grid=[4, 2])


def test_every_objective_of_a_flextok_trains_on_rectangles():
    images = tall(4)
    model = shaped()
    assert FlowObjective(model)({"image": images}, seeded())["loss"].isfinite()
    loss = DrawingObjective(shaped(drawer=DRAWER), weights=model)({"image": images}, seeded())
    loss["loss"].backward()


def test_a_generators_tokens_decode_at_the_shape_asked_for():
    tokenizer, generator = shaped(), tiny_gpt()
    how = {"decoding": {"height": 12, "width": 24, "num_steps": 1}}
    images = generate_images(generator, tokenizer, torch.tensor([0, 1]), [1, 4], **how)
    assert {k: tuple(v.shape) for k, v in images.items()} == {1: (2, 3, 12, 24), 4: (2, 3, 12, 24)}


def test_the_commands_take_height_and_width(tmp_path, capsys):
    shaped().save_pretrained(tmp_path / "model")
    Image.new("RGB", (30, 40), "red").save(tmp_path / "red.png")
    place, size = str(tmp_path / "model"), ["--height", "24", "--width", "12", "--steps", "1"]
    again = flextok.load(place)
    assert isinstance(again, FlexTok)
    assert again.shapes == [(16, 16), (24, 12), (12, 24)]
    out = str(tmp_path / "made.png")
    assert (
        main(["reconstruct", str(tmp_path / "red.png"), "--model", place, "--output", out, *size])
        == 0
    )
    assert Image.open(out).size == (12, 24)
    grid = ["--output", str(tmp_path / "grid.png"), "--num-tokens", "2"]
    assert main(["sample", place, "--images", str(tmp_path / "red.png"), *grid, *size]) == 0
    assert main(["sample", place, "--images", str(tmp_path / "red.png"), *grid, *size[:2]]) == 1
    assert "no shape of this flextok" in capsys.readouterr().err


def test_diffusers_models_take_height_and_width():
    ours = pytest.importorskip("flextok.integrations.diffusers")
    model = ours.AutoencoderFlexTok.from_flextok(shaped())
    z = model.encode(Image.new("RGB", (30, 40), "red"), height=24, width=12).latents
    assert z.shape == (1, 8, 3)
    assert model.decode(z[:, :3], num_inference_steps=1, height=24, width=12).sample.shape[2:] == (
        24,
        12,
    )
    pipe = ours.FlexTokReconstructionPipeline(model)
    made = pipe(Image.new("RGB", (30, 40)), height=12, width=24, num_inference_steps=1).images
    assert made[0].size == (24, 12)
