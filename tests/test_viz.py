import numpy as np
import pytest
import torch

from flextok import viz


def test_every_picture_stands_in_its_place():
    colours = torch.tensor([[-1.0, -1, -1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    pictures = colours[:, :, None, None].expand(-1, -1, 8, 8)
    grid = np.asarray(viz.grid([pictures[:2], pictures[2:]], scale=2))
    pitch, half = 16 + viz.GAP, viz.MARGIN + 8
    for i, expected in enumerate([(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        row, column = divmod(i, 2)
        assert tuple(grid[half + row * pitch, half + column * pitch]) == expected


def test_coarse_to_fine_puts_the_original_last():
    original = torch.ones(2, 3, 64, 64)
    strip = viz.coarse_to_fine(original, {1: -original, 4: original * 0}, ["a", "b"])
    pixels = np.asarray(strip)
    middle = pixels[viz.MARGIN + viz.HEADER + 20]
    assert (middle == 0).all(axis=-1).any()
    assert tuple(middle[-viz.MARGIN - 60]) == (255, 255, 255)


@pytest.mark.parametrize("name", ["a/b/c.png"])
def test_saving_makes_the_folders(tmp_path, name):
    assert viz.save(viz.grid([torch.zeros(1, 3, 4, 4)]), tmp_path / name).exists()


SCRIPTS = [
    "кошка",
    "Ελλάς",
    "قطة حمراء",
    "猫と犬",
    "고양이",
    "แมว",
    "बिल्ली",
    "🦄 and ❤️",
    "👩‍🚀",
    "naïve",
]


def has_glyphs(text, font):
    """Whether no character is drawn as the glyph for missing ones, a box."""
    missing = bytes(font.getmask("\U0010fffe"))
    return all(char.isspace() or bytes(font.getmask(char)) != missing for char in text)


@pytest.mark.parametrize("label", SCRIPTS)
@pytest.mark.parametrize("joins", [True, False])
def test_no_label_is_drawn_as_boxes(label, joins, monkeypatch):
    """Whatever fonts the machine has: without any, and where Pillow cannot join Arabic letters."""
    assert viz.lettering("a red heart")[0] == "a red heart"
    text, font = viz.lettering(label)
    assert has_glyphs(text, font)
    monkeypatch.setattr(viz, "system_fonts", lambda: [])
    monkeypatch.setattr(viz.features, "check", lambda name: joins)
    text, font = viz.lettering(label)
    assert has_glyphs(text, font)
    assert text.strip()
    canvas = viz.grid([torch.zeros(1, 3, 16, 16)], row_labels=[label], column_labels=[label])
    assert canvas.width > 16 + 2 * viz.MARGIN


def test_labels_keep_what_can_be_drawn_and_spell_the_rest(monkeypatch):
    monkeypatch.setattr(viz, "system_fonts", lambda: [])
    assert viz.lettering("кошка")[0] == "кошка"
    assert viz.lettering("قطة")[0] == "قطة"
    assert viz.lettering("고양이")[0].split() == ["go", "yang", "i"]
    assert viz.lettering("ネコ")[0].split() == ["ne", "ko"]
    assert viz.lettering("a 🦄")[0] == "a (unicorn face)"
    assert viz.lettering("猫")[0] == "(U+732B)"
    monkeypatch.setattr(viz.features, "check", lambda name: False)  # letters would stand reversed
    assert viz.lettering("قط")[0].split() == ["qaf", "tah"]
