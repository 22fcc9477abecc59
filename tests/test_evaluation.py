import pytest
import torch
from conftest import tiny_tokenizer
from flextok.evaluation.prefix import prefix_quality

from flextok.data.datasets import ImageFolder
from flextok.evaluation.metrics import mse, psnr


def test_psnr_of_a_known_error():
    a = torch.zeros(1, 3, 4, 4)
    b = a + 10 / 127.5  # ten grey levels
    assert mse(a, b).item() == pytest.approx(100)
    assert psnr(a, b).item() == pytest.approx(20 * torch.log10(torch.tensor(25.5)).item())
    assert psnr(a, a).item() == float("inf")


def test_metrics_are_per_picture():
    a = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    b = a.flip(0)
    together = psnr(a, b)
    alone = torch.cat([psnr(a[i : i + 1], b[i : i + 1]) for i in range(3)])
    assert torch.equal(together, alone)


def test_prefix_quality_counts_every_readable_picture_once(picture_folder):
    (picture_folder / "cats" / "1.png").write_bytes(b"broken")
    model = tiny_tokenizer()
    results = prefix_quality(
        model, ImageFolder(picture_folder), [1, 8], decoding={"num_steps": 1}, batch_size=4
    )
    assert [r.num_tokens for r in results] == [1, 8]
    assert all(r.count == 5 for r in results)
