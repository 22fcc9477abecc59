"""Fixtures."""

import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from helpers.files import CATS_AND_DOGS, draw_pictures
from helpers.models import tiny_releases
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh


@pytest.fixture
def releases(tmp_path, monkeypatch) -> Path:
    """The package with tiny models in place of its own."""
    folder = tiny_releases(tmp_path / "releases")
    monkeypatch.setattr("flextok.places.RELEASES", folder)
    return folder


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def picture_folder(tmp_path):
    """Two classes of three 20x24 pictures."""
    draw_pictures(tmp_path, CATS_AND_DOGS, width=24, height=20)
    return tmp_path


@pytest.fixture
def alone(tmp_path):
    """A group of one process."""
    store = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()
