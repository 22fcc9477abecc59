"""Picture grids and coarse-to-fine strips, as PNG files."""

import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flextok.data.transforms import to_uint8

MARGIN, GAP, HEADER = 6, 4, 18
LABEL_WIDTH = 32  # characters


def grid(
    rows: list[Tensor],
    column_labels: list[str] | None = None,
    row_labels: list[str] | None = None,
    scale: int = 1,
) -> Image.Image:
    """rows: a (n, 3, H, W) tensor in [-1, 1] for each row, rows may differ in n. scale: enlarges
    each pixel. Returns an RGB picture with labels above the columns and left of the rows, where
    long ones are wrapped."""
    font = ImageFont.load_default(size=12)
    height, width = (side * scale for side in rows[0].shape[-2:])
    left = MARGIN
    if row_labels:
        row_labels = [textwrap.fill(label, LABEL_WIDTH) for label in row_labels]
        lines = (line for label in row_labels for line in label.splitlines())
        left += int(max((font.getlength(line) for line in lines), default=0)) + 2 * GAP
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
        pen.text((x, MARGIN + HEADER // 2 - 2), label, fill="black", font=font, anchor="mm")
    for j, row in enumerate(rows):
        y = top + j * (height + GAP)
        if row_labels:
            place = (MARGIN, y + height // 2)
            pen.multiline_text(place, row_labels[j], fill="black", font=font, anchor="lm")
        for i, pixels in enumerate(to_uint8(row)):
            picture = Image.fromarray(np.asarray(pixels))
            picture = picture.resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(picture, (left + i * (width + GAP), y))
    return canvas


def coarse_to_fine(
    originals: Tensor | None, by_tokens: dict[int, Tensor], names: list[str] | None = None
) -> Image.Image:
    """One row a picture, one column a prefix length, the original last.

    originals: (n, 3, H, W) in [-1, 1] or None; by_tokens: prefix length -> (n, 3, H, W); names: a
    label for each row.
    """
    labels = [f"{k} token{'s' if k > 1 else ''}" for k in by_tokens]
    columns = list(by_tokens.values())
    if originals is not None:
        columns.append(originals.to(columns[0].device))
        labels.append("original")
    rows = list(torch.stack(columns, dim=1))  # n of (columns, 3, H, W)
    return grid(rows, labels, names, scale=max(1, 128 // rows[0].shape[-1]))


def samples(images: Tensor, names: list[str], per_row: int) -> Image.Image:
    """images: (n, 3, H, W) in [-1, 1]; names: a label for each. One row of `per_row` a label."""
    rows = list(images.split(per_row))
    return grid(rows, row_labels=names[::per_row], scale=max(1, 128 // images.shape[-1]))


def save(picture: Image.Image, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path
