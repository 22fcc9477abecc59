"""Stage 0: what an autoencoder's objective computes, and its training through the entry points."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from diffusers import AutoencoderKL
from helpers.files import CATS_AND_DOGS, draw_pictures
from helpers.models import AUTOENCODER
from helpers.runs import SIX_STEPS, Stop, interrupt_after, logged_losses, same
from lightning.pytorch.strategies import Strategy

import flextok
from flextok.autoencoder import Autoencoder, AutoencoderConfig, channel_statistics
from flextok.cli import main
from flextok.config import ExperimentConfig, OptimConfig, load_experiment
from flextok.data.datasets import ImageFolder
from flextok.data.transforms import ImageTransform
from flextok.draws import BatchDraws
from flextok.losses import perceptual
from flextok.objectives import AutoencoderObjective, AutoencoderObjectiveConfig, make_objective
from flextok.pipeline import load
from flextok.quantizers.kl import kl_to_normal
from flextok.schema import ConfigError, from_mapping
from flextok.training.optim import make_optimizer
from flextok.training.run import train
from flextok.vae import KLVAE, kl_settings

PLAIN = {"equivariance": 0.0, "kl_weight": 0.0}
GAME = {"weight": 0.5, "dim": 32, "num_stages": 1}


def tiny() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(AutoencoderConfig(**AUTOENCODER))


def objective(**options) -> AutoencoderObjective:
    torch.manual_seed(0)
    config = AutoencoderObjectiveConfig(**{**PLAIN, **options})
    return AutoencoderObjective(tiny(), config).train()


def pixels(n: int = 4) -> torch.Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def losses(**options) -> dict[str, torch.Tensor]:
    found = objective(**options)({"image": pixels()}, torch.Generator().manual_seed(2))
    return {name: value.detach() for name, value in found.items()}


def enlarge(x: torch.Tensor, times: int) -> torch.Tensor:
    return x.repeat_interleave(times, -1).repeat_interleave(times, -2)


def gradient(module: torch.nn.Module) -> float:
    return sum(float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None)


def test_the_kl_is_torchs_and_counts_by_its_weight():
    mean, logvar = torch.randn(2, 5), torch.randn(2, 5)
    normal = torch.distributions.Normal
    theirs = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0.0, 1.0))
    torch.testing.assert_close(kl_to_normal(mean, logvar), theirs)
    without, with_kl = losses(), losses(kl_weight=0.5)
    torch.testing.assert_close(with_kl["loss"], without["loss"] + 0.5 * without["kl"])


def test_a_perceptual_distance_counts_and_is_noted(monkeypatch):
    class Squared(torch.nn.Module):
        source = "nowhere"

        def __init__(self, pretrained):
            super().__init__()

        def forward(self, made, images):
            return (made - images).square().mean()

    monkeypatch.setitem(perceptual.PERCEPTUAL, "squared", Squared)
    found = losses(perceptual={"squared": 2.0})
    torch.testing.assert_close(found["loss"], found["l1"] + found["perceptual"])
    assert found["perceptual"] > 0
    noted = objective(perceptual={"squared": 2.0})
    noted.prepare()
    assert "nowhere" in noted.model.metadata["perceptual"]["squared"]


def test_the_adversarial_term_begins_at_its_step():
    game = objective(**GAME, start_step=10)
    found = game({"image": pixels()})
    found["loss"].backward()
    assert "adversarial" not in found
    assert gradient(game.discriminator) == 0
    assert gradient(game.model) > 0
    game.step = 10
    found = game({"image": pixels()})
    total = found["l1"] + 0.5 * found["adversarial"] + found["discriminator_loss"]
    torch.testing.assert_close(found["loss"], total)
    found["loss"].backward()
    assert gradient(game.discriminator) > 0
    game.before_step()
    assert game.lecam.real != 0
    assert len(game.parts()) == 2
    assert "discriminator_loss" not in game.eval()({"image": pixels()})


def test_each_side_of_the_game_trains_its_own_network():
    game = objective(**GAME, start_step=0)
    made = pixels().requires_grad_()
    found = game.against_discriminator({"loss": torch.zeros(())}, pixels().flip(0), made)
    found["discriminator_loss"].backward(retain_graph=True)
    assert made.grad is None
    assert gradient(game.discriminator) > 0
    game.zero_grad()
    found["adversarial"].backward()
    assert made.grad.abs().sum() > 0
    assert gradient(game.discriminator) == 0


def test_latents_and_images_are_transformed_alike():
    """A latent that is the mean of its patch stays so, whatever the flip, turn and scale."""
    game = objective(equivariance=1.0, smallest=0.5)
    rng, means = random.Random(0), F.avg_pool2d(pixels(), 2)
    sides = set()
    for _ in range(20):
        latents, images = game.transform(means, enlarge(means, 2), rng)
        sides.add(latents.shape[-1])
        assert images.shape[-1] == 2 * latents.shape[-1]
        assert (F.avg_pool2d(images, 2) - latents).abs().mean() < 0.1
    assert sides == {4, 6, 8}
    assert losses(equivariance=1.0)["l1"] != losses()["l1"]
    plain, other = (objective(equivariance=share).eval() for share in (0.0, 1.0))
    batch, seed = {"image": pixels()}, torch.Generator().manual_seed
    assert plain(batch, seed(0))["l1"] == other(batch, seed(0))["l1"]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_one_batch_overfits(name):
    game = objective(kl_weight=1e-6)
    optimizer = make_optimizer(game, OptimConfig(name=name, lr=1e-2, weight_decay=0.0))
    rng, found = torch.Generator().manual_seed(0), []
    smooth = enlarge(F.avg_pool2d(pixels(), 4), 4)
    for _ in range(40):
        loss = game({"image": smooth}, rng)["l1"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    assert sum(found[-5:]) < 0.7 * sum(found[:5])


def test_a_decoder_trained_on_leaves_the_latents_as_they_are():
    trained = tiny()
    trained.measure([pixels()])
    config = trained.config
    asked = {"name": "autoencoder", "train": ["post_quant_conv", "decoder"]}
    game = make_objective(Autoencoder(config), asked, {"weights": trained}).train()
    game({"image": pixels()})["loss"].backward()
    assert gradient(game.model.decoder) > 0
    assert gradient(game.model.encoder) == 0
    game.finish([{"image": pixels(2)}])
    assert game.model.config == config
    assert torch.equal(game.model.posterior(pixels())[0], trained.posterior(pixels())[0])
    larger = Autoencoder(AutoencoderConfig(**{**AUTOENCODER, "channels": 6}))
    with pytest.raises(ConfigError, match="must have the sizes"):
        make_objective(larger, None, {"weights": trained})
    with pytest.raises(ConfigError, match=r"objective.train=\[\] names no part"):
        objective(train=[])


def test_noise_of_latents_is_in_deviations_and_in_training_alone():
    trained = tiny()
    std = [0.5, 1.0, 2.0, 4.0]
    trained.config = replace(trained.config, latents_mean=[0.0] * 4, latents_std=std)
    config = AutoencoderObjectiveConfig(**PLAIN, latent_noise=0.5)
    game = AutoencoderObjective(tiny(), config, weights=trained).train()
    assert not any("noise" in name for name in game.state_dict())
    draws = BatchDraws(400, torch.Generator().manual_seed(0))
    noise = game.with_noise(torch.zeros(400, 4, 16, 16), draws)
    amounts = noise.std((2, 3)) / torch.tensor(std)  # (400, 4)
    assert (amounts.mean(dim=1, keepdim=True) / amounts - 1).abs().max() < 0.2
    assert amounts.max() == pytest.approx(0.5, abs=0.06)
    assert amounts.mean() == pytest.approx(0.25, abs=0.02)
    some = game.with_noise(torch.zeros(2, 4, 16, 16), BatchDraws(400, generator_of(0)).take([7, 9]))
    assert torch.equal(some, noise[[7, 9]])  # whatever the batch

    def l1(game: AutoencoderObjective) -> float:
        return float(game({"image": pixels()}, generator_of(2))["l1"].detach())

    assert l1(game) != l1(objective())
    assert l1(game.eval()) == l1(objective().eval())
    with pytest.raises(ConfigError, match=r"latent_noise=0.1 .* start.weights"):
        objective(latent_noise=0.1)
    with pytest.raises(ConfigError, match="latent_noise"):
        from_mapping(AutoencoderObjectiveConfig, {"latent_noise": 1.5})


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """An experiment beside its pictures, trained without interruption in the folder "run"."""
    folder = tmp_path_factory.mktemp("stage0")
    draw_pictures(folder / "pictures", CATS_AND_DOGS)
    data = {"name": "folder", "root": str(folder / "pictures")}
    experiment = {
        "task": "autoencoder",
        "output_dir": str(folder / "run"),
        "model": {"name": "autoencoder", **AUTOENCODER},
        "objective": {**GAME, "start_step": 3, "equivariance": 0.5},
        "data": {"train": data, "validation": data, "batch_size": 4, "flip": True},
        "optim": {"name": "muon", "lr": 1e-2, "warmup_steps": 2, "ema_decay": 0.9},
        "trainer": SIX_STEPS,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(experiment))
    train(load_experiment(folder / "config.yaml"))
    return folder


def test_a_run_leaves_a_diffusers_folder_with_standardised_latents(run):
    folder = run / "run"
    images = ImageFolder(str(run / "pictures"))
    transform = ImageTransform(16)
    batch = torch.stack([transform(images[i]["image"]) for i in range(len(images))])
    vae = KLVAE(**kl_settings(folder)).eval()
    vae.load_weights()
    mean, std = channel_statistics([vae.encode(batch)])
    assert torch.allclose(mean, torch.zeros(4).double(), atol=1e-4)
    assert torch.allclose(std, torch.ones(4).double(), atol=1e-4)
    theirs, ours = AutoencoderKL.from_pretrained(folder).eval(), load(folder)
    with torch.no_grad():
        assert torch.equal(theirs(batch).sample, ours.decode(ours.posterior(batch)[0]))
    assert ours.metadata["step"] == 6
    assert ours.metadata["objective"]["name"] == "autoencoder"
    assert (folder / "pictures" / "step-0000006.png").is_file()
    tokenizer = flextok.FlexTokConfig(16, num_registers=4, encoder_depth=1, decoder_depth=1)
    tokenizer.vae = {"name": "kl", "weights": str(folder)}
    assert flextok.FlexTok(tokenizer).noise_shape == (4, 8, 8)


@pytest.mark.parametrize("validates", [True, False])
def test_latents_are_measured_once_a_step_where_the_run_trains(
    run, tmp_path, monkeypatch, validates
):
    """At the end Lightning has moved the weights to the CPU, where it took an hour."""
    events = []
    measure, teardown = Autoencoder.measure, Strategy.teardown

    def spy(name, plain):
        return lambda self, *args: (events.append(name), plain(self, *args))[1]

    monkeypatch.setattr(Autoencoder, "measure", spy("measured", measure))
    monkeypatch.setattr(Strategy, "teardown", spy("torn down", teardown))
    overrides = [f"output_dir={tmp_path / 'run'}", *([] if validates else ["data.validation=null"])]
    train(load_experiment(run / "config.yaml", overrides))
    # validated after steps 3 and 6
    assert events == ["measured"] * (2 if validates else 1) + ["torn down"]
    assert load(tmp_path / "run").config == load(run / "run").config


def test_a_run_of_the_decoder_alone_keeps_the_encoder_and_resumes(run, tmp_path, monkeypatch):
    def config(name: str) -> ExperimentConfig:
        objective = {
            **{**GAME, "start_step": 0, "kl_weight": 0, "equivariance": 0, "latent_noise": 0.25},
            "train": ["post_quant_conv", "decoder"],
        }
        overrides = [f"objective={json.dumps(objective)}", f"output_dir={tmp_path / name}"]
        return load_experiment(run / "config.yaml", [*overrides, f"start.weights={run / 'run'}"])

    train(config("whole"))
    started, tuned = load(run / "run"), load(tmp_path / "whole")
    before, after = started.state_dict(), tuned.state_dict()
    for name in before:
        learns = name.startswith(("post_quant_conv", "decoder"))
        assert torch.equal(before[name], after[name]) != learns
    assert tuned.config == started.config  # the latents' mean and deviation too
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(Stop):
            train(config("broken"))
    train(config("broken"))
    assert same(tmp_path / "whole", tmp_path / "broken")


def test_one_on_the_hub_is_found_by_its_weights(run, monkeypatch):
    def download(repo, allow_patterns, **how):
        assert {"config.json", "diffusion_pytorch_model.safetensors"} <= set(allow_patterns)
        return str(run / "run")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert Autoencoder.from_pretrained("owner/vae").config.channels == 4


@pytest.mark.parametrize("step", [3, 5])
def test_a_resumed_run_repeats_the_uninterrupted_one(run, tmp_path, monkeypatch, step):
    config = load_experiment(run / "config.yaml", [f"output_dir={tmp_path / 'run'}"])
    with monkeypatch.context() as patch:
        interrupt_after(patch, step)
        with pytest.raises(Stop):
            train(config)
    train(config)
    assert same(run / "run", tmp_path / "run")
    first, second = (json.loads((f / "run/config.json").read_text()) for f in (run, tmp_path))
    assert first == second
    expected, found = logged_losses(run / "run"), logged_losses(tmp_path / "run")
    assert {k: v for k, v in found.items() if k >= step} == {
        k: v for k, v in expected.items() if k >= step
    }


def test_a_finished_run_is_known_and_left_as_it_is(run, caplog):
    before = {path: path.stat().st_mtime_ns for path in (run / "run").iterdir() if path.is_file()}
    with caplog.at_level("INFO"):
        train(load_experiment(run / "config.yaml"))
    assert "nothing to do" in caplog.text
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_what_an_autoencoder_cannot_do_is_refused(run, tmp_path, capsys):
    picture = str(next((run / "pictures").rglob("*.png")))
    for command in (["reconstruct", picture, "--model"], ["sample"]):
        output = ["--output", str(tmp_path / "out.png")]
        assert main([*command, str(run / "run"), *output]) == 1
        assert "is an autoencoder, which has no tokens" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="evaluation decodes tokens"):
        load_experiment(run / "config.yaml", ["evaluation={limit: 2}"])
    sharded = [
        "trainer.strategy=fsdp2",
        "optim.name=adamw",
        "objective={}",
        f"output_dir={run / 'other'}",
    ]
    with pytest.raises(ConfigError, match="an autoencoder, whose latents are measured"):
        train(load_experiment(run / "config.yaml", sharded))
