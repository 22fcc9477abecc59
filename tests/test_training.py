"""Training runs through the real entry points, tiny."""

import csv
import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.files import CATS_AND_DOGS, draw_pictures
from helpers.models import AUTOENCODER, TITOK, VQGAN, save_encoder, tiny_gpt, tiny_tokenizer
from helpers.runs import (
    Stop,
    generator_yaml,
    interrupt_after,
    logged_losses,
    tokenizer_yaml,
    weights,
)

from flextok.autoencoder import Autoencoder
from flextok.config import OptimConfig, load_experiment
from flextok.data.datasets import ImageFolder
from flextok.data.parts import PartStore
from flextok.data.sets import take
from flextok.data.text import TextCache
from flextok.data.tokens import TokenDataset
from flextok.evaluation import Cell, Options, evaluate
from flextok.hub import fingerprint
from flextok.losses import perceptual
from flextok.nn.blocks import recompute_blocks
from flextok.objectives import make_objective
from flextok.pipeline import generate_images, load, load_tokenizer_of
from flextok.registry import TASKS, build_model
from flextok.schema import ConfigError, NotFinite
from flextok.tokenizers import TOKENIZERS, MaskGITVQGAN, VQGANConfig
from flextok.training.fit import check_sharding
from flextok.training.optim import make_optimizer, parameter_groups, warmup_cosine
from flextok.training.options import FitOptions
from flextok.training.run import train
from flextok.training.sharding import compile_blocks
from flextok.training.validation import Images

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A tokenizer and a generator trained without interruption on the same pictures."""
    folder = tmp_path_factory.mktemp("run")
    pictures = folder / "pictures"
    draw_pictures(pictures, CATS_AND_DOGS)
    for name in ("cats", "dogs"):
        (pictures / name / "0.txt").write_text(f"two {name} left of a tree")
    train(load_experiment(tokenizer_yaml(folder, pictures)))
    train(load_experiment(generator_yaml(folder, pictures)))
    encoders = {
        "text": {"name": "bytes", "dim": 16, "depth": 1, "num_heads": 2},
        "frozen": {"name": "pretrained", "model": str(save_encoder(folder / "t5"))},
    }
    for name, encoder in encoders.items():
        conditioner = {"name": "text", "encoder": encoder}
        train(load_experiment(generator_yaml(folder, pictures, name, conditioner=conditioner)))
    return folder


def test_a_run_leaves_model_logs_pictures_and_config(uninterrupted):
    folder = uninterrupted / "tokenizer"
    assert load(folder).metadata["class_names"] == ["cats", "dogs"]
    assert load(folder).metadata["step"] == 6
    assert set(logged_losses(folder)) == set(range(6))
    assert {p.name for p in (folder / "pictures").iterdir()} == {
        "step-0000003.png",
        "step-0000006.png",
    }
    assert list(folder.glob("logs/tensorboard/events*"))
    assert (folder / "checkpoints" / "last.ckpt").exists()
    assert load_experiment(folder / "config.yaml").trainer.max_steps == 6


def test_the_generator_learned_its_sizes_from_tokenizer_and_data(uninterrupted):
    tokenizer = load(uninterrupted / "tokenizer")
    gpt = load(uninterrupted / "generator")
    assert gpt.config.vocab_size == tokenizer.vocab_size
    assert gpt.config.num_tokens == tokenizer.num_tokens
    assert gpt.config.conditioner["num_classes"] == 2
    manifest = json.loads((uninterrupted / "generator/tokens/train/manifest.json").read_text())
    assert manifest["variants"] == 3
    assert manifest["length"] == 6 * 3


def test_a_generator_may_write_only_the_first_tokens(uninterrupted, tmp_path):
    pictures = uninterrupted / "pictures"
    path = generator_yaml(uninterrupted, pictures, "short", num_tokens=3)
    train(load_experiment(path, [f"output_dir={tmp_path}", "trainer.max_steps=2"]))
    gpt = load(tmp_path)
    tokenizer = load_tokenizer_of(gpt, tmp_path)
    made = generate_images(gpt, tokenizer, torch.tensor([0, 1]), [2, 3], seed=0)
    assert {k: tuple(v.shape) for k, v in made.items()} == dict.fromkeys((2, 3), (2, 3, 16, 16))
    with pytest.raises(ConfigError, match=r"num_tokens=9 must be at most 8"):
        train(load_experiment(path, [f"output_dir={tmp_path / 'long'}", "model.num_tokens=9"]))


@pytest.mark.parametrize(
    ("task", "overrides", "message"),
    [
        ("generator", ["optim.lr_scale={nothing: 0.1}"], "nothing"),
        ("generator", ["trainer.revive_every=5"], r"revive_every=5 needs a codebook"),
        ("text", ["data.train.root={bare}"], "no picture has a caption"),
        ("text", ["data.validation.root={bare}"], "no picture has a caption"),
    ],
)
def test_mistakes_are_named_before_anything_is_encoded(
    uninterrupted, tmp_path, task, overrides, message
):
    bare = tmp_path / "bare"
    draw_pictures(bare, ["0.png", "1.png"])  # no classes, which would be their captions
    asked = [text.replace("{bare}", str(bare)) for text in overrides]
    config = load_experiment(
        uninterrupted / f"{task}.yaml", [f"output_dir={tmp_path / 'run'}", *asked]
    )
    with pytest.raises(ConfigError, match=message):
        train(config)
    assert not (tmp_path / "run" / "tokens").exists()


def test_changes_of_images_that_one_variant_leaves_out_are_named(uninterrupted, tmp_path, caplog):
    for variants in (1, 2):
        caplog.clear()
        overrides = [f"data.token_variants={variants}", "data.flip=true", "data.hue=0.1"]
        overrides += [f"output_dir={tmp_path / str(variants)}", "trainer.max_steps=1"]
        train(load_experiment(uninterrupted / "generator.yaml", overrides))
        warned = "data.token_variants=1 keeps each image as it is, without flip, hue;"
        assert (warned in caplog.text) == (variants == 1)


@pytest.mark.parametrize("name", ["text", "frozen"])
def test_a_text_generator_trains_on_captions(uninterrupted, name):
    folder = uninterrupted / name
    gpt = load(folder)
    cache = TextCache(PartStore.open(folder / "tokens" / "train" / "text", "caption cache"))
    assert set(cache.places) == {"", "cats", "dogs", *(f"two {n} left of a tree" for n in CLASSES)}
    tokens = TokenDataset(folder / "tokens" / "train")
    assert tokens.captions[:6] == ["two cats left of a tree"] * 3 + ["cats"] * 3  # variants
    first, last = (logged_losses(folder)[step] for step in (0, 5))
    assert last < first
    encoder = gpt.config.conditioner["encoder"]
    if name == "frozen":  # pinned: the generator says whose embeddings it reads
        assert encoder["dim"] == 16
        assert encoder["revision"] == gpt.conditioner.encoder.identity()["revision"]
    drawn = gpt.generate(["cats", "dogs"], generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (2, 8)


CLASSES = ("cats", "dogs")


def test_a_text_generator_trains_without_drawing(uninterrupted, tmp_path):
    """An empty list of prompts could not be padded."""
    overrides = [f"output_dir={tmp_path}", "trainer.max_steps=1", "trainer.num_pictures=0"]
    train(load_experiment(uninterrupted / "text.yaml", overrides))
    assert load(tmp_path).metadata["step"] == 1
    assert not (tmp_path / "pictures").exists()


def test_captions_and_flips_do_not_go_together_silently(uninterrupted, tmp_path, caplog):
    overrides = [f"output_dir={tmp_path / 'run'}", "trainer.max_steps=1"]
    train(load_experiment(uninterrupted / "text.yaml", overrides))
    assert "data.flip=true mirrors pictures, and 6 captions say left or right" in caplog.text


def test_a_text_generator_without_captions_is_refused(uninterrupted, tmp_path):
    flat = tmp_path / "flat"  # no class folders, whose names would be captions
    shutil.copytree(uninterrupted / "pictures" / "cats", flat)
    (flat / "0.txt").unlink()
    overrides = [f"data.train={{name: folder, root: {flat}}}", "data.validation=null"]
    with pytest.raises(ConfigError, match="no picture has a caption"):
        train(load_experiment(uninterrupted / "text.yaml", [*overrides, f"output_dir={tmp_path}"]))


def test_pictures_without_a_caption_are_counted(uninterrupted, tmp_path, caplog):
    overrides = [
        f"data.train={{name: folder, root: {uninterrupted / 'pictures' / 'cats'}}}",
        "data.validation=null",
        f"output_dir={tmp_path}",
        "trainer.max_steps=1",
    ]
    train(load_experiment(uninterrupted / "text.yaml", overrides))
    assert "6 of 9 pictures have no caption" in caplog.text  # two of three, in three variants


def test_a_text_cache_made_by_another_encoder_is_refused(uninterrupted, tmp_path):
    overrides = [
        f"output_dir={tmp_path / 'run'}",
        f"data.token_cache={uninterrupted / 'frozen' / 'tokens'}",
    ]
    with pytest.raises(ValueError, match=r"was made from something else \(encoder"):
        train(load_experiment(uninterrupted / "text.yaml", overrides))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["tokenizer", "generator", "text"])
@pytest.mark.parametrize("step", [3, 5])
def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_last_bit(
    uninterrupted, tmp_path, monkeypatch, task, step
):
    source = uninterrupted / f"{task}.yaml"
    overrides = [f"output_dir={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:
        interrupt_after(patch, step)
        with pytest.raises(Stop):
            train(load_experiment(source, overrides))
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    train(load_experiment(source, overrides))
    expected, found = (logged_losses(folder) for folder in (uninterrupted / task, tmp_path / "run"))
    resumed = {k: v for k, v in found.items() if k >= step}
    assert resumed
    assert resumed == {k: v for k, v in expected.items() if k in resumed}
    for key, value in weights(uninterrupted / task).items():
        assert torch.equal(weights(tmp_path / "run")[key], value), key


@pytest.mark.slow
@pytest.mark.parametrize("task", ["tokenizer", "generator"])
def test_periodic_evaluation_is_the_commands_on_the_exported_model(uninterrupted, tmp_path, task):
    folder = tmp_path / "run"
    evaluation = "evaluation={every: 2, num_tokens: [1, 8], limit: 4, batch_size: 3}"
    train(load_experiment(uninterrupted / f"{task}.yaml", [f"output_dir={folder}", evaluation]))
    reports = list((folder / "evaluation").glob("*/*"))
    assert [p.relative_to(folder).as_posix() for p in reports] == [
        "evaluation/step-0000006/report.json"  # of the validations at 3 and 6 the second
    ]
    report = json.loads(reports[0].read_text())
    assert [r["num_tokens"] for r in report["results"]] == [1, 8]
    assert report["settings"]["sample_count"] == 4
    assert report["settings"]["model_hash"] == fingerprint(load(folder))
    if task == "tokenizer":
        pictures = take(ImageFolder(uninterrupted / "pictures"), 4)
        again = evaluate(
            load(folder), pictures, [Cell(1), Cell(8)], Options(networks=(), batch_size=3)
        )
        scores = [r["scores"] for r in again["results"]]
        assert scores == [r["scores"] for r in report["results"]]
        (logs,) = folder.glob("logs/csv/version_*/metrics.csv")
        logged = [row for row in csv.DictReader(logs.open()) if row.get("eval/psnr@8")]
        assert [float(row["eval/psnr@8"]) for row in logged] == [scores[1]["psnr"]]


def test_a_finished_run_started_again_changes_nothing(uninterrupted):
    before = weights(uninterrupted / "generator")
    train(load_experiment(uninterrupted / "generator.yaml"))
    after = weights(uninterrupted / "generator")
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_generator_does_not_go_on_over_codes_that_have_changed(uninterrupted, tmp_path):
    """The tokenizer was trained on in its place; the generator then said "nothing to do", or went
    on, its embeddings those of the old codes."""
    for name in ("tokenizer", "generator"):
        shutil.copytree(uninterrupted / name, tmp_path / name)
        path = tmp_path / name / "config.yaml"
        text = path.read_text().replace(f"{uninterrupted}/{name}", f"{tmp_path}/{name}")
        path.write_text(text.replace(f"{uninterrupted}/tokenizer", f"{tmp_path}/tokenizer"))
    config = load_experiment(tmp_path / "generator" / "config.yaml")
    assert train(config) == tmp_path / "generator"  # there is nothing to do
    tokenizer = load(tmp_path / "tokenizer")
    with torch.no_grad():
        tokenizer.encoder.head.weight.neg_()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for steps in (config.trainer.max_steps, config.trainer.max_steps + 1):
        more = replace(config, trainer=replace(config.trainer, max_steps=steps))
        with pytest.raises(ConfigError, match=r"of other codes than .*pass resume=false"):
            train(more)


@pytest.mark.parametrize(("task", "images"), [("tokenizer", 2), ("tokenizer", 3), ("generator", 3)])
def test_an_evaluation_of_too_few_images_is_refused_before_any_work(
    uninterrupted, tmp_path, task, images
):
    overrides = [
        f"output_dir={tmp_path / 'run'}",
        f"evaluation={{networks: [efficientnet_lite0_native], limit: {images}}}",
    ]
    with pytest.raises(ValueError, match=f"{images} images are too few to compare as sets"):
        train(load_experiment(uninterrupted / f"{task}.yaml", overrides))
    for work in ("checkpoints/*", "tokens/*"):
        assert not list((tmp_path / "run").glob(work))


def test_the_validation_loss_does_not_depend_on_the_batch_size(uninterrupted, tmp_path):
    """Noise and lengths of a sample were those of its place in its batch."""
    losses = []
    for size in (2, 3, 5):
        folder = tmp_path / str(size)
        overrides = [f"data.batch_size={size}", f"output_dir={folder}", "optim.lr=1e-12"]
        overrides += ["trainer.max_steps=1", "trainer.validate_every=1"]
        train(load_experiment(uninterrupted / "tokenizer.yaml", overrides))
        losses.append(json.loads((folder / "checkpoints" / "best.json").read_text())["loss"])
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-5)


def test_another_model_does_not_continue_a_run(uninterrupted):
    with pytest.raises(ConfigError, match="run of another model"):
        train(load_experiment(uninterrupted / "tokenizer.yaml", ["model.decoder_depth=1"]))


def test_a_token_cache_of_something_else_is_refused(uninterrupted, tmp_path):
    overrides = [
        f"output_dir={tmp_path / 'run'}",
        f"data.token_cache={uninterrupted / 'generator' / 'tokens'}",
        "data.flip=false",
    ]
    with pytest.raises(ValueError, match=r"made from something else.*augmentation"):
        train(load_experiment(uninterrupted / "generator.yaml", overrides))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_step=3", "unknown key 'max_step' in 'trainer'.*Did you mean 'max_steps'"),
        ("model.patchsize=3", "unknown key 'patchsize' in 'model'.*Did you mean 'patch_size'"),
        ("model.quantizer.level=[8]", "unknown key 'level' in 'quantizer fsq'"),
        ("model.name=flxtok", "unknown model 'flxtok'.*Did you mean 'flextok'"),
        ("data.train.name=folders", "unknown dataset 'folders'"),
        ("data.train.root=/nowhere", "root='/nowhere' is not a folder"),
        ("optim.lr=fast", "optim.lr='fast' must be of type float"),
        ("task=both", "task='both' must be one of"),
        ("evaluation={evry: 1}", "unknown key 'evry' in 'evaluation'.*Did you mean 'every'"),
        ("evaluation={networks: [incepton]}", "unknown network 'incepton'"),
        ("evaluation={every: 0}", "evaluation.every=0 must be at least 1"),
        ("lonely", "must look like key=value"),
    ],
)
def test_config_mistakes_are_told_before_training(uninterrupted, tmp_path, override, message):
    with pytest.raises(ConfigError if "root" not in override else ValueError, match=message):
        train(
            load_experiment(
                uninterrupted / "tokenizer.yaml", [f"output_dir={tmp_path / 'x'}", override]
            )
        )


@pytest.mark.parametrize(
    ("asked", "named"),
    [("evaluation={}", "evaluation"), ("trainer.revive_every=5", "trainer.revive_every")],
)
def test_what_a_sharded_model_cannot_do_is_refused(uninterrupted, tmp_path, asked, named):
    overrides = ["trainer.strategy=fsdp2", asked, f"output_dir={tmp_path / 'run'}"]
    with pytest.raises(ConfigError, match=f"fsdp2 shards the model, and {named} needs it whole"):
        train(load_experiment(uninterrupted / "tokenizer.yaml", overrides))


@pytest.mark.parametrize(
    ("batch", "draws", "lengths", "name", "devices", "refused"),
    [
        (4, 1, 8, "sqrt_pow2", 2, True),
        (12, 1, 8, "uniform", 2, True),
        (8, 1, 8, "sqrt_pow2", 2, False),
        (12, 1, 6, "uniform", 2, False),
        (4, 1, 8, "sqrt_pow2", 1, False),
        (4, 1, 8, "none", 2, False),
        (4, 2, 8, "sqrt_pow2", 2, False),
        (4, 3, 8, "sqrt_pow2", 2, True),
    ],
)
def test_sharded_processes_that_may_have_unequally_many_lengths_are_refused(
    batch, draws, lengths, name, devices, refused
):
    model = tiny_tokenizer(drop_mode="truncate")
    asked = {"nested_dropout": name, "batch_lengths": lengths, "draws_per_image": draws}
    objective = make_objective(model, asked)
    options = FitOptions(
        1, output_dir="run", accelerator="cpu", devices=devices, strategy="fsdp2", batch_size=batch
    )
    times = f" times objective.draws_per_image={draws}" if draws > 1 else ""
    message = (
        f"data.batch_size={batch}{times} must be a multiple of objective.batch_lengths={lengths} "
    )
    with pytest.raises(ConfigError, match=message) if refused else nullcontext():
        check_sharding(objective, options)


def test_missing_and_broken_config_files(tmp_path):
    with pytest.raises(ConfigError, match="no config file"):
        load_experiment(tmp_path / "nothing.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1,")
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_experiment(tmp_path / "broken.yaml")


PUBLISHED_SIZES = {  # parameters of the published checkpoints
    "maskgit_vqgan": 54_515_587,
    "titok_s128_stage2": 83_674_639,
    "titok_b64_stage2": 204_814_095,
    "titok_l32_stage2": 641_054_735,
    "titok_bl128_vq8k": 390_179_988,
    "titok_bl128_vae_c16": 389_581_940,
    "maskgit_titok_l32": 177_202_432,
    "maskgit_titok_b64": 177_227_008,
    "maskgit_titok_s128": 294_990_848,
}
SHRUNKEN = {
    "flextok": [
        "model.image_size=32",
        "model.encoder_depth=2",
        "model.decoder_depth=2",
        "model.encoder_dim=64",
        "model.decoder_dim=64",
        "model.num_registers=8",
    ],
    "gpt": ["model.depth=2", "model.dim=32", "model.num_heads=2", "model.num_tokens=6"],
    "maskgit": ["model.depth=3", "model.dim=32", "model.num_heads=2"],
    "maskgit_vqgan": [f"model.{key}={value}" for key, value in VQGAN.items()],
    "autoencoder": [f"model.{key}={value}" for key, value in AUTOENCODER.items()],
    "titok": [f"model.{key}={value}" for key, value in TITOK.items() if key != "quantizer"]
    + [f"model.proxy={VQGAN}"],
}


class Difference(torch.nn.Module):
    """In place of a perceptual loss whose weights are not here."""

    source = "nowhere"

    def __init__(self, pretrained=True):
        super().__init__()

    def forward(self, images, targets):
        return (images - targets).abs().mean()


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shrunk_config_takes_two_steps_in_the_precision_of_a_gpu(
    path, picture_folder, tmp_path, uninterrupted, monkeypatch
):
    """With its own optimizer, clipping and average, and a validation."""
    overrides = [
        f"output_dir={tmp_path / 'run'}",
        "trainer.max_steps=2",
        "trainer.precision=bf16-mixed",
        "trainer.devices=1",
        "trainer.num_nodes=1",
        "trainer.strategy=auto",
        "trainer.accelerator=cpu",
        "trainer.num_pictures=1",
        "trainer.validate_every=2",
        "data.batch_size=2",
        "data.num_workers=0",
    ]
    for part in ("train", "validation"):
        overrides.append(f"data.{part}={{name: folder, root: {picture_folder}}}")
    spec = asdict(load_experiment(path))
    overrides += SHRUNKEN[spec["model"]["name"]]
    if spec["task"] == "generator":
        overrides.append(f"tokenizer={uninterrupted / 'tokenizer'}")
        conditioner = spec["model"].get("conditioner", {})
        if "num_classes" in conditioner:
            overrides.append("model.conditioner.num_classes=2")
        if conditioner.get("encoder", {}).get("name") == "pretrained":
            save_encoder(tmp_path / "t5")
            overrides.append(f"model.conditioner.encoder.model={tmp_path / 't5'}")
            overrides.append("model.conditioner.encoder.dim=null")
    if spec["model"].get("shapes"):
        overrides.append("model.shapes=[[40, 24], [24, 40]]")
    if spec["model"].get("vae", {}).get("name") == "kl":
        vae = "{name: kl, channels: 16, block_channels: [8, 8, 8, 8], norm_groups: 4}"
        overrides.append(f"model.vae={vae}")
        monkeypatch.setattr("flextok.vae.KLVAE.load_weights", lambda self: None)
        monkeypatch.setattr("flextok.vae.KLVAE.has_weights", True)  # the random ones do here
    if spec.get("objective", {}).get("repa"):
        spatial = str(spec["objective"]["repa"].get("spatial", False)).lower()
        repa = "model: vit_tiny_patch16_224, pretrained: false, hidden_dim: 16"
        overrides.append(f"objective.repa={{{repa}, spatial: {spatial}}}")
    if spec.get("objective", {}).get("perceptual"):
        for loss in spec["objective"]["perceptual"]:
            monkeypatch.setitem(perceptual.PERCEPTUAL, loss, Difference)
    if "start_step" in spec["objective"] or spec["objective"].get("name") == "adversarial":
        overrides += ["objective.start_step=0", "objective.dim=32", "objective.num_stages=1"]
    if "proxy" in spec.get("start", {}):
        MaskGITVQGAN(VQGANConfig(**VQGAN)).save_pretrained(tmp_path / "proxy")
        overrides.append(f"start.proxy={tmp_path / 'proxy'}")
    if "first" in spec.get("start", {}):
        config = load_experiment(path, [*overrides, "model.stage=proxy"])
        build_model(TOKENIZERS, config.model).save_pretrained(tmp_path / "first")
        overrides.append(f"start.first={tmp_path / 'first'}")
    if "teacher" in spec.get("start", {}):
        config = load_experiment(path, overrides)
        build_model(TOKENIZERS, config.model).save_pretrained(tmp_path / "teacher")
        overrides.append(f"start.teacher={tmp_path / 'teacher'}")
    if "weights" in spec.get("start", {}):
        # of smaller images, but for a drawer, whose tokens stay as they are
        smaller = [] if spec["model"].get("drawer") else ["model.image_size=16"]
        config = load_experiment(path, [*overrides, *smaller])
        model = build_model(TASKS[config.task], config.model)
        if isinstance(model, Autoencoder):
            model.measure([torch.rand(2, 3, 16, 16)])
        model.save_pretrained(tmp_path / "weights")
        overrides.append(f"start.weights={tmp_path / 'weights'}")
        if "drawer" in spec["start"]:
            overrides.append(f"start.drawer={tmp_path / 'weights'}")
    train(load_experiment(path, [*overrides, "trainer.log_every=1"]))
    losses = logged_losses(tmp_path / "run")
    assert list(losses) == [0, 1]
    assert torch.tensor(list(losses.values())).isfinite().all()
    assert load(tmp_path / "run").metadata["step"] == 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_builds_at_full_size(path):
    config = load_experiment(path)
    spec = {**config.model}
    registry = TASKS[config.task]
    if config.task == "generator" and spec.get("conditioner", {}).get("name") != "text":
        spec["conditioner"] = {"name": "class", "num_classes": 10, **spec.get("conditioner", {})}
        num_tokens = re.fullmatch(r"maskgit_titok_.(\d+)", path.stem)
        sizes = {"vocab_size": 4096, "num_tokens": int(num_tokens[1])} if num_tokens else {}
        spec |= sizes  # those of its tokenizer
    with torch.device("meta"):
        model = build_model(registry, spec)
    size = sum(p.numel() for p in model.parameters())
    assert size == PUBLISHED_SIZES.get(path.stem, size)
    assert size > 1e5


def test_kl_vae_without_weights_is_not_trained_on_noise(picture_folder, tmp_path):
    path = tokenizer_yaml(tmp_path, picture_folder)
    vae = "{name: kl, channels: 4, block_channels: [8, 8], norm_groups: 4}"
    with pytest.raises(ValueError, match="no VAE weights named"):
        train(load_experiment(path, [f"model.vae={vae}"]))


def test_vae_weights_come_from_a_diffusers_folder(tmp_path):
    from flextok.vae import KLVAE

    shape = {"channels": 4, "block_channels": [8, 8], "norm_groups": 4, "layers_per_block": 1}
    source = KLVAE(**shape)
    source.vae.save_pretrained(tmp_path / "vae")
    target = KLVAE(**shape, weights=str(tmp_path / "vae"))
    target.load_weights()
    for a, b in zip(source.parameters(), target.parameters(), strict=True):
        assert torch.equal(a, b)
    other = KLVAE(**{**shape, "channels": 8}, weights=str(tmp_path / "vae"))
    with pytest.raises(ValueError, match="do not fit the configured VAE"):
        other.load_weights()


def test_parameter_groups_spare_vectors_and_tokens():
    objective = make_objective(tiny_tokenizer())
    names = {id(p): n.removeprefix("model.") for n, p in objective.named_parameters()}
    config = OptimConfig(lr=1e-3, weight_decay=0.1, lr_scale={"encoder": 0.5})
    options = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in parameter_groups(objective, config)
        for p in group["params"]
    }
    assert options["encoder.blocks.0.attn.wq.weight"] == (5e-4, 0.1)
    assert options["decoder.blocks.0.attn.wq.weight"] == (1e-3, 0.1)
    assert options["encoder.registers"] == (5e-4, 0.0)
    assert options["decoder.register_pos"] == options["decoder.head.bias"] == (1e-3, 0.0)
    assert "decoder.patch_pos" not in options  # fixed
    with pytest.raises(ConfigError, match="unknown part of the model 'encodr'"):
        parameter_groups(objective, OptimConfig(lr_scale={"encodr": 1.0}))


def test_the_schedule_warms_up_then_falls_to_its_end():
    factor = warmup_cosine(10, 100, 0.1)
    assert factor(0) == 0.1
    assert factor(9) == 1.0
    assert factor(55) == pytest.approx(0.55)
    assert factor(100) == pytest.approx(0.1)
    assert factor(1000) == pytest.approx(0.1)


def take_steps(model, optimizer, steps=3):
    objective = make_objective(model)
    draws = torch.Generator().manual_seed(1)
    for _ in range(steps):
        indices = torch.randint(0, 200, (4, 8), generator=draws)
        optimizer.zero_grad()
        batch = {"indices": indices, "label": torch.zeros(4, dtype=torch.long)}
        objective(batch, draws)["loss"].backward()
        optimizer.step()


def test_muon_turns_the_blocks_matrices_and_adamw_the_rest(tmp_path):
    config = OptimConfig(name="muon", lr=1e-3, weight_decay=0.0)
    model, reference = tiny_gpt().train(), tiny_gpt().train()
    optimizer = make_optimizer(make_objective(model), config)
    take_steps(model, optimizer, 1)
    adamw = OptimConfig(lr=1e-3, weight_decay=0.0)
    take_steps(reference, make_optimizer(make_objective(reference), adamw), 1)
    turned = {
        name
        for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert turned == {n for n, p in model.named_parameters() if "blocks." in n and p.ndim == 2}
    change = (model.blocks[0].mlp.fc1.weight - tiny_gpt().blocks[0].mlp.fc1.weight) / 1e-3
    singular = torch.linalg.svdvals(change)
    assert singular.max() < 2.5 * singular.median()  # orthogonal, nearly
    # its state goes through a checkpoint
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state")
    take_steps(model, optimizer)
    resumed = tiny_gpt().train()
    weights_, state = torch.load(tmp_path / "state", weights_only=True)
    resumed.load_state_dict(weights_)
    continued = make_optimizer(make_objective(resumed), config)
    continued.load_state_dict(state)
    take_steps(resumed, continued)
    # the draws begin anew in each call: run the first one's again
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True)
    )


def test_muon_is_refused_where_weights_are_shared_out(uninterrupted, tmp_path):
    options = [f"output_dir={tmp_path / 'run'}", "optim.name=muon"]
    with pytest.raises(ConfigError, match="muon needs whole matrices"):
        train(
            load_experiment(uninterrupted / "tokenizer.yaml", [*options, "trainer.strategy=fsdp2"])
        )


def test_recomputing_or_compiling_the_blocks_changes_no_gradient():
    indices, cond = torch.arange(32).view(4, 8), torch.zeros(4, dtype=torch.long)

    def gradients(model):
        objective, draws = make_objective(model.train()), torch.Generator().manual_seed(0)
        objective({"indices": indices, "label": cond}, draws)["loss"].backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    compiled, recomputed, both = tiny_gpt(), tiny_gpt(), tiny_gpt()
    compile_blocks(compiled, backend="eager")
    recompute_blocks(recomputed)
    recompute_blocks(both)
    compile_blocks(both, backend="eager")
    plain = gradients(tiny_gpt())
    assert torch.equal(plain, gradients(recomputed))
    assert torch.allclose(plain, gradients(compiled), atol=1e-6)
    assert torch.allclose(plain, gradients(both), atol=1e-6)
    assert both.state_dict().keys() == tiny_gpt().state_dict().keys()


def test_pictures_that_cannot_be_drawn_end_no_run(tmp_path, caplog):
    """A model may be not finite for a while: the guard of the steps decides when a run ends."""

    def draw(model):
        raise NotFinite("the decoded images hold values that are not finite")

    trainer = SimpleNamespace(is_global_zero=True, global_step=7, loggers=[])
    Images(tmp_path, draw).work(trainer, make_objective(tiny_gpt()))
    assert "step 7: no images drawn" in caplog.text
    assert not list(tmp_path.iterdir())
