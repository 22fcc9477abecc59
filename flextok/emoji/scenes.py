"""Scenes of one to nine emoji, composed as they are asked for, with true captions."""

import io
import zlib
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from flextok.emoji.captions import describe, noun_phrase, with_article
from flextok.emoji.datasets import SPLITS, EmojiRecord, select_records, state_of

COLORS = {
    "white": (255, 255, 255),
    "light grey": (208, 208, 208),
    "grey": (140, 140, 140),
    "black": (22, 22, 22),
    "red": (205, 60, 60),
    "maroon": (105, 22, 38),
    "pink": (255, 192, 206),
    "orange": (244, 160, 72),
    "peach": (255, 214, 184),
    "brown": (116, 80, 56),
    "yellow": (248, 218, 92),
    "cream": (255, 246, 214),
    "green": (78, 158, 88),
    "dark green": (18, 78, 48),
    "mint green": (172, 234, 202),
    "teal": (36, 138, 142),
    "light blue": (176, 216, 240),
    "blue": (66, 116, 216),
    "navy blue": (24, 34, 92),
    "purple": (118, 68, 168),
    "lavender": (216, 202, 244),
}
# Signs, letters and flags do not read as things in a scene; nor do marks such as "dashing away".
SCENE_EXCLUDED = {"Symbols", "Flags", "emotion"}
# objects -> grids (columns, rows) and the range of object sizes in parts of the picture's side
LAYOUTS: dict[int, tuple[tuple[tuple[int, int], ...], tuple[float, float]]] = {
    1: (((1, 1),), (0.45, 0.80)),
    2: (((2, 1), (1, 2)), (0.36, 0.48)),
    3: (((2, 2),), (0.34, 0.47)),
    4: (((2, 2),), (0.34, 0.47)),
    5: (((3, 2), (2, 3)), (0.26, 0.32)),
    6: (((3, 2), (2, 3)), (0.26, 0.32)),
    7: (((3, 3),), (0.25, 0.32)),
    8: (((3, 3),), (0.25, 0.32)),
    9: (((3, 3),), (0.25, 0.32)),
}
# Two dozen that stay apart at 32 px, for small models; all of the train split.
BASIC = tuple(
    """red heart, blue heart, green heart, yellow heart, bomb, star, banana, red apple, green apple,
    strawberry, blue book, green book, orange book, basketball, frog, pig face, cat face, whale,
    evergreen tree, fire, droplet, cloud, mushroom, key""".replace("\n    ", " ").split(", ")
)
BACKGROUND_TRIES = 3


class EmojiScenes(Dataset[dict[str, Any]]):
    """Endless scenes of one to nine emoji on a plain or gradient background, with true captions.

    Scene `index` is a pure function of the options (length apart) and index, the same in every
    process; any index >= 0 works, `length` only bounds len(). Train scenes hold train emoji only.
    Items: image PIL RGB, label int (number of objects - 1), caption str, key str, background str,
    grid (columns, rows) and objects in reading order: dicts with name, kind (an index into `kinds`,
    which are names if few, else Unicode's groups), x, y (the centre) and size (the longer side), in
    parts of the picture.
    """

    labels_count = True  # a higher label is a picture of more, so a rank correlation makes sense

    def __init__(
        self,
        split: str = "train",
        size: int = 64,
        seed: int = 0,
        length: int = 100_000,
        max_objects: int = 9,
        vocabulary: str = "all",
        prompts: str = "all",
    ) -> None:
        """vocabulary: all, or basic for the two dozen emoji of BASIC. prompts: train leaves out a
        tenth of all captions, held_out has only those; so known emoji stand in unknown scenes."""
        if vocabulary not in ("all", "basic"):
            raise ValueError(f"vocabulary={vocabulary!r} must be all or basic")
        if prompts not in ("all", "train", "held_out"):
            raise ValueError(f"prompts={prompts!r} must be all, train or held_out")
        if not 1 <= max_objects <= 9:
            raise ValueError(f"max_objects={max_objects} must be in [1, 9]")
        if size < 32:
            raise ValueError(f"size={size} must be at least 32: smaller emoji cannot be recognised")
        if seed < 0 or length < 1:
            raise ValueError(f"seed={seed} must be >= 0 and length={length} must be >= 1")
        self.records = [
            r for r in select_records(split) if not {r.group, r.subgroup} & SCENE_EXCLUDED
        ]
        if vocabulary == "basic":
            self.records = [r for r in self.records if r.name in BASIC]
        if len(self.records) < max_objects:
            raise ValueError(
                f"split={split!r} has {len(self.records)} emoji of vocabulary={vocabulary!r}: take "
                "split=train, with prompts=held_out for scenes to test on"
            )
        self.split, self.size, self.seed, self.length = split, size, seed, length
        self.vocabulary, self.prompts = vocabulary, prompts
        self.kinds = sorted({self.kind_of(record) for record in self.records})
        self.max_objects = max_objects
        self.class_names = [f"{n} object{'s' * (n > 1)}" for n in range(1, max_objects + 1)]

    def kind_of(self, record: EmojiRecord) -> str:
        return record.name if self.vocabulary == "basic" else record.group

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def state(self) -> Iterator[str]:
        return state_of(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < 0:
            raise IndexError(f"index={index} must be >= 0")
        seeds = np.random.SeedSequence([self.seed, SPLITS.index(self.split), index])
        rng = np.random.default_rng(seeds)
        while True:
            count = int(rng.integers(1, self.max_objects + 1))
            chosen = [self.records[i] for i in rng.permutation(len(self.records))[:count]]
            sprites = [read_sprite(record.webp) for record in chosen]
            cells, grid = choose_cells(rng, count)
            background, colors = choose_background(rng, sprites)
            phrases = [noun_phrase(record.name) for record in chosen]
            caption = f"{describe(phrases, cells, grid)} on {with_article(background)}"
            if self.prompts == "all" or is_held_out(caption) == (self.prompts == "held_out"):
                break

        canvas = paint_background(rng, colors, self.size)
        objects = []
        for record, sprite, cell in zip(chosen, sprites, cells, strict=True):
            x, y, extent = place(rng, sprite, cell, grid, LAYOUTS[count][1])
            paint_sprite(canvas, sprite, x, y, extent)
            kind = self.kinds.index(self.kind_of(record))
            objects.append({"name": record.name, "kind": kind, "x": x, "y": y, "size": extent})
        return {
            "image": Image.fromarray(canvas),
            "label": count - 1,
            "caption": caption,
            "key": f"{self.split}-{self.seed}-{index}",
            "objects": objects,
            "background": background,
            "grid": grid,
        }


def is_held_out(caption: str) -> bool:
    """One caption in ten, by its checksum."""
    return zlib.crc32(caption.encode()) % 10 == 0


class Sprite(NamedTuple):
    """An emoji cut to its visible part."""

    image: Image.Image  # premultiplied RGBA
    mean_color: np.ndarray  # (3,) float, over the visible pixels


@cache
def read_sprite(webp: bytes) -> Sprite:
    """Decode and trim; margins off, so that a scene's sizes and positions are the visible ones."""
    rgba = Image.open(io.BytesIO(webp)).convert("RGBA")
    visible = rgba.getchannel("A").point(lambda alpha: 255 * (alpha > 16))
    trimmed = rgba.convert("RGBa").crop(visible.getbbox())
    pixels = np.asarray(trimmed, dtype=np.float64).sum((0, 1))
    return Sprite(trimmed, 255 * pixels[:3] / pixels[3])


def choose_cells(
    rng: np.random.Generator, count: int
) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Cells (column, row) in reading order, no row empty, and the grid (columns, rows)."""
    grids = LAYOUTS[count][0]
    columns, rows = grid = grids[int(rng.integers(len(grids)))]
    while True:
        taken = sorted(int(i) for i in rng.permutation(columns * rows)[:count])
        if len({i // columns for i in taken}) == rows:
            return [(i % columns, i // columns) for i in taken], grid


def choose_background(
    rng: np.random.Generator, sprites: list[Sprite]
) -> tuple[str, list[tuple[int, int, int]]]:
    """Name and one or two colours of a background: of a few draws the one with most contrast."""
    names = list(COLORS)
    parts = 1 if rng.random() < 0.5 else 2
    best, best_contrast = names[:parts], -1.0
    for _ in range(BACKGROUND_TRIES):
        drawn = [names[i] for i in rng.permutation(len(names))[:parts]]
        contrast = min(
            float(np.abs(np.subtract(COLORS[name], sprite.mean_color)).sum())
            for name in drawn
            for sprite in sprites
        )
        if contrast > best_contrast:
            best, best_contrast = drawn, contrast
    name = f"{best[0]} background" if parts == 1 else f"gradient from {best[0]} to {best[1]}"
    return name, [COLORS[name] for name in best]


def paint_background(
    rng: np.random.Generator, colors: list[tuple[int, int, int]], size: int
) -> np.ndarray:
    """(size, size, 3) uint8. A gradient runs from top to bottom or from left to right."""
    if len(colors) == 1:
        return np.full((size, size, 3), colors[0], np.uint8)
    start, end = np.array(colors, np.float64)
    ramp = np.linspace(0.0, 1.0, size)[:, None]
    line = np.rint(start + ramp * (end - start)).astype(np.uint8)  # (size, 3)
    across = line[:, None] if rng.random() < 0.5 else line[None]
    return np.broadcast_to(across, (size, size, 3)).copy()


def place(
    rng: np.random.Generator,
    sprite: Sprite,
    cell: tuple[int, int],
    grid: tuple[int, int],
    sizes: tuple[float, float],
) -> tuple[float, float, float]:
    """Centre x, y and longer side of a sprite somewhere inside its cell, in parts of the side."""
    extent = sizes[0] + float(rng.random()) * (sizes[1] - sizes[0])
    centre = []
    for axis in (0, 1):
        side = extent * sprite.image.size[axis] / max(sprite.image.size)
        slack = 1 / grid[axis] - side
        centre.append(cell[axis] / grid[axis] + side / 2 + float(rng.random()) * slack)
    return centre[0], centre[1], extent


def paint_sprite(canvas: np.ndarray, sprite: Sprite, x: float, y: float, extent: float) -> None:
    """Composite the sprite in place; x, y, extent in parts of the canvas's side."""
    size = canvas.shape[0]
    scale = extent * size / max(sprite.image.size)
    width, height = (max(1, round(scale * side)) for side in sprite.image.size)
    left = min(max(0, round(x * size - width / 2)), size - width)
    top = min(max(0, round(y * size - height / 2)), size - height)
    patch = np.asarray(
        sprite.image.resize((width, height), Image.Resampling.BICUBIC), dtype=np.uint16
    )
    alpha = patch[..., 3:]
    under = canvas[top : top + height, left : left + width]
    color = np.minimum(patch[..., :3], alpha)  # bicubic may overshoot the premultiplied range
    under[:] = color + (under * (255 - alpha) + 127) // 255
