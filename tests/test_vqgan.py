"""MaskGIT-VQGAN, the VQ and KL bottlenecks, and the adversarial and perceptual losses."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from golden.titok.load import close, golden, load_case, published_shapes
from torchvision.models import vgg

from flextok.convert.titok import vqgan_config, vqgan_state
from flextok.hub import CheckpointError
from flextok.losses import perceptual
from flextok.losses.adversarial import (
    LeCam,
    PatchDiscriminator,
    hinge_discriminator_loss,
    hinge_generator_loss,
)
from flextok.objectives import ReconstructionObjective
from flextok.quantizers import KL, VQ
from flextok.quantizers.vq import codebook_usage, count_codes
from flextok.schema import from_mapping
from flextok.tokenizers.titok import TiTok, TiTokConfig
from flextok.tokenizers.vqgan import MaskGITVQGAN, VQGANConfig


@pytest.fixture(scope="module")
def published():
    """The encoder has its own case; decoder and codebook are those inside the tiny TiTok."""
    encoder, io = load_case("maskgit_vqgan_tiny_encoder")
    titok, titok_io = load_case("titok_tiny")
    names = {"pixel_decoder": "decoder", "pixel_quantize": "quantize"}
    parts = ((key.partition("."), value) for key, value in titok.items())
    state = {f"{names[p]}.{rest}": v for (p, _, rest), v in parts if p in names}
    return encoder | state, io | {"image": titok_io["image"]}


@pytest.fixture(scope="module")
def vqgan(published):
    state, _ = published
    model = MaskGITVQGAN(from_mapping(VQGANConfig, vqgan_config(state, image_size=64))).eval()
    model.load_weights(vqgan_state(state), "golden")
    return model


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    quantizer = {"name": "vq", "codebook_size": 16, "dim": 4, "l2_norm": False}
    config = VQGANConfig(
        image_size=16,
        dim=32,
        multipliers=[1, 1, 1],
        num_blocks=1,
        quantizer=quantizer,  # 4 x 4
    )
    return MaskGITVQGAN(config)


@torch.no_grad()
def test_golden_encoder_and_decoder(vqgan, published):
    _, io = published
    close(vqgan.encoder(io["image"]), io["hidden"], 1e-4)
    assert torch.equal(vqgan.encode(io["image"] * 2 - 1), io["codes"])
    decoded = (vqgan.decode(io["codes"])[..., ::4, ::4] + 1) / 2
    close(decoded, io["decoded_4"], 1e-3)


def test_published_keys_and_shapes():
    published = published_shapes()["PretrainedTokenizer"]
    with torch.device("meta"):
        model = MaskGITVQGAN(from_mapping(VQGANConfig, vqgan_config(published)))
    assert model.config == VQGANConfig()  # our defaults are the published model
    model.load_weights(vqgan_state(published), "keys")
    assert sum(p.numel() for p in model.parameters()) == 54_515_587
    with pytest.raises(ValueError, match=r"unknown published key 'encoder\.attn\.weight'"):
        vqgan_state({"encoder.attn.weight": torch.zeros(1)})


def test_sizes_and_errors(tiny):
    assert (tiny.num_tokens, tiny.vocab_size, tiny.image_size) == (16, 16, 16)
    with pytest.raises(ValueError, match="decodes all 16 tokens only, got 4"):
        tiny.decode(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"span \[0, 16\]"):
        tiny.decode(torch.tensor([[16] + [0] * 15]))
    with pytest.raises(ValueError, match=r"expected \[-1, 1\]"):
        tiny.encode(torch.full((1, 3, 16, 16), 200.0))
    with pytest.raises(ValueError, match=r"expected \(B, 3, 16, 16\)"):
        ReconstructionObjective(tiny)({"image": torch.zeros(1, 3, 8, 8)})


def test_norms_of_narrow_models_may_have_fewer_groups(tiny):
    """With the published 32 groups each of 32 channels would lose its mean over the picture."""
    few = replace(tiny.config, norm_groups=4)
    for model in (MaskGITVQGAN(few), TiTok(TiTokConfig(16, 4, stage="finetune", proxy=few))):
        norms = [m for m in model.modules() if isinstance(m, torch.nn.GroupNorm)]
        assert norms
        assert {norm.num_groups for norm in norms} == {4}


def test_training_reduces_the_loss(tiny):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    objective = ReconstructionObjective(tiny)
    optimizer = torch.optim.Adam(tiny.parameters(), 2e-3)
    history = []
    for _ in range(8):
        losses = objective({"image": images})
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        history.append(losses["l2"].item())
    assert all(p.grad is not None for p in tiny.parameters())
    assert history[-1] < 0.8 * history[0]


def test_saves_and_loads(tiny, tmp_path):
    loaded = MaskGITVQGAN.from_pretrained(tiny.save_pretrained(tmp_path))
    indices = torch.arange(16)[None]
    assert torch.equal(loaded.decode(indices), tiny.eval().decode(indices))
    (tmp_path / "config.json").write_text('{"model_type": "titok", "config": {}}')
    with pytest.raises(CheckpointError, match="'titok' model, not 'maskgit_vqgan'"):
        MaskGITVQGAN.from_pretrained(tmp_path)


@pytest.mark.parametrize("l2_norm", [True, False])
def test_vq_straight_through(l2_norm):
    torch.manual_seed(0)
    vq = VQ(32, 8, l2_norm=l2_norm)
    z = torch.randn(2, 5, 8, requires_grad=True)
    codes, indices, aux = vq(z)
    assert torch.equal(codes, vq.indices_to_codes(indices))  # the value is exactly the code
    (codes * torch.arange(8.0)).sum().backward(retain_graph=True)
    projected = torch.nn.functional.normalize(z, dim=-1) if l2_norm else z * 1
    (expected,) = torch.autograd.grad((projected * torch.arange(8.0)).sum(), z)
    close(z.grad, expected, 1e-6)  # the gradient is as if nothing was quantized
    assert vq.codebook.grad is None
    aux.backward()
    chosen = torch.zeros(32, dtype=torch.bool).index_fill(0, indices.flatten(), True)
    assert torch.equal(vq.codebook.grad.abs().sum(dim=-1) > 0, chosen)


def test_vq_finds_every_code():
    vq = VQ(64, 4, l2_norm=False)
    indices = torch.arange(64).view(2, 32)
    assert torch.equal(vq(vq.indices_to_codes(indices))[1], indices)
    with pytest.raises(ValueError, match="z has 3 channels"):
        vq(torch.zeros(1, 1, 3))


def test_vq_aux_weights():
    z = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    vq = VQ(8, 4, l2_norm=False, commitment=0.25)
    both = torch.nn.functional.mse_loss(vq(z)[0], z)
    close(vq(z)[2], 1.25 * both, 1e-6)
    vq.commitment = 0.0
    close(vq(z)[2], both, 1e-6)


def test_usage_and_revival():
    counts = count_codes(torch.tensor([[0, 1], [1, 3]]), 8)
    assert counts.tolist() == [1, 2, 0, 1, 0, 0, 0, 0]
    used, perplexity = codebook_usage(counts)
    assert used == 3 / 8
    close(perplexity, torch.tensor(math.exp(1.5 * math.log(2))), 1e-5)
    assert codebook_usage(torch.full((8,), 5))[1].item() == pytest.approx(8)
    z = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    moved = []
    for _ in range(2):
        torch.manual_seed(0)
        vq = VQ(8, 4)
        before = vq.codebook.clone()
        assert vq.revive(z, counts, generator=torch.Generator().manual_seed(2)) == 5
        assert torch.equal(vq.codebook[counts > 0], before[counts > 0])
        moved.append(vq.codebook[counts == 0])
    assert torch.equal(*moved)  # the generator decides
    unit = torch.nn.functional.normalize(z, dim=-1)
    assert torch.cdist(moved[0], unit).min(dim=-1).values.max() < 1e-3


def test_free_codes_go_where_the_error_is():
    vq = VQ(4, 2, l2_norm=False)
    with torch.no_grad():
        vq.codebook.copy_(torch.tensor([[0.0, 0.0], [9.0, 9.0], [9.0, 9.0], [9.0, 9.0]]))
    z = torch.cat([torch.zeros(1000, 2), torch.tensor([[3.0, 0.0], [0.0, 3.0]])])
    moved = vq.revive(z, count_codes(vq(z)[1], 4), generator=torch.Generator().manual_seed(0))
    assert moved == 3
    assert all(code.sum() == 3 for code in vq.codebook[1:])  # none onto the many well served
    assert vq.revive(z, torch.ones(4)) == 0


def test_kl_samples_in_training_only():
    z = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    kl = KL(4).eval()
    codes, indices, _ = kl(z)
    assert torch.equal(codes, z[..., :4])
    assert indices.shape == (2, 0)
    kl.train()
    a, b = (kl(z, torch.Generator().manual_seed(3))[0] for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, codes)
    with pytest.raises(ValueError, match="continuous"):
        kl.indices_to_codes(indices)


@torch.no_grad()
def test_golden_discriminator_and_losses():
    weights, io = load_case("nlayer_disc")
    image = load_case("titok_tiny")[1]["image"]
    discriminator = PatchDiscriminator(dim=32)
    discriminator.load_state_dict(weights)
    real, fake = discriminator(image), discriminator(image.flip(-1) * 0.9)
    close(real, io["logits_real"], 1e-5)
    close(fake, io["logits_fake"], 1e-5)
    expected = golden()["disc"]
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(expected["hinge_d_loss"])
    lecam = LeCam()
    lecam.real.fill_(0.2)
    lecam.fake.fill_(-0.1)
    key = "lecam(ema_real=.2,ema_fake=-.1)"
    assert lecam(real, fake).item() == pytest.approx(expected[key])


def test_hinge_and_lecam():
    real, fake = torch.tensor([2.0, 3.0]), torch.tensor([-2.0, -1.5])
    assert hinge_discriminator_loss(real, fake) == 0  # all beyond the margin
    assert hinge_generator_loss(fake) == 1.75
    lecam = LeCam(decay=0.9)
    for _ in range(200):
        lecam.update(real, fake)
    close(lecam.real, torch.tensor(2.5), 1e-3)
    close(lecam.fake, torch.tensor(-1.75), 1e-3)
    assert PatchDiscriminator(32, 2)(torch.zeros(1, 3, 65, 64)).shape == (1, 1, 16, 16)


def test_perceptual_weights_are_never_substituted(monkeypatch):
    def missing(pretrained):
        raise OSError("no route to host")

    monkeypatch.setitem(perceptual.PERCEPTUAL, "lpips", missing)
    images = torch.zeros(1, 3, 8, 8)
    assert perceptual.PerceptualLoss({})(images, images) == 0
    with pytest.raises(ValueError, match=r"'lpips' needs pretrained weights.*no route to host"):
        perceptual.PerceptualLoss({"lpips": 1.0})(images, images)
    with pytest.raises(
        ValueError, match=r"unknown perceptual loss 'vgg'.*Known: convnext_s, efficientnet_lite0"
    ):
        perceptual.PerceptualLoss({"vgg": 1.0})


@pytest.mark.parametrize("name", ["lpips", "convnext_s"])
def test_perceptual_networks(name, monkeypatch):
    """On random networks, and without the large parts that no distance needs."""
    features = vgg.make_layers(vgg.cfgs["D"], batch_norm=False)
    monkeypatch.setattr(
        "torchvision.models.vgg16", lambda weights: SimpleNamespace(features=features)
    )
    linear = torch.nn.Sequential(
        torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 9)
    )
    monkeypatch.setattr("torchvision.models.convnext_small", lambda weights: linear)
    loss = perceptual.PerceptualLoss({name: 2.0})
    a = (torch.rand(1, 3, 32, 32) * 2 - 1).requires_grad_()
    b = torch.rand(1, 3, 32, 32) * 2 - 1
    assert loss(a, a) == 0
    value = loss(a, b)
    value.backward()
    assert value > 0
    assert a.grad.abs().sum() > 0
    assert a.grad.isfinite().all()
    network = loss.networks[name].network
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    close(value, 2 * network(a, b), 1e-6)
