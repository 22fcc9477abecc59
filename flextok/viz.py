"""Image grids, coarse-to-fine strips, trees, maps and curves, as PNG files."""

import contextlib
import functools
import io
import re
import textwrap
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, features
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from flextok.files import atomic_write
from flextok.images import to_uint8

MARK = ("Software", "flextok")  # in the PNG files that are written
LONGEST_SIDE = {"WEBP": 16383, "JPEG": 65500, "GIF": 65535}  # pixels, of formats with a limit
MARGIN, GAP, HEADER = 6, 4, 18
LABEL_WIDTH, LONGEST_LABEL = 32, 200  # characters
FONT_SIZE = 12
LEGEND_SIZE = 8  # points


def grid(
    rows: list[Tensor],
    column_labels: list[str] | None = None,
    row_labels: list[str] | None = None,
    scale: int = 1,
) -> Image.Image:
    """rows: a (n, 3, H, W) tensor in [-1, 1] for each row, rows may differ in n. scale: enlarges
    each pixel. Returns an RGB image with labels above the columns and left of the rows, where
    long ones are wrapped."""
    height, width = (side * scale for side in rows[0].shape[-2:])
    left = MARGIN
    beside = []
    for text, font in (lettering(label[:LONGEST_LABEL]) for label in row_labels or []):
        beside.append((textwrap.fill(text, LABEL_WIDTH), font))
        widths = [int(font.getlength(line)) for line in beside[-1][0].splitlines()]
        left = max(left, *(MARGIN + width + 2 * GAP for width in widths), MARGIN + 2 * GAP)
    top = MARGIN + (HEADER if column_labels else 0)
    columns = max(len(row) for row in rows)
    size = (
        left + columns * (width + GAP) - GAP + MARGIN,
        top + len(rows) * (height + GAP) - GAP + MARGIN,
    )
    canvas = Image.new("RGB", size, (250, 250, 250))
    pen = ImageDraw.Draw(canvas)
    for i, label in enumerate(column_labels or []):
        x = left + i * (width + GAP) + width // 2
        text, font = lettering(label)
        pen.text((x, MARGIN + HEADER // 2 - 2), text, fill="black", font=font, anchor="mm")
    for j, row in enumerate(rows):
        y = top + j * (height + GAP)
        if beside:
            text, font = beside[j]
            pen.multiline_text(
                (MARGIN, y + height // 2), text, fill="black", font=font, anchor="lm"
            )
        for i, pixels in enumerate(to_uint8(row)):
            image = Image.fromarray(np.asarray(pixels))
            image = image.resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(image, (left + i * (width + GAP), y))
    return canvas


def lettering(label: str) -> tuple[str, ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    """The label as it is drawn, and a font that has all of its characters: matplotlib's DejaVu
    Sans, else one of the system's. Without one, what DejaVu lacks is spelled in Latin letters."""
    if label.isascii():
        return label, ImageFont.load_default(FONT_SIZE)
    import matplotlib

    label = "".join(char for char in label if not is_invisible(char))
    dejavu = str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")
    for path in (dejavu, *system_fonts()) if all(map(is_joined, label)) else ():
        if set(label) <= characters(path):
            with contextlib.suppress(OSError):  # bitmaps of one other size, as emoji fonts are
                return label, ImageFont.truetype(path, FONT_SIZE)
    return spell(label, characters(dejavu)), ImageFont.truetype(dejavu, FONT_SIZE)


def system_fonts() -> list[str]:
    from matplotlib.font_manager import findSystemFonts

    return sorted(findSystemFonts())


@functools.lru_cache(maxsize=512)
def characters(font: str) -> frozenset[str]:
    """The characters that a font file has glyphs for."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(map(chr, FT2Font(font).get_charmap()))
    except (OSError, RuntimeError):
        return frozenset()


def is_invisible(char: str) -> bool:
    """Joiners and variation selectors, which choose between glyphs."""
    return unicodedata.category(char) == "Cf" or "VARIATION SELECTOR" in unicodedata.name(char, "")


def is_joined(char: str) -> bool:
    """False for letters written from right to left where Pillow cannot order and join them."""
    return features.check("raqm") or unicodedata.bidirectional(char) not in ("R", "AL")


def spell(label: str, drawable: frozenset[str]) -> str:
    """Characters that cannot be drawn by their Unicode names: "ga" for a Hangul syllable or a kana,
    "(unicorn face)" for a sign, "(U+732B)" for what has a number only."""

    def spelled(char: str) -> str:
        if char.isspace() or (char in drawable and is_joined(char)):
            return char
        name = unicodedata.name(char, "")
        if letter := re.search(r"(?:LETTER|SYLLABLE|VOWEL SIGN|CHARACTER) (.+)", name):
            return letter.group(1).lower().replace("small ", "").replace("capital ", "") + " "
        return f"({name.lower()})" if name and "CJK" not in name else f"(U+{ord(char):04X})"

    return "".join(map(spelled, label))


def coarse_to_fine(
    originals: Tensor | None,
    by_tokens: dict[int, Tensor],
    names: list[str] | None = None,
    draws: int = 1,
) -> Image.Image:
    """One row an image, one column a prefix length, the original last.

    originals: (n, 3, H, W) in [-1, 1] or None; by_tokens: prefix length -> (n, 3, H, W); names: a
    label for each row; draws: so many images in sequence are drawn from the same indices, and stand
    beside each other.
    """
    lengths = [k for k in by_tokens for _ in range(draws)]
    labels = [f"{k} token{'s' if k > 1 else ''}" for k in lengths]
    columns = [images[i::draws] for images in by_tokens.values() for i in range(draws)]
    if originals is not None:
        columns.append(originals[::draws].to(columns[0].device))
        labels.append("original")
    rows = list(torch.stack(columns, dim=1))  # n of (columns, 3, H, W)
    return grid(rows, labels, names, scale=max(1, 128 // rows[0].shape[-1]))


def samples(images: Tensor, names: list[str], per_row: int) -> Image.Image:
    """images: (n, 3, H, W) in [-1, 1]; names: a label for each. One row of `per_row` a label."""
    rows = list(images.split(per_row))
    return grid(rows, row_labels=names[::per_row], scale=max(1, 128 // images.shape[-1]))


def variance_map(
    originals: Tensor, by_tokens: dict[int, Tensor], maps: dict[int, Tensor]
) -> Image.Image:
    """Two rows an image, one column a prefix length: one decode, and below it how far decodes of
    the same prefix differ (dark: decided; bright: still open; one scale for all).

    originals: (n, 3, H, W) in [-1, 1]; by_tokens: prefix length -> (n, 3, H, W); maps: prefix
    length -> (n, H, W), standard deviations."""
    import matplotlib

    most = max(float(m.max()) for m in maps.values()) or 1.0
    colours = torch.from_numpy(matplotlib.colormaps["inferno"](np.linspace(0, 1, 256))[:, :3])
    rows = []
    for i, original in enumerate(originals):
        decoded = [images[i] for images in by_tokens.values()]
        rows.append(torch.stack([*decoded, original.to(decoded[0].device)]))
        levels = [(m[i] / most * 255).round().long() for m in maps.values()]
        rows.append(torch.stack([colours[level].permute(2, 0, 1) * 2 - 1 for level in levels]))
    labels = [f"{k} token{'s' if k > 1 else ''}" for k in by_tokens] + ["original"]
    scale = max(1, 96 // originals.shape[-1])
    return grid(rows, labels, ["", f"0 to {most:.0f}"] * len(originals), scale)


def tree(
    levels: list[Tensor],
    parents: list[list[int]],
    scores: list[list[float]],
    path: list[int],
    row_labels: list[str],
) -> Image.Image:
    """A search as a tree: one row a level, a line from each candidate to the one that it continues,
    its score below it. Those on the path to the result are framed.

    levels: (n, 3, H, W) in [-1, 1] of each level; parents: for each candidate, the number of the
    one above that it continues, -1 in the first level; path: the numbers of those that are framed,
    from the first level on."""
    side = levels[0].shape[-1] * max(1, 64 // levels[0].shape[-1])
    left = 2 * MARGIN + max(int(lettering(text)[1].getlength(text)) for text in row_labels)
    step, drop = side + 3 * GAP, side + 3 * HEADER
    most = max(len(images) for images in levels)
    size = (left + most * step + MARGIN, 2 * MARGIN + len(levels) * drop - HEADER)
    canvas = Image.new("RGB", size, (250, 250, 250))
    pen = ImageDraw.Draw(canvas)
    above: dict[int, int] = {}  # candidate of the level above -> the middle of its image
    for level, images in enumerate(levels):
        y = MARGIN + level * drop
        pen.text((MARGIN, y + side // 2), row_labels[level], fill="black", anchor="lm")
        numbers = range(len(images))
        order = sorted(numbers, key=lambda i: (above.get(parents[level][i], 0), -scores[level][i]))
        middles = {number: left + step * i + side // 2 for i, number in enumerate(order)}
        for number, x in middles.items():
            on_path = level < len(path) and path[level] == number
            color, width = ((200, 40, 40), 3) if on_path else ((150, 150, 150), 1)
            if level:
                start = (above[parents[level][number]], y - drop + side + HEADER)
                pen.line((*start, x, y - 2), fill=color, width=width)
            box = (
                x - side // 2 - width,
                y - width,
                x + side // 2 + width - 1,
                y + side + width - 1,
            )
            pen.rectangle(box, outline=color, width=width)
            image = Image.fromarray(to_uint8(images[number]))
            image = image.resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(image, (x - side // 2, y))
            text = f"{scores[level][number]:.3g}"
            pen.text((x, y + side + HEADER // 2 + 1), text, fill="black", anchor="mm")
        above = middles
    return canvas


Points = list[tuple[float, float]]


def curves(
    rows: dict[str, dict[str, dict[str, Points]]], x_label: str, logarithmic: bool = False
) -> Image.Image:
    """Rows of plots, side by side in each, with a legend below. rows: the row's title -> y label ->
    line's name -> (x, y) points, drawn in their order; logarithmic: x in powers of two. Values of y
    above zero of which some are more than ten times others are drawn logarithmically."""
    buffer = io.BytesIO()
    curve_figure(rows, x_label, logarithmic).savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def curve_figure(
    rows: dict[str, dict[str, dict[str, Points]]], x_label: str, logarithmic: bool
) -> Any:
    """The matplotlib figure of `curves`."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state
    from matplotlib.ticker import LogLocator

    columns = max(map(len, rows.values()))
    width = 4 * columns  # inches
    names = [
        list(dict.fromkeys(n for lines in row.values() for n in lines)) for row in rows.values()
    ]
    legends = [Legend.of(some, width) for some in names]
    heights = [3.6 + legend.height for legend in legends]
    figure = Figure(figsize=(width, sum(heights)), dpi=110, layout="constrained")
    parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights).flat
    for part, (title, panels), some, legend in zip(
        parts, rows.items(), names, legends, strict=True
    ):
        part.suptitle(title)
        places = part.subplots(1, columns, squeeze=False)[0]
        drawn: dict[str, Any] = {}
        for axes in places[len(panels) :]:
            axes.set_axis_off()
        for axes, (y_label, lines) in zip(places, panels.items(), strict=False):
            for name, points in lines.items():
                turn, colour = divmod(some.index(name), 10)  # of ten colours
                style = f"C{colour}o{('-', '--', ':')[turn % 3]}"
                (drawn[name],) = axes.plot(*zip(*points, strict=True), style, markersize=4)
            if logarithmic:
                ticks = sorted({x for points in lines.values() for x, _ in points})
                axes.set_xscale("log", base=2)
                axes.set_xticks(ticks, [f"{x:.3g}" for x in ticks])
            values = [y for points in lines.values() for _, y in points]
            if values and 0 < 10 * min(values) < max(values):
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter("")
            axes.grid(alpha=0.3)
            axes.set(xlabel=x_label, ylabel=y_label)
        if len(some) > 1:
            handles, place = [drawn[name] for name in some], "outside lower center"
            part.legend(
                handles, legend.texts, loc=place, ncols=legend.columns, fontsize=LEGEND_SIZE
            )
    return figure


class Legend(NamedTuple):
    """How the names of lines are laid out below their plots."""

    texts: list[str]  # in lines that fit
    columns: int
    height: float  # inches, about

    @classmethod
    def of(cls, names: list[str], inches: float) -> "Legend":
        from matplotlib.textpath import TextPath

        texts = [textwrap.fill(name, int((inches - 0.7) / 0.12)) for name in names]
        lines = [line for text in texts for line in text.splitlines()]
        paths = [TextPath((0, 0), line, size=LEGEND_SIZE) for line in lines]
        longest = max((path.get_extents().width for path in paths if len(path.vertices)), default=0)
        columns = max(1, min(len(names), int((inches - 0.2) / (longest / 72 + 0.5))))
        return cls(texts, columns, 0.16 * len(lines) / columns)


def image_format(path: str | Path) -> str:
    """Pillow's name of the format that a file's ending means. Raises ValueError where no RGB image
    can be written by that name."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower(), "")
    if not takes_rgb(kind):
        raise ValueError(f"{path} must end in .png, or as another image format does")
    return kind


@functools.cache
def takes_rgb(kind: str) -> bool:
    """Whether Pillow can write an RGB image in a format; of some it has the name alone."""
    try:
        Image.new("RGB", (1, 1)).save(io.BytesIO(), kind)
    except Exception:  # whatever such a format raises
        return False
    return True


def save(image: Image.Image, path: str | Path) -> Path:
    """A PNG says that this package wrote it, see is_ours."""
    path, kind = Path(path), image_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {}
    if kind == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text(*MARK)
    atomic_write(path, lambda place: image.save(place, kind, **options))
    return path


def is_ours(path: str | Path) -> bool:
    """Whether `save` wrote a PNG."""
    try:
        with Image.open(path) as image:
            return image.info.get(MARK[0]) == MARK[1]
    except (OSError, ValueError, SyntaxError):
        return False
