"""flextok.cpu against torch's own products: equal, and oneDNN's only where it should be."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.models import tiny_gpt
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flextok import cpu as module
from flextok.cpu import OneDNNLinear, accelerate, linear, onednn_is_faster, takes_onednn
from flextok.generators import GPT
from flextok.nn.frozen import Frozen
from flextok.pipeline import load

needs_op = pytest.mark.skipif(
    module.ONEDNN_LINEAR is None, reason="this torch lacks oneDNN's product"
)


@pytest.fixture
def faster(monkeypatch):
    """A machine where oneDNN is the faster one, whatever this one is."""
    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(shape: tuple[int, ...], bias: bool) -> list[torch.Tensor | None]:
    x, weight = random(*shape), random(256, shape[-1], seed=1) / shape[-1] ** 0.5
    return [x.requires_grad_(), weight.requires_grad_(), random(256).requires_grad_()][: 2 + bias]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-5 * b.abs().max())


@needs_op
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(128, 96), (4, 32, 96), (2, 2, 32, 96)])
def test_it_is_f_linear_with_its_gradients(faster, shape, bias):
    args = inputs(shape, bias)
    assert takes_onednn(*args[:2])
    y, expected = linear(*args), F.linear(*args)
    assert close(y, expected)
    grad = random(*y.shape, seed=2)
    for got, want in zip(
        torch.autograd.grad(y, args, grad), torch.autograd.grad(expected, args, grad), strict=True
    ):
        assert close(got, want)


@needs_op
def test_strided_operands(faster):
    x, weight = random(96, 128).t(), random(96, 256).t()
    assert takes_onednn(x, weight)
    assert close(linear(x, weight), F.linear(x, weight))
    halves = random(128, 192)[:, ::2]
    assert close(linear(halves, weight), F.linear(halves, weight))


@needs_op
def test_only_gradients_that_are_wanted(faster, monkeypatch):
    x, weight, bias = inputs((128, 96), True)
    y = linear(x, weight.detach(), bias.detach())
    products = []
    monkeypatch.setattr(module, "linear", lambda *args: products.append(args) or F.linear(*args))
    y.sum().backward()
    assert len(products) == 1
    assert x.grad is not None
    assert weight.grad is bias.grad is None


@needs_op
def test_a_gradient_of_a_gradient(faster):
    def penalty(product):
        x, weight = inputs((128, 96), False)
        (grad,) = torch.autograd.grad(product(x, weight).tanh().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [x, weight])

    assert all(close(a, b) for a, b in zip(penalty(linear), penalty(F.linear), strict=True))


@needs_op
def test_repeats_bit_for_bit(faster):
    def run():
        args = inputs((4, 64, 96), True)
        y = linear(*args)
        return [y, *torch.autograd.grad(y.square().sum(), args)]

    assert all(a.equal(b) for a, b in zip(run(), run(), strict=True))


@needs_op
def test_the_shapes_that_are_worth_it(faster):
    weight = random(512, 512)
    assert takes_onednn(random(8, 512), weight)
    assert not takes_onednn(random(4, 512), weight)  # generation
    assert not takes_onednn(random(4, 768), torch.empty(64000, 768))
    assert not takes_onednn(random(64, 64), random(64, 64))  # small
    assert not takes_onednn(random(4096, 12), random(128, 12))  # narrow
    assert not takes_onednn(random(0, 512), weight)


@needs_op
def test_other_products_are_torchs(faster):
    x, weight = random(64, 512), random(512, 512)
    assert takes_onednn(x, weight)
    assert not takes_onednn(x.bfloat16(), weight.bfloat16())
    assert not takes_onednn(x.double(), weight.double())
    assert not takes_onednn(x.to("meta"), weight.to("meta"))
    with FakeTensorMode() as mode:
        assert not takes_onednn(mode.from_tensor(x), mode.from_tensor(weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes_onednn(x, weight)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not takes_onednn(x, weight)
    assert takes_onednn(x, weight)


def test_a_misfit_gets_torchs_error(faster):
    with pytest.raises(RuntimeError, match="64x500 and 512x512"):
        linear(random(64, 500), random(512, 512))


def test_layers_in_the_other_modes(faster):
    layer, x = accelerate(nn.Linear(512, 512)), random(64, 512)
    plain = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.double()(x.double()).dtype == torch.float64
    layer.float()
    assert close(torch.func.vmap(layer)(x[:, None])[:, 0], plain)
    _, tangent = torch.func.jvp(layer, (x,), (x,))
    assert close(tangent, F.linear(x, layer.weight))
    assert layer.to("meta")(x.to("meta")).shape == (64, 512)


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        ("", "AVX512", False),
    ],
)
@needs_op
def test_the_machines_that_gain(monkeypatch, vendor, capability, expected):
    monkeypatch.setattr(module, "processor_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert onednn_is_faster.__wrapped__() is (expected and torch.backends.mkldnn.is_available())


def test_a_torch_without_the_product(monkeypatch):
    monkeypatch.setattr(module, "ONEDNN_LINEAR", None)
    assert not onednn_is_faster.__wrapped__()


def test_every_layer_of_a_model_and_none_of_its_weights(tmp_path):
    plain, fast = tiny_gpt(), accelerate(tiny_gpt())
    layers = [layer for layer in fast.modules() if isinstance(layer, nn.Linear)]
    assert {type(layer) for layer in layers} == {OneDNNLinear}
    assert all(a.equal(b) for a, b in zip(plain.parameters(), fast.parameters(), strict=True))
    files = [model.save_pretrained(tmp_path / str(i)) for i, model in enumerate((plain, fast))]
    for name in ("model.safetensors", "config.json"):
        assert (files[0] / name).read_bytes() == (files[1] / name).read_bytes()
    assert fast is accelerate(fast)
    assert type(load(files[0]).head) is OneDNNLinear
    assert type(GPT.from_pretrained(files[0]).head) is nn.Linear
    assert type(copy.deepcopy(fast).head) is OneDNNLinear


def test_a_network_that_training_looks_at_is_accelerated_too():
    holder = nn.Module()
    holder.teacher = Frozen(nn.Linear(4, 4))
    assert type(accelerate(holder).teacher.network) is OneDNNLinear


def test_column_major_shares_all_but_wide_linear_weights():
    model = tiny_gpt()
    twin = module.column_major(model.blocks)
    x = random(3, 1, 32)
    torch.testing.assert_close(twin[0](x), model.blocks[0](x))
    mine, its = (dict(m.named_parameters()) for m in (model.blocks, twin))
    relaid = {name for name in mine if mine[name] is not its[name]}
    assert relaid == {n for n in mine if n.endswith(("wq.weight", "wk.weight", "wv.weight"))} | {
        n for n in mine if n.endswith(("proj.weight", "fc1.weight", "fc3.weight"))
    }
    assert all(its[name].stride() == (1, len(its[name])) for name in relaid)


@pytest.mark.parametrize(
    ("rows", "scale", "tokens", "expected"),
    [(4, 1.0, 40, 2), (2, 1.5, 40, 2), (3, 1.5, 40, 0), (5, 1.0, 40, 0), (2, 1.0, 31, 0)],
)
def test_many_steps_of_few_rows_are_laid_out(monkeypatch, rows, scale, tokens, expected):
    """Their results are a plain loop's; the model's own weights stay as they were."""
    relaid = []
    lay_out = module.column_major
    monkeypatch.setattr(module, "column_major", lambda x: relaid.append(x) or lay_out(x))
    model, labels = accelerate(tiny_gpt(num_tokens=40)), torch.arange(rows) % 5
    strides = {name: p.stride() for name, p in model.named_parameters()}
    made = model.generate(labels, num_tokens=tokens, temperature=0, guidance_scale=scale)
    assert len(relaid) == expected
    c, u = (model(made[:, :-1], cond) for cond in (labels, torch.full_like(labels, -1)))
    assert torch.equal((u + scale * (c - u)).argmax(dim=-1), made)
    assert {name: p.stride() for name, p in model.named_parameters()} == strides
