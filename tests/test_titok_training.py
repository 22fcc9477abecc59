"""TiTok's whole training, tiny: teacher, both stages, discriminator, MaskGIT, sampling."""

import copy
from dataclasses import replace

import pytest
import torch
import yaml
from helpers.files import CATS_AND_DOGS, draw_pictures
from helpers.models import TITOK, VQGAN
from helpers.runs import SIX_STEPS, Stop, interrupt_after, logged_losses, weights
from PIL import Image

from flextok.cli import main
from flextok.config import OptimConfig, load_experiment
from flextok.losses import perceptual
from flextok.losses.adversarial import hinge_discriminator_loss, hinge_generator_loss
from flextok.objectives import ReconstructionObjective, make_objective
from flextok.pipeline import load
from flextok.quantizers.vq import codebook_usage
from flextok.registry import build_model
from flextok.schema import ConfigError
from flextok.tokenizers import MaskGITVQGAN, TiTok, TiTokConfig, VQGANConfig
from flextok.training.optim import make_optimizer
from flextok.training.run import train

MASKGIT = {"name": "maskgit", "dim": 16, "depth": 1, "num_heads": 2, "dropout": 0.1}
ADVERSARIAL = {"name": "adversarial", "start_step": 2, "dim": 32, "num_stages": 1, "weight": 0.1}


def experiment(folder, name, model, **changes):
    """The checked config of a six-step run into folder/name, on the pictures of folder/pictures."""
    pictures = {"name": "folder", "root": str(folder / "pictures")}
    values = {
        "task": "generator" if model["name"] == "maskgit" else "tokenizer",
        "output_dir": str(folder / name),
        "model": model,
        "data": {"train": pictures, "validation": pictures, "batch_size": 4, "flip": True},
        "optim": {"lr": 1e-3, "warmup_steps": 2, "ema_decay": 0.9},
        "trainer": SIX_STEPS,
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_experiment(path)


def stages(folder):
    """The four runs in order, as experiments."""
    at = {name: str(folder / name) for name in ("vqgan", "stage1", "stage2")}
    model = {"name": "titok", "proxy": VQGAN, **TITOK}
    return [
        experiment(folder, "vqgan", {"name": "maskgit_vqgan", **VQGAN}, objective=ADVERSARIAL),
        experiment(folder, "stage1", {**model, "stage": "proxy"}, start={"proxy": at["vqgan"]}),
        experiment(
            folder,
            "stage2",
            {**model, "stage": "finetune"},
            start={"proxy": at["vqgan"], "first": at["stage1"]},
            objective=ADVERSARIAL,
        ),
        experiment(folder, "generator", MASKGIT, tokenizer=at["stage2"]),
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("titok")
    draw_pictures(folder / "pictures", CATS_AND_DOGS)
    for config in stages(folder):
        train(config)
    return folder


def test_each_stage_starts_from_the_one_before(trained):
    vqgan, first, second = (load(trained / n) for n in ("vqgan", "stage1", "stage2"))
    for key, value in first.state_dict().items():
        if key.startswith(("encoder.", "quantizer.")):
            assert torch.equal(second.state_dict()[key], value), f"{key} is frozen"
    decoder = second.pixel_decoder.conv_in.weight - vqgan.decoder.conv_in.weight
    assert 0 < decoder.abs().max() < 0.02, "the pixel decoder began as the teacher's, then learned"
    assert "stage1 (weights " in second.metadata["start"]["first"]
    assert str(trained) not in str(second.metadata["start"]), "a card tells no local path"
    assert "of 32 codes in use" in second.metadata["codebook"]
    checkpoint = torch.load(trained / "stage2" / "checkpoints" / "last.ckpt", weights_only=True)
    assert not any("proxy" in key for key in checkpoint["state_dict"])


def test_the_log_holds_every_loss_and_the_codebook(trained):
    header = (trained / "stage2/logs/csv/version_0/metrics.csv").read_text().splitlines()[0]
    for name in (
        *(
            "train/l2",
            "train/adversarial",
            "train/discriminator_hinge",
            "train/discriminator_lecam",
        ),
        *("train/codes_used", "val/codes_used", "val/perplexity", "val/l2"),
    ):
        assert name in header.split(",")


def test_sampling_drives_every_model(trained, capsys):
    output = trained / "out.png"

    def sample(model, *arguments):
        return main(["sample", str(trained / model), *arguments, "--output", str(output)])

    pictures = ("--images", str(trained / "pictures" / "cats"))
    assert sample("vqgan", *pictures) == sample("stage2", *pictures) == 0
    assert sample("stage1", *pictures) == 1
    assert "train the second stage" in capsys.readouterr().err
    assert sample("stage2", *pictures, "--num-tokens", "3") == 1
    assert "decodes all 6 tokens only, got 3" in capsys.readouterr().err
    assert sample("stage2", *pictures, "--steps", "3") == 1
    assert "unknown titok decoding option 'num_steps'" in capsys.readouterr().err
    some = ("--classes", "dogs", "none", "--num-samples", "3", "--generator-steps", "2")
    assert sample("generator", *some, "--class-guidance", "1.5", "--temperature", "2") == 0
    wide = Image.open(output)
    assert wide.width > 3 * 128
    assert 2 * 128 < wide.height < 3 * 128  # a row a class
    assert sample("generator", "--top-k", "3") == 1
    error = capsys.readouterr().err
    assert "unknown maskgit sampling option 'top_k'" in error
    assert "num_steps" in error


def test_sweep_measures_a_tokenizer_of_one_length(trained, capsys):
    assert main(["sweep", str(trained / "stage2"), "--data", str(trained / "pictures")]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table if line.strip()[:1].isdigit()] == ["6", "6"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "name"), [(2, "stage2"), (3, "generator")])
def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_last_bit(
    trained, tmp_path, monkeypatch, number, name
):
    config = stages(trained)[number]
    config.output_dir = str(tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(Stop):
            train(config)
    train(config)
    expected, found = (logged_losses(folder) for folder in (trained / name, tmp_path / "run"))
    assert found[5] == expected[5]
    for key, value in weights(trained / name).items():
        assert torch.equal(weights(tmp_path / "run")[key], value), key


def tiny_objective(start_step=0, model=None):
    torch.manual_seed(0)
    model = model or MaskGITVQGAN(VQGANConfig(**VQGAN))
    adversarial = {"start_step": start_step, "dim": 32, "num_stages": 1, "lr": 3e-3}
    torch.manual_seed(0)
    return make_objective(model, {"name": "adversarial", "weight": 0.5, **adversarial}).train()


OPTIM = OptimConfig(lr=1e-3, betas=[0.9, 0.999], weight_decay=0.01)


def test_one_backward_pass_equals_alternating_optimizers():
    """Against the published alternation, written out with two optimisers."""
    objective = tiny_objective().double()  # Adam makes much of rounding errors
    parts = ("model", "discriminator", "lecam")
    model, critic, lecam = (copy.deepcopy(getattr(objective, part)) for part in parts)
    options = {"betas": (0.9, 0.999), "weight_decay": 0.0}  # decay is tested elsewhere
    optimizer = make_optimizer(objective, replace(OPTIM, weight_decay=0.0))
    generator_step = torch.optim.AdamW(model.parameters(), 1e-3, **options)
    critic_step = torch.optim.AdamW(critic.parameters(), 3e-3, **options)
    draws = torch.Generator().manual_seed(1)
    for _ in range(3):
        images = torch.rand(2, 3, 16, 16, generator=draws, dtype=torch.float64) * 2 - 1
        optimizer.zero_grad()
        objective({"image": images})["loss"].backward()
        objective.before_step()
        for part in objective.parts():
            torch.nn.utils.clip_grad_norm_(part.module.parameters(), 1.0)
        optimizer.step()

        critic.requires_grad_(False)
        losses, _, made = ReconstructionObjective(model).reconstruct({"image": images})
        total = losses["loss"] + 0.5 * hinge_generator_loss(critic(made))
        generator_step.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        critic.requires_grad_(True)
        real, fake = critic(images), critic(made.detach())
        loss = hinge_discriminator_loss(real, fake) + 1e-3 * lecam(real, fake)
        lecam.update(real, fake)
        critic_step.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
        generator_step.step()
        critic_step.step()
    for part, theirs in zip(parts, (model, critic, lecam), strict=True):
        ours = getattr(objective, part).state_dict()
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(ours[key], value, atol=1e-5, rtol=1e-4, msg=key)


def test_a_discriminator_is_left_alone_until_its_step_and_begins_as_new():
    """AdamW counted steps of zero gradients and decayed the weights; the first true ones were
    several times its rate."""
    objective = tiny_objective(start_step=30)
    fresh = copy.deepcopy(objective)
    before = copy.deepcopy(objective.discriminator.state_dict())
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def step(objective, optimizer, number):
        objective.step = number
        optimizer.zero_grad()
        objective({"image": images})["loss"].backward()
        assert all(p.grad is not None for p in objective.discriminator.parameters())  # DDP waits
        objective.before_step()
        for part in objective.parts():
            torch.nn.utils.clip_grad_norm_(part.module.parameters(), 1.0)
        optimizer.step()

    optimizer = make_optimizer(objective, OPTIM)
    for number in range(30):
        step(objective, optimizer, number)
    for key, value in objective.discriminator.state_dict().items():
        assert torch.equal(value, before[key]), key
    fresh.load_state_dict(objective.state_dict())
    step(objective, optimizer, 30)
    step(fresh, make_optimizer(fresh, OPTIM), 30)
    for key, value in fresh.discriminator.state_dict().items():
        assert torch.equal(objective.discriminator.state_dict()[key], value), key
        assert not torch.equal(value, before[key]), key


def test_muon_leaves_the_discriminator_to_adamw():
    shape = {"image_size": 16, "patch_size": 4, "num_tokens": 4, "head_dim": 8}
    sizes = {"encoder_dim": 16, "encoder_depth": 1, "decoder_dim": 16, "decoder_depth": 1}
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    first, second = (tiny_objective(model=TiTok(TiTokConfig(**shape, **sizes))) for _ in range(2))
    second.load_state_dict(first.state_dict())
    before = copy.deepcopy(first.state_dict())
    for objective, name in ((first, "muon"), (second, "adamw")):
        optimizer = make_optimizer(objective, replace(OPTIM, name=name))
        objective({"image": images})["loss"].backward()
        optimizer.step()
    ours, adamws = (objective.discriminator.parameters() for objective in (first, second))
    assert all(torch.equal(a, b) for a, b in zip(ours, adamws, strict=True))
    other = second.state_dict()
    for name, now in first.state_dict().items():
        if name.startswith("model.") and "blocks" in name and now.ndim == 2:
            assert not torch.equal(now, before[name]), name
            assert not torch.equal(now, other[name]), name


def test_before_its_start_the_discriminator_neither_learns_nor_counts():
    objective = tiny_objective(start_step=1)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    losses = objective({"image": images})
    assert losses["loss"] == objective.eval()({"image": images})["loss"]
    losses["loss"].backward()
    assert all((p.grad == 0).all() for p in objective.discriminator.parameters())
    assert "adversarial" not in losses


def test_copies_share_teachers_and_perceptual_networks(monkeypatch):
    monkeypatch.setitem(perceptual.PERCEPTUAL, "lpips", Distance)
    proxy = VQGANConfig(**VQGAN)
    model = TiTok(TiTokConfig(**TITOK, proxy=proxy, stage="proxy"))
    learner = make_objective(model, {}, {"proxy": MaskGITVQGAN(proxy)})
    assert copy.deepcopy(learner).model.proxy is model.proxy
    model = TiTok(TiTokConfig(**TITOK))
    objective = make_objective(model, {"perceptual": {"lpips": 2.0}})
    objective.prepare()
    copied = copy.deepcopy(objective)
    ours, theirs = (o.perceptual.networks["lpips"].network for o in (objective, copied))
    assert ours is theirs
    assert copied.model.encoder.head is not model.encoder.head
    assert model.metadata["perceptual"] == {"lpips": "weight 2, from a test"}


class Distance(torch.nn.Module):
    source = "a test"

    def __init__(self, pretrained=True):
        super().__init__()

    def forward(self, images, targets):
        return (images - targets).abs().mean()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": {}}, "starts from a trained maskgit_vqgan.*start.proxy"),
        ({"start": {"first": "stage1", "proxy": "vqgan"}}, "unknown model to start from 'first'"),
        ({"start": {"proxy": "stage2"}}, r"start.proxy \(got a titok model\)"),
        ({"start": {"teacher": "vqgan"}}, "unknown model to start from 'teacher'"),
        ({"start": {"proxy": "vqgan"}, "objective": {"name": "adversarial"}}, "learns no pixels"),
    ],
)
def test_a_wrong_start_is_told_before_training(trained, tmp_path, changes, message):
    changes["start"] = {key: str(trained / name) for key, name in changes["start"].items()}
    (tmp_path / "pictures").symlink_to(trained / "pictures")
    model = {"name": "titok", "proxy": VQGAN, **TITOK, "stage": "proxy"}
    with pytest.raises(ValueError, match=message):
        train(experiment(tmp_path, "run", model, **changes))


def test_continuous_and_whole_losses_are_refused_where_they_do_not_fit(trained, tmp_path):
    (tmp_path / "pictures").symlink_to(trained / "pictures")
    single = {"name": "titok", **TITOK}
    kl = {"name": "kl", "dim": 4}
    steps = {"max_steps": 1, "accelerator": "cpu", "devices": 1, "validate_every": 1}
    train(experiment(tmp_path, "kl", {**single, "quantizer": kl}, trainer=steps))
    assert (tmp_path / "kl" / "pictures" / "step-0000001.png").exists()
    with pytest.raises(ConfigError, match=r"is continuous \(KL\)"):
        train(experiment(tmp_path, "over_kl", MASKGIT, tokenizer=str(tmp_path / "kl")))
    fsq, trainer = {"name": "fsq", "levels": [4, 4]}, {**steps, "revive_every": 5}
    with pytest.raises(ConfigError, match="is a first stage, without pixels"):
        train(experiment(tmp_path, "over_first", MASKGIT, tokenizer=str(trained / "stage1")))
    with pytest.raises(ConfigError, match=r"revive_every=5 needs a learned codebook"):
        train(experiment(tmp_path, "fsq", {**single, "quantizer": fsq}, trainer=trainer))


def test_dead_codes_are_revived_and_usage_is_logged(trained, tmp_path):
    """A codebook of which one code can win: without revival it stays at one."""
    (tmp_path / "pictures").symlink_to(trained / "pictures")
    used = {}
    for revive_every in (0, 2):
        trainer = {"max_steps": 8, "accelerator": "cpu", "devices": 1, "log_every": 1}
        name = f"revive{revive_every}"
        model = {"name": "titok", **TITOK}
        model["quantizer"] = {"name": "vq", "codebook_size": 32, "dim": 4, "l2_norm": False}
        config = experiment(
            tmp_path, name, model, trainer={**trainer, "revive_every": revive_every}
        )
        config.data.validation = config.data.train
        config.trainer.validate_every = 8
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("flextok.training.prepare.build_model", build_with_one_near_code)
            train(config)
        used[revive_every] = float(load(tmp_path / name).metadata["codebook"].split("%")[0])
    assert used[0] == pytest.approx(100 / 32, abs=0.1)
    assert used[2] > 3 * used[0]


def build_with_one_near_code(registry, spec):
    model = build_model(registry, spec)
    with torch.no_grad():
        model.quantizer.codebook.fill_(50.0)
        model.quantizer.codebook[0] = 0.0
    return model


@pytest.mark.parametrize("name", ["titok", "flextok"])
def test_components_combine_freely(trained, tmp_path, name):
    """FSQ in TiTok, and MaskGIT over FlexTok's indices, by config alone."""
    (tmp_path / "pictures").symlink_to(trained / "pictures")
    fsq = {"name": "fsq", "levels": [4, 4]}
    tail = {**TITOK, "quantizer": fsq, "ordered": True}
    flex = {"image_size": 16, "patch_size": 4, "num_registers": 6, "head_dim": 16}
    flex |= {"encoder_depth": 1, "encoder_dim": 32, "decoder_depth": 2, "decoder_dim": 32}
    flex |= {"vae": {"name": "identity"}, "quantizer": fsq, "decode": {"num_steps": 2}}
    model = {"name": name, **(tail if name == "titok" else flex)}
    train(experiment(tmp_path, "tokenizer", model))
    at = str(tmp_path / "tokenizer")
    generator = train(experiment(tmp_path, "generator", MASKGIT, tokenizer=at))
    assert load(generator).config.vocab_size == 16
    output = tmp_path / "out.png"
    assert main(["sample", str(generator), "--output", str(output)]) == 0
    assert Image.open(output).width > 3 * 128  # 1, 2, 4 and 6 tokens


def test_usage_of_even_codes_is_whole():
    used, perplexity = codebook_usage(torch.full((8,), 3))
    assert (used.item(), round(perplexity.item(), 3)) == (1.0, 8.0)


def test_the_teacher_may_quantize_with_fsq():
    spec = VQGANConfig(**{**VQGAN, "quantizer": {"name": "fsq", "levels": [4, 4]}})
    teacher = MaskGITVQGAN(spec).eval()
    first = TiTok(TiTokConfig(**TITOK, stage="proxy", proxy=spec))
    make_objective(first, {}, {"proxy": teacher})
    second = TiTok(TiTokConfig(**TITOK, stage="finetune", proxy=spec))
    make_objective(second, {}, {"proxy": teacher, "first": first})
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    indices = first.eval().encode(images)
    decoded = first.decode(indices)
    assert decoded.std() > 0
    assert torch.allclose(decoded, second.eval().decode(indices), atol=1e-5)
