"""The latent cache: what a frozen VAE makes of every variant, read in place of the images."""

import functools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from helpers.files import CATS_AND_DOGS, draw_pictures
from helpers.models import TITOK, randomize, tiny_tokenizer
from helpers.processes import die_before, finish, start, start_ranks
from helpers.runs import logged_losses, tokenizer_yaml, weights
from torch.utils.flop_counter import FlopCounterMode

from flextok import fit
from flextok.bench import FLOPS
from flextok.cli import main
from flextok.config import load_experiment
from flextok.data.augmentation import Augmentation
from flextok.data.datasets import ImageFolder
from flextok.data.latents import LatentDataset, build_latent_cache, latents_identity
from flextok.data.processes import Process
from flextok.data.transforms import ImageTransform
from flextok.data.variants import Variants
from flextok.draws import BatchDraws
from flextok.objectives import make_objective
from flextok.schema import ConfigError
from flextok.tokenizers import TiTok, TiTokConfig
from flextok.training.options import FitOptions
from flextok.training.plan import as_text, measure, plan
from flextok.training.run import train
from flextok.vae import KLVAE

KL = {"channels": 4, "block_channels": [8, 8], "layers_per_block": 1, "norm_groups": 4}
REPA = {"model": "vit_tiny_patch16_224", "pretrained": False, "hidden_dim": 16}
AUGMENTED = ImageTransform(16, Augmentation(flip=True, crop="random"))


def objective_on_latents(**spec):
    """Of a model with a VAE of other random weights than any other test's."""
    torch.manual_seed(0)
    model = tiny_tokenizer(vae={"name": "kl", **KL}, patch_size=2)
    model.vae.has_weights = True
    found = make_objective(model, {"null_prob": 0.5, **spec})
    found.prepare()
    return found


def cache(folder, objective, pictures, transform=AUGMENTED, **options):
    identity = latents_identity(objective, {"root": str(pictures)})
    defaults = {"variants": 2, "part_size": 4, "batch_size": 3}
    data = ImageFolder(pictures)
    return build_latent_cache(
        folder, objective, data, transform, identity, **{**defaults, **options}
    )


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize(
    "spec",
    [
        *({}, {"repa": REPA}, {"prefix_alignment": {**REPA, "size": 32}}),
        *({"name": "cross_length"}, {"name": "cross_length", "prefix_alignment": REPA}),
        *({"nested_dropout": "none"}, {"draws_per_image": 3, "repa": REPA}),
    ],
    ids=[
        *("flow", "repa", "prefixes", "cross_length", "cross_length and prefixes", "all tokens"),
        "three draws",
    ],
)
def test_the_losses_of_latents_are_those_of_their_images(spec):
    objective = objective_on_latents(**spec).train()
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    rows = torch.tensor([7, 2, 9, 0, 1, 30])
    found = objective.frozen({"image": images}, BatchDraws(6))
    assert set(found) == set(objective.frozen_columns())
    plain, cached = (
        objective({**batch, "row": rows}, torch.Generator().manual_seed(3))
        for batch in ({"image": images}, found)
    )
    assert plain.keys() == cached.keys()
    for name, loss in plain.items():
        assert torch.allclose(loss, cached[name], rtol=1e-4, atol=1e-5), name
    other = objective({**found, "row": rows.flip(0)}, torch.Generator().manual_seed(3))
    assert not torch.allclose(plain["loss"], other["loss"], rtol=1e-4, atol=1e-5)


def test_a_cache_holds_the_latents_and_the_images_of_every_variant(picture_folder, tmp_path):
    objective = objective_on_latents(repa=REPA)
    assert cache(tmp_path / "latents", objective, picture_folder, part_size=5).is_finished
    found = LatentDataset(tmp_path / "latents")
    variants = Variants(ImageFolder(picture_folder), AUGMENTED, 2, seed=0)
    assert len(found) == len(variants) == 12
    assert found.class_names == ["cats", "dogs"]
    for i, item in enumerate(found):
        image = variants[i]["image"]
        latents = objective.model.vae.encode(image[None])[0]
        assert torch.equal(item["image"], image)
        assert torch.allclose(item["latents"], latents, rtol=1e-3, atol=1e-3)  # fp16
        assert item["latents"].dtype == torch.float32
        assert item["label"] == variants[i]["label"]


def test_a_model_whose_cache_is_complete_stays_where_it_is(picture_folder, tmp_path):
    objective = objective_on_latents()
    cache(tmp_path, objective, picture_folder, device="cpu")
    cache(tmp_path, objective, picture_folder, device="meta")
    assert objective.model.device.type == "cpu"


def test_a_damaged_cache_is_refused(picture_folder, tmp_path):
    """A flipped bit trained along."""
    folder = tmp_path / "latents"
    store = cache(folder, objective_on_latents(), picture_folder)
    path = store.path(1)
    whole = bytearray(path.read_bytes())
    whole[-20] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"part-000001\.safetensors is damaged \(its checksum"):
        LatentDataset(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for key, value in {"columns": "latents", "class_names": [1, 2]}.items():
        (folder / "manifest.json").write_text(json.dumps({**manifest, key: value}))
        with pytest.raises(ValueError, match=rf"is damaged \({key} must be texts\)"):
            LatentDataset(folder)


def test_a_posterior_that_is_sampled_gives_each_variant_a_sample_of_its_own(tmp_path):
    pictures = tmp_path / "pictures"
    draw_pictures(pictures, ["a/0.png"])
    torch.manual_seed(0)
    model = tiny_tokenizer(vae={"name": "kl", **KL, "sample_posterior": True}, patch_size=2)
    model.vae.has_weights = True
    objective, plain = make_objective(model), ImageTransform(16)
    for name, batch_size in (("one", 1), ("two", 3)):
        cache(tmp_path / name, objective, pictures, plain, variants=3, batch_size=batch_size)
    one, two = (LatentDataset(tmp_path / name) for name in ("one", "two"))
    for i in range(3):
        assert torch.allclose(one[i]["latents"], two[i]["latents"], atol=1e-3)  # of its number
    assert not torch.allclose(one[0]["latents"], one[1]["latents"], atol=1e-2)


def test_any_number_of_processes_and_crashes_gives_the_same_files(
    picture_folder, tmp_path, monkeypatch
):
    objective = objective_on_latents()
    cache(tmp_path / "one", objective, picture_folder)
    for rank in (1, 0):
        cache(tmp_path / "two", objective, picture_folder, process=Process(rank, 2))
    assert files(tmp_path / "two") == files(tmp_path / "one")
    calls, encode = [], KLVAE.encode

    def fails(self, images, *rest, **options):
        calls.append(len(images))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(self, images, *rest, **options)

    monkeypatch.setattr(KLVAE, "encode", fails)
    with pytest.raises(KeyboardInterrupt):
        cache(tmp_path / "three", objective, picture_folder)
    cache(tmp_path / "three", objective, picture_folder)
    assert files(tmp_path / "three") == files(tmp_path / "one")
    assert calls == [3, 1, 3, 1, 3, 1, 3, 1]  # one part was whole, and is not made again


def test_what_was_made_from_something_else_is_refused(picture_folder, tmp_path):
    folder, objective = tmp_path / "latents", objective_on_latents()
    cache(folder, objective, picture_folder)
    before = files(folder)
    decoder = objective_on_latents()
    with torch.no_grad():
        decoder.model.vae.vae.decoder.conv_in.weight.add_(1)
        decoder.model.encoder.head.weight.add_(1)
    assert cache(folder, decoder, picture_folder).is_finished  # neither makes the latents
    encoder = objective_on_latents()
    with torch.no_grad():
        encoder.model.vae.vae.encoder.conv_in.weight.add_(1)
    scaled = objective_on_latents()
    scaled.model.config.vae["scaling_factor"] = 0.5
    refused = [
        ("vae_weights", encoder, {}),
        ("vae", scaled, {}),
        ("columns", objective_on_latents(repa=REPA), {}),
        ("augmentation", objective, {"transform": ImageTransform(16)}),
        ("length, seed, variants", objective, {"variants": 1, "seed": 1}),
    ]
    for keys, other, options in refused:
        with pytest.raises(ValueError, match=rf"made from something else \({keys} differ\)"):
            cache(folder, other, picture_folder, **options)
    for other in (encoder, scaled):
        with pytest.raises(ValueError, match="was not made for this FlowObjective"):
            LatentDataset(folder).check_made_for(other)
    LatentDataset(folder).check_made_for(decoder)
    assert files(folder) == before
    os.utime(picture_folder / "cats" / "0.png", ns=(1, 1))
    with pytest.raises(ValueError, match=r"\(data_files differ\)"):
        cache(folder, objective, picture_folder)


def test_what_has_nothing_frozen_is_refused_by_name(picture_folder, tmp_path):
    pixels = make_objective(tiny_tokenizer())
    titok = make_objective(randomize(TiTok(TiTokConfig(**TITOK))))
    for objective, name in ((pixels, "FlowObjective"), (titok, "ReconstructionObjective")):
        with pytest.raises(ConfigError, match=f"{name} has no frozen encoder here.* vae is kl"):
            cache(tmp_path / "latents", objective, picture_folder)
    with pytest.raises(ConfigError, match="ReconstructionObjective has no frozen first part"):
        titok.frozen({}, BatchDraws(0))
    overrides = ["data.latent_variants=1"]
    path = tokenizer_yaml(tmp_path, picture_folder)
    with pytest.raises(ConfigError, match=r"data\.latent_variants .*FlowObjective has no frozen"):
        train(load_experiment(path, overrides))
    with pytest.raises(ConfigError, match=r"data\.latent_variants is for tokenizers"):
        load_experiment(path, [*overrides, "task=generator", "tokenizer=emoji"])


def test_latents_that_do_not_fit_are_refused():
    objective = objective_on_latents()
    with pytest.raises(ValueError, match=r"shape \(2, 4, 4, 4\), expected \(B, 4, 8, 8\)"):
        objective({"latents": torch.zeros(2, 4, 4, 4)})
    for name in ("repa", "prefix_alignment"):
        aligned = objective_on_latents(**{name: REPA})
        with pytest.raises(ValueError, match=rf'objective\.{name} reads images: give "image"'):
            aligned({"latents": torch.zeros(2, 4, 8, 8)})


def test_latents_too_large_for_fp16_make_no_cache(picture_folder, tmp_path):
    objective = objective_on_latents()
    with torch.no_grad():
        objective.model.vae.vae.quant_conv.bias.fill_(1e6)
    with pytest.raises(ValueError, match="cached latents in fp16 hold values that are not finite"):
        cache(tmp_path, objective, picture_folder)


def test_the_plan_counts_what_a_cache_spares_and_takes(picture_folder, tmp_path):
    path = tokenizer_yaml(tmp_path, picture_folder)
    overrides = [f"model.vae={json.dumps({'name': 'kl', **KL})}", "model.patch_size=2"]
    plain, cached = (
        load_experiment(path, [*overrides, f"data.latent_variants={n}"]) for n in (0, 1)
    )
    objective = objective_on_latents()
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter, torch.no_grad():
        objective.frozen({"image": torch.zeros(1, 3, 16, 16)}, BatchDraws(1))
    spared = measure(plain).flops - measure(cached).flops
    assert spared == pytest.approx(counter.get_total_flops(), rel=0.01)
    store = cache(tmp_path / "latents", objective, picture_folder, variants=1)
    rows = {name: values.nbytes for name, values in store.read(0)[0].items()}
    assert measure(cached).row == (rows["latents"] + rows["label"]) / 4
    texts = [as_text(plan(config, 1)) for config in (plain, cached)]
    assert "data.latent_variants would cache 1 KB each" in texts[0]
    assert "are spared by a latent cache" in texts[1]
    with pytest.raises(ConfigError, match="has no frozen encoder"):
        measure(load_experiment(path, ["data.latent_variants=1"]))


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture
def experiment(tmp_path):
    """A run on the latents of a VAE in diffusers' layout, with images as a cache of one variant
    has them: not augmented."""
    pictures = tmp_path / "pictures"
    draw_pictures(pictures, CATS_AND_DOGS)
    torch.manual_seed(0)
    randomize(KLVAE(**KL).vae.requires_grad_(True)).save_pretrained(tmp_path / "vae")
    path = tokenizer_yaml(tmp_path, pictures)
    spec = yaml.safe_load(path.read_text())
    spec["model"] |= {"patch_size": 2, "vae": {"name": "kl", **KL, "weights": f"{tmp_path}/vae"}}
    spec["data"] |= {"flip": False, "batch_size": 3}
    path.write_text(yaml.safe_dump(spec))
    return path


def test_mistakes_of_the_run_are_named_before_latents_are_encoded(experiment, tmp_path):
    overrides = ["data.latent_variants=1", "optim.lr_scale={nothing: 0.1}"]
    overrides += [f"output_dir={tmp_path / 'run'}"]
    with pytest.raises(ConfigError, match="nothing"):
        train(load_experiment(experiment, overrides))
    assert not (tmp_path / "run" / "latents").exists()


def test_a_run_from_a_cache_is_the_run_from_images(experiment, tmp_path, monkeypatch):
    encoded, encode = [], KLVAE.encode

    def counting(self, images, *rest, **options):
        encoded.append(len(images))
        return encode(self, images, *rest, **options)

    monkeypatch.setattr(KLVAE, "encode", counting)
    overrides = ["data.validation=null", "trainer.log_every=1"]
    for name, variants in (("images", 0), ("latents", 1)):
        encoded.clear()
        place = f"output_dir={tmp_path / name}"
        train(load_experiment(experiment, [*overrides, place, f"data.latent_variants={variants}"]))
        assert sum(encoded) == (6 if variants else 18)  # 6 images, 6 steps of 3
    plain, cached = (logged_losses(tmp_path / name) for name in ("images", "latents"))
    assert list(plain) == list(cached) == [0, 1, 2, 3, 4, 5]
    for step, loss in plain.items():
        assert cached[step] == pytest.approx(loss, rel=2e-3)
    a, b = weights(tmp_path / "images"), weights(tmp_path / "latents")
    assert all(torch.allclose(a[key], b[key], atol=5e-3) for key in a)
    encoded.clear()
    shutil.rmtree(tmp_path / "latents" / "checkpoints")
    again = [*overrides, f"output_dir={tmp_path / 'latents'}", "data.latent_variants=1"]
    train(load_experiment(experiment, [*again, "resume=false"]))
    assert encoded == []
    c = weights(tmp_path / "latents")
    assert all(torch.equal(b[key], c[key]) for key in b)


def test_a_cache_is_written_ahead_by_one_command(experiment, tmp_path, capsys, monkeypatch):
    """With images to validate and draw on, and with features to align with."""
    place = tmp_path / "cache"
    overrides = [
        *(f"data.latent_cache={place}", "data.latent_variants=2", "data.flip=true"),
        f"objective.repa={json.dumps(REPA)}",
    ]
    for rank in (1, 0):  # the last one waits for nobody
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr("flextok.data.parts.PartStore.wait", lambda self: None)
        monkeypatch.setattr("flextok.training.prepare.LatentDataset", lambda folder, verify: [])
        assert main(["train", str(experiment), *overrides, "--only-caches"]) == 0
    assert "filled the caches of" in capsys.readouterr().out
    monkeypatch.undo()
    before = files(place)
    assert LatentDataset(place).manifest["columns"] == ["latents", "image"]
    assert not (tmp_path / "tokenizer").exists()
    train(load_experiment(experiment, overrides))
    assert files(place) == before
    assert list((tmp_path / "tokenizer" / "pictures").glob("step-*.png"))
    with pytest.raises(ConfigError, match=r"data\.latent_variants=2 there, 3 now"):
        train(load_experiment(experiment, [*overrides, "data.latent_variants=3"]))


@pytest.mark.slow
def test_killed_and_shared_runs_of_the_command_write_the_same_files(experiment, tmp_path):
    log, whole, killed = tmp_path / "log", tmp_path / "whole", tmp_path / "killed"

    def command(folder):
        changes = ["data.latent_variants=400", f"data.latent_cache={folder}"]  # 3 parts
        return ["train", experiment, *changes, "--only-caches"]

    assert finish(start(command(whole), log, functools.partial(die_before, 0, whole))) == [0]
    count = int(Path(f"{whole}.changes").read_text())
    for moment in (2, count // 2):
        die = functools.partial(die_before, moment, killed)
        assert finish(start(command(killed), log, die)) == [-signal.SIGKILL]
    assert finish(start(command(killed), log)) == [0]
    assert finish(*start_ranks(2, command(tmp_path / "shared"), log)) == [0, 0]
    expected, found = files(whole), files(killed)
    assert len(expected) == 4
    assert files(tmp_path / "shared") == expected
    assert {name: found[name] for name in expected} == expected


def test_fit_takes_a_latent_dataset_for_training(picture_folder, tmp_path):
    objective = objective_on_latents()
    cache(tmp_path / "latents", objective, picture_folder)
    latents = LatentDataset(tmp_path / "latents")
    options = FitOptions(
        output_dir=str(tmp_path / "run"), max_steps=1, batch_size=2, accelerator="cpu", devices=1
    )
    with pytest.raises(ConfigError, match="validation reads images"):
        fit(objective, latents, latents, options=options)
    fit(objective, latents, options=options)
    assert objective.model.metadata["class_names"] == ["cats", "dogs"]
    other = objective_on_latents()
    with torch.no_grad():
        other.model.vae.vae.encoder.conv_in.weight.add_(1)
    options.output_dir = str(tmp_path / "other")
    with pytest.raises(ValueError, match=r"not made for this FlowObjective \(vae_weights differ\)"):
        fit(other, latents, options=options)
