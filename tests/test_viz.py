import numpy as np
import pytest
import torch
from PIL import Image

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


def test_a_tree_frames_the_path_and_joins_it():
    levels = [torch.full((3, 3, 16, 16), -1.0), torch.full((4, 3, 16, 16), -1.0)]
    scores = [[0.1, 0.3, 0.2], [0.0, 0.5, 0.1, 0.2]]
    parents = [[-1] * 3, [1, 1, 2, 2]]

    def marked(path):
        pixels = np.asarray(viz.tree(levels, parents, scores, path, ["1 token", "16 tokens"]))
        return (pixels == (200, 40, 40)).all(axis=-1), pixels

    frames, pixels = marked([1, 1])
    assert (pixels == 0).all(axis=-1).sum() >= 7 * 64 * 64
    assert not marked([])[0].any()
    upper, lower = frames[: frames.shape[0] // 2], frames[frames.shape[0] // 2 :]
    # the best candidate stands on the left in both rows: the other frames begin further right
    assert upper.any()
    assert lower.any()
    first = [np.flatnonzero(rows.any(axis=0))[0] for rows in (upper, lower)]
    others = marked([2, 3])[0]
    assert np.flatnonzero(others.any(axis=0))[0] > max(first) + 64
    line = frames.any(axis=1)
    assert line[np.flatnonzero(line)[0] : np.flatnonzero(line)[-1]].mean() > 0.75  # joined


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


def test_no_two_lines_of_a_plot_look_alike():
    """There are ten colours: the eleventh line had the first one's."""
    names = [f"line {i}" for i in range(25)]
    rows = {"row": {"y": {name: [(1, i), (2, i + 1)] for i, name in enumerate(names)}}}
    lines = viz.curve_figure(rows, "x", False).subfigs[0].axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 25


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ((1, 11), "log"),
        ((0.2, 3), "log"),
        ((1, 9), "linear"),
        ((0, 50), "linear"),
        ((-1, 50), "linear"),
    ],
)
def test_values_that_lie_far_apart_are_drawn_logarithmically(values, scale):
    lines = {name: [(1, value), (2, value)] for name, value in zip("ab", values, strict=True)}
    figure = viz.curve_figure({"": {"y": lines}}, "x", False)
    figure.canvas.draw()
    (axes,) = figure.subfigs[0].axes
    assert axes.get_yscale() == scale
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert scale == "linear" or all(float(label) > 0 for label in labels)
    assert {0.2: "0.5", 1: "5"}.get(values[0], labels[0]) in labels


@pytest.mark.parametrize("length", [4, 24, 75])
def test_legends_of_curves_lie_below_the_panels_and_in_the_figure(length):
    names = [f"{number} ".ljust(length, "m") for number in range(8)]
    lines = {name: [(1, 2), (2, number)] for number, name in enumerate(names)}
    few = dict(list(lines.items())[3:5])
    figure = viz.curve_figure({"a": {"y": lines, "z": few}, "b": {"y": few}}, "x", True)
    figure.draw_without_rendering()
    for part, count in zip(figure.subfigs, (8, 2), strict=True):
        (legend,) = part.legends
        box = legend.get_window_extent()
        texts = [text.get_text().replace("\n", "") for text in legend.texts]
        assert texts == (names if count == 8 else list(few))
        assert figure.bbox.contains(box.x0, box.y0)
        assert figure.bbox.contains(box.x1, box.y1)
        assert all(not box.overlaps(axes.get_tightbbox()) for axes in part.axes if axes.axison)
    colours = {line.get_color() for axes in figure.axes for line in axes.lines[-1:]}
    assert len(colours) > 1
    (left, right, _) = (axes.lines for axes in figure.axes[:3])
    assert left[3].get_color() == right[0].get_color()  # a name has one colour in a row


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "gif", "bmp", "tif"])
def test_formats_that_can_be_written_are_taken(tmp_path, ending):
    path = viz.save(Image.new("RGB", (4, 4), "red"), tmp_path / f"a.{ending}")
    assert Image.open(path).size == (4, 4)
    assert viz.is_ours(path) == (ending == "png")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    assert not viz.is_ours(tmp_path / "b.png")


@pytest.mark.parametrize("ending", ["h5", "xbm", "msp", "wmf", "txt", ""])
def test_formats_that_cannot_be_written_are_refused_at_once(ending):
    """Of some Pillow has the name alone: the grid was lost after all the work."""
    with pytest.raises(ValueError, match=r"must end in \.png"):
        viz.image_format(f"grid.{ending}")
