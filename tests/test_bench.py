import json

import pytest
import torch

from flextok import bench
from flextok.cli import main

CPU = torch.device("cpu")


def measured(size: str, only: str = "", **options) -> dict[str, dict]:
    results = bench.bench([size], only, repeats=1, **options)["results"]
    return {r["row"].removeprefix(f"{size} "): r for r in results}


def test_flops_are_those_that_were_run():
    """Quickstart's decoder: 4 blocks, 128 wide, 64 patches; the last computes patches only."""
    rows = measured("quickstart", "decode B1", steps=2)
    linear, dim, n = 4 * 128 * 128 + 3 * 128 * 341, 128, 64

    def forward(registers: int) -> float:
        total = 2 * (linear * (3 * (n + registers) + n) + 2 * dim * dim * registers)  # last: keys
        total += 2 * 2 * dim * (n + registers) * (3 * (n + registers) + n)  # attention
        total += 2 * 2 * n * 192 * dim  # patches in and out
        return total + 2 * (4 * 12 + 2) * dim * dim + 2 * (256 + dim) * dim  # adaLN, time

    embed = 2 * 3 * dim  # a code
    full, one = rows["decode B1, 2 steps"], rows["decode B1, 2 steps, 1 token"]
    assert full["flops"] == 2 * forward(16) + (16 + 1) * embed  # codes, and one for the null
    assert one["flops"] == 2 * forward(2) + (2 + 1) * embed
    guided = rows["decode B1, 2 steps, APG"]  # the null branch is one token
    assert guided["flops"] == 2 * (forward(16) + forward(1)) + (16 + 1) * embed
    assert all(r["cpu"] > 0 and r["flops_per_second"] > 0 for r in rows.values())


def test_training_and_generation_are_measured():
    rows = measured("quickstart-ar", batches=[2])
    assert set(rows) == {
        *("generate B2, 16 tokens", "generate B2, 16 tokens, guidance 1.5", "train step B2")
    }
    plain, guided, train = rows.values()
    assert guided["flops"] == 2 * plain["flops"]
    assert 0 < guided["bandwidth_share"] < 1
    assert train["bandwidth_share"] is None
    # forward and backward of all positions: three times the products of one forward
    assert 2 < train["flops"] / plain["flops"] < 3.1


def test_the_same_row_without_onednn():
    enabled = torch.backends.mkldnn.enabled
    (row,) = measured("quickstart", "encode B16", compare_mkl=True).values()
    assert row["mkl_cpu"] > 0
    assert torch.backends.mkldnn.enabled == enabled


def test_command_writes_what_it_prints(tmp_path, capsys):
    file = tmp_path / "bench.json"
    command = ["bench", "quickstart", "--only", "encode B1", "--repeats", "1", "--device", "cpu"]
    assert main([*command, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert [r["row"] for r in report["results"]] == [
        "quickstart encode B1",
        "quickstart encode B16",
    ]
    assert report["machine"]["matmul_flops"] > 1e9
    printed = capsys.readouterr().out
    assert all(r["row"] in printed for r in report["results"])
    assert "GB/s read" in printed


def test_an_unknown_size_is_refused(capsys):
    assert main(["bench", "d12_d12", "--device", "cpu"]) == 1
    assert "Did you mean 'd12-d12'?" in capsys.readouterr().err


@pytest.mark.parametrize("size", list(bench.SIZES))
def test_every_size_builds(size):
    spec, _ = bench.find_size(size)
    with torch.device("meta"):
        model = bench.build_model(bench.MODELS, spec)
    assert sum(p.numel() for p in model.parameters()) > 1e5
