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
