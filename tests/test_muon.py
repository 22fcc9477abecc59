"""Muon for convolution kernels."""

import pytest
import torch

from flextok.autoencoder import Autoencoder, AutoencoderConfig
from flextok.training.muon import KernelMuon, orthogonalised
from flextok.training.optim import muon_parameters


@pytest.mark.parametrize("shape", [(8, 8), (4, 30), (30, 4)])
def test_singular_values_become_about_one(shape):
    values = torch.linalg.svdvals(orthogonalised(torch.randn(shape)))
    assert values.min() > 0.6
    assert values.max() < 1.3


def groups(*parameters, **options):
    return [{"params": list(parameters), "lr": 0.1, "weight_decay": 0.1, **options}]


def test_a_kernel_moves_as_torchs_muon_moves_the_matrix_of_its_rows():
    torch.manual_seed(0)
    kernel = torch.nn.Parameter(torch.randn(6, 3, 3, 3))
    start = kernel.detach().flatten(1).clone()
    matrix = torch.nn.Parameter(start.clone())
    ours = KernelMuon(groups(kernel))
    theirs = torch.optim.Muon(groups(matrix), adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        kernel.grad = torch.randn(6, 3, 3, 3)
        matrix.grad = kernel.grad.flatten(1).clone()
        ours.step()
        theirs.step()
    error = (kernel.flatten(1) - matrix).abs().max()
    assert error < 0.05 * (matrix - start).abs().max()  # torch's multiplies in bf16


def test_of_convolutions_the_kernels_go_to_muon_and_all_else_to_adamw():
    model = Autoencoder(AutoencoderConfig(16, 4, [8, 16], 1, 2))
    chosen = muon_parameters(model)
    names = {name for name, p in model.named_parameters() if p in chosen}
    assert "encoder.mid_block.resnets.0.conv1.weight" in names
    assert not names & {"encoder.conv_in.weight", "decoder.conv_out.weight", "quant_conv.bias"}
    assert all(p.ndim == 4 for p in chosen)
