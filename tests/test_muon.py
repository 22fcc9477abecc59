"""Muon for matrices and convolution kernels."""

import pytest
import torch
from helpers.models import tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from flextok.autoencoder import Autoencoder, AutoencoderConfig
from flextok.config import OptimConfig
from flextok.objectives import make_objective
from flextok.training.muon import Muon, orthogonalised
from flextok.training.optim import make_optimizer, muon_parameters


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 30)])
@pytest.mark.parametrize("fast", [True, False])
def test_singular_values_become_about_one(shape, fast, monkeypatch):
    monkeypatch.setattr("flextok.training.muon.multiplies_bf16", lambda device: fast)
    scales = 10.0 ** torch.arange(shape[0])[:, None, None]  # each matrix by itself
    values = torch.linalg.svdvals(orthogonalised(scales * torch.randn(shape)).float())
    assert values.min() > 0.6
    assert values.max() < 1.3


def groups(*parameters, **options):
    return [{"params": list(parameters), "lr": 0.1, "weight_decay": 0.1, **options}]


@pytest.mark.parametrize("shape", [(6, 3, 3, 3), (6, 40), (40, 6)])
@pytest.mark.parametrize("fast", [True, False])
def test_parameters_move_as_torchs_muon_moves_the_matrix_of_their_rows(shape, fast, monkeypatch):
    monkeypatch.setattr("flextok.training.muon.multiplies_bf16", lambda device: fast)
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(shape))
    start = parameter.detach().flatten(1).clone()
    matrix = torch.nn.Parameter(start.clone())
    ours = Muon(groups(parameter))
    theirs = torch.optim.Muon(groups(matrix), adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        parameter.grad = torch.randn(shape)
        matrix.grad = parameter.grad.flatten(1).clone()
        ours.step()
        theirs.step()
    error = (parameter.flatten(1) - matrix).abs().max()
    allowed = 0.01 if fast else 0.05  # torch's multiplies in bf16
    assert error < allowed * (matrix - start).abs().max()


@pytest.mark.parametrize("fast", [True, False])
def test_parameters_that_are_multiplied_together_move_as_each_alone(fast, monkeypatch):
    monkeypatch.setattr("flextok.training.muon.multiplies_bf16", lambda device: fast)
    torch.manual_seed(0)
    shapes = [(6, 40), (40, 6), (6, 40), (7, 7), (6, 10, 2, 2)]
    together = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [Muon(groups(*together)), *(Muon(groups(one)) for one in alone)]
    counts: list[int] = []
    turn = orthogonalised
    monkeypatch.setattr(
        "flextok.training.muon.orthogonalised", lambda x: (counts.append(len(x)), turn(x))[1]
    )
    before = [p.detach().clone() for p in together]
    for step in range(3):
        for one, other in zip(together, alone, strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        if step == 1:  # a part that a step did not use keeps its place and its momentum
            together[2].grad = alone[2].grad = None
        for optimizer in optimizers:
            optimizer.step()
    assert max(counts) == (4 if fast else 1)  # in fp32 they stay in the cache one by one
    for one, other, start in zip(together, alone, before, strict=True):
        moved = (other - start).abs().max()
        assert moved > 0.01
        assert (one - other).abs().max() < (0.02 if fast else 1e-4) * moved


class Dtypes(TorchDispatchMode):
    """Notes the types of all that is computed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen |= {result.dtype} if isinstance(result, torch.Tensor) else set()
        return result


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("make", ["tokenizer", "autoencoder"])
def test_a_processor_slow_at_bf16_is_given_none(make, name, monkeypatch):
    monkeypatch.setattr("flextok.training.muon.multiplies_bf16", lambda device: False)
    if make == "tokenizer":
        model = tiny_tokenizer()
    else:
        model = Autoencoder(AutoencoderConfig(16, 4, [8, 16], 1, 2))
    objective = make_objective(model).train()
    optimizer = make_optimizer(objective, OptimConfig(name=name))
    images = torch.rand(2, 3, model.image_size, model.image_size) * 2 - 1
    with Dtypes() as dtypes:
        objective({"image": images})["loss"].backward()
        optimizer.step()
    assert torch.float32 in dtypes.seen
    assert torch.bfloat16 not in dtypes.seen


def test_of_convolutions_the_kernels_go_to_muon_and_all_else_to_adamw():
    model = Autoencoder(AutoencoderConfig(16, 4, [8, 16], 1, 2))
    chosen = muon_parameters(model)
    names = {name for name, p in model.named_parameters() if p in chosen}
    assert "encoder.mid_block.resnets.0.conv1.weight" in names
    assert not names & {"encoder.conv_in.weight", "decoder.conv_out.weight", "quant_conv.bias"}
    assert all(p.ndim == 4 for p in chosen)
