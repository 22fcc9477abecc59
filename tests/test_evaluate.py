"""Whole evaluations: the same numbers however they are run, and a report that explains them."""

import json
import logging
import math
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.files import draw_pictures
from helpers.models import TITOK, tiny_gpt, tiny_tokenizer

from flextok.data.datasets import ImageFolder
from flextok.data.pictures import CorruptPicture
from flextok.data.sets import take
from flextok.data.transforms import ImageTransform
from flextok.draws import NOISE, row_generators, sample_evenly
from flextok.emoji.datasets import Emoji
from flextok.evaluation import (
    EVALUATORS,
    Cell,
    Evaluator,
    Options,
    evaluate,
    job,
    processes,
    runner,
    sources,
)
from flextok.evaluation.distances import frechet_distance, kernel_distance, statistics
from flextok.evaluation.evaluators import FeatureDistances
from flextok.evaluation.features import EfficientNetLite0, Features
from flextok.evaluation.metrics import cosine_distance, psnr, sharpness, to_8_bit
from flextok.evaluation.reference import Reference, save_reference
from flextok.evaluation.runner import PART, each_class
from flextok.files import only_one
from flextok.generators import GPT, MaskGIT, MaskGITConfig
from flextok.schema import NotFinite
from flextok.tokenizers import TiTok, TiTokConfig

NUMBER = PART + 7  # two parts, the second an odd one
CELLS = [Cell(2, 2), Cell(8, 2, 1.5)]


class Projection:
    """A stand-in for a feature network, for tests that are not about the network: a random
    projection of the pixels, squashed."""

    def __init__(self, name="projection"):
        self.name, self.preprocessing, self.weights = name, "none", "0123456789abcdef"
        self.classifies = True
        generator = torch.Generator().manual_seed(0)
        self.matrix = torch.randn(3 * 16 * 16, 12, generator=generator, dtype=torch.float64)

    def __call__(self, pixels):
        x = torch.tanh(pixels.double().flatten(1) / 128 @ self.matrix / 16)
        return Features(x, 3 * x[:, :5])


def stand_in(name):
    return lambda setting: FeatureDistances(Projection(name))


@pytest.fixture(autouse=True)
def projection(monkeypatch):
    """Puts the stand-in where the names ask for inception, under that name."""
    monkeypatch.setitem(EVALUATORS, "inception", stand_in("inception"))


def options(**changes) -> Options:
    return Options(**{"networks": ("inception",), "batch_size": 7, **changes})


def emoji(number=NUMBER):
    return take(Emoji("validation"), number)


def tokenizer(**changes):
    return tiny_tokenizer(**changes).double()


def names_in(folder) -> list[str]:
    """What lies in an output folder."""
    return sorted(path.name for path in folder.iterdir())


def comparable(report) -> dict:
    """A report without what may differ: times, memory, batches, processes."""
    report = json.loads(json.dumps(report))
    report.pop("run")
    for result in report["results"]:
        assert result.pop("seconds_per_picture") > 0
    return report


def assert_same(one, other, tolerance=1e-6):
    one, other = comparable(one), comparable(other)
    assert one["settings"] == other["settings"]
    assert one["warnings"] == other["warnings"]
    for a, b in zip(one["results"], other["results"], strict=True):
        assert a["scores"] == pytest.approx(b["scores"], rel=tolerance, abs=1e-9)
    assert one["codes"] == other["codes"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One evaluation in a single batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EVALUATORS, "inception", stand_in("inception"))
        return evaluate(tokenizer(), emoji(), CELLS, options(batch_size=NUMBER))


def items_of(items):
    class Items(torch.utils.data.Dataset):
        class_names = ("a",)

        def __len__(self):
            return len(items)

        def __getitem__(self, index):
            return items[index]

    return Items()


def captioned(number):
    """Emoji with their names as captions; the second cannot be read."""

    class Captioned(torch.utils.data.Dataset):
        class_names = ("a",)
        emoji = Emoji("validation")

        def __len__(self):
            return number

        def __getitem__(self, index):
            if index == 1:
                raise CorruptPicture("1.png", "broken")
            return {**self.emoji[index], "label": 0}

    return Captioned()


def test_a_text_generator_is_evaluated_by_the_pictures_captions(monkeypatch, tmp_path):
    """It was asked to draw class labels: a training run died at its first validation."""
    encoder = {"name": "bytes", "dim": 16, "depth": 1, "num_heads": 2, "max_length": 64}
    gpt = tiny_gpt(conditioner={"name": "text", "encoder": encoder}).double()
    prompts = []
    generate = gpt.generate

    def listening(cond, **asked):
        prompts.extend(cond)
        return generate(cond, **asked)

    monkeypatch.setattr(gpt, "generate", listening)
    data = captioned(5)
    report = evaluate(
        gpt, data, [Cell(8, 1)], options(num_samples=7), tmp_path, tokenizer=tokenizer()
    )
    names = [Emoji("validation")[i]["caption"] for i in (0, 0, 2, 2, 3, 3, 4)]
    assert prompts == names
    assert report["results"][0]["count"] == 7
    assert {"gfid", "kid"} <= set(report["results"][0]["scores"])
    assert not [line for line in report["warnings"] if "caption" in line]
    prompts.clear()
    items = [
        {**data.emoji[i], "label": 0, "caption": "a heart" if i in (1, 4) else ""} for i in range(6)
    ]
    report = evaluate(gpt, items_of(items), [Cell(8, 1)], options(), tokenizer=tokenizer())
    assert prompts == ["a heart"] * 6  # none of a text that nobody wrote
    assert "4 of 6 images have no caption and stand for no prompt" in report["warnings"]
    bare = {**data.emoji[0], "caption": "", "label": 0}
    monkeypatch.setattr(type(data), "__getitem__", lambda self, i: bare)
    with pytest.raises(ValueError, match="the images have no captions"):
        evaluate(gpt, data, [Cell(8, 1)], options(), tokenizer=tokenizer())


def test_by_default_what_is_at_hand_is_measured_and_the_rest_named(monkeypatch):
    """Inception's and VGG's weights are placed by hand, so the plain command failed."""

    def missing(name):
        def load(*_):
            raise ValueError(f"no weights of {name} here")

        return load

    monkeypatch.setitem(EVALUATORS, "inception", missing("inception"))
    monkeypatch.setitem(EVALUATORS, "lpips", missing("lpips"))
    offline = "efficientnet_lite0_native"
    monkeypatch.setitem(EVALUATORS, offline, stand_in(offline))
    report = evaluate(tokenizer(), emoji(5), [Cell(1, 1)], options(networks=None))
    assert f"frechet_{offline}" in report["results"][0]["scores"]
    assert "rfid" not in report["results"][0]["scores"]
    for name in ("inception", "lpips"):
        assert f"{name} is left out: no weights of {name} here" in report["warnings"]
    with pytest.raises(ValueError, match="no weights of inception here"):
        evaluate(tokenizer(), emoji(5), [Cell(1, 1)], options())
    asked = options(networks=None, inception_weights="gone.pth")
    with pytest.raises(ValueError, match="no weights of inception here"):
        evaluate(tokenizer(), emoji(5), [Cell(1, 1)], asked)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_reconstruction_scores_do_not_depend_on_the_batch_size(whole, batch_size):
    report = evaluate(tokenizer(), emoji(), CELLS, options(batch_size=batch_size))
    assert report["run"]["batch_size"] == batch_size
    assert_same(report, whole)


@pytest.mark.parametrize("kind", ["gpt", "maskgit"])
def test_generation_scores_do_not_depend_on_the_batch_size(kind):
    if kind == "gpt":
        generator = tiny_gpt().double()
    else:
        classes = {"name": "class", "num_classes": 5, "learned_null": True}
        config = MaskGITConfig(200, 8, dim=32, depth=2, num_heads=2, conditioner=classes)
        generator = MaskGIT(config).double().eval()
    model, data = tokenizer(), emoji(9)
    cells = [Cell(8, 1)]
    reports = [
        evaluate(
            *(generator, data, cells, options(batch_size=size, num_samples=PART + 3)),
            tokenizer=model,
        )
        for size in (1, 7, 64)
    ]
    assert_same(reports[0], reports[1])
    assert_same(reports[0], reports[2])
    scores = reports[0]["results"][0]["scores"]
    assert {"gfid", "kid", "precision", "recall"} <= set(scores)
    assert not {"rfid", "psnr"} & set(scores)
    assert reports[0]["settings"]["labels"] == {
        "classes": 5, "fewest": 13, "most": 14, "balanced": True
    }  # fmt: skip


def in_process(rank, folder, count):
    """One of two processes; spawned, so it sets up what the fixtures do."""
    torch.set_num_threads(1)
    EVALUATORS["inception"] = stand_in("inception")
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", store, rank=rank, world_size=count)
    seen = []
    encode = sources.encode_rows

    def listening(model, images, seed, numbers):
        seen.extend(numbers.tolist())
        return encode(model, images, seed, numbers)

    sources.encode_rows = listening
    report = evaluate(tokenizer(), emoji(), CELLS, options(), Path(folder) / "report")
    (Path(folder) / f"seen-{rank}.json").write_text(json.dumps([seen, report]))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_count_every_picture_once_and_agree_with_one(whole, tmp_path):
    torch.multiprocessing.spawn(in_process, (str(tmp_path), 2), nprocs=2)
    (first, report), (second, same) = (
        json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in (0, 1)
    )
    assert first
    assert second
    assert sorted(first + second) == list(range(NUMBER))
    assert report == same
    assert report["run"]["processes"] == 2
    assert report["settings"]["sample_count"] == NUMBER
    assert_same(report, whole)
    assert names_in(tmp_path / "report") == ["report.json"]


def test_scores_are_those_of_the_pictures(whole):
    """By hand: every picture encoded, decoded from its own noise, compared."""
    model, network = tokenizer(), Projection()
    transform, data = ImageTransform(16), emoji()
    images = torch.stack([transform(data[i]["image"]) for i in range(NUMBER)])
    rngs = row_generators(0, NOISE, range(NUMBER))
    decoded = model.decode(
        model.encode(images)[:, :8], num_steps=2, guidance_scale=1.5, generator=rngs
    )
    scores = whole["results"][1]["scores"]
    assert scores["psnr"] == pytest.approx(psnr(decoded, images).mean().item())
    assert scores["sharpness"] == pytest.approx(
        sharpness(decoded).mean().item() / sharpness(images).mean().item()
    )
    ours, real = (network(to_8_bit(x)).pooled for x in (decoded, images))
    apart = cosine_distance(ours, real)
    assert scores["feature_distance_inception"] == pytest.approx(apart.mean().item())
    squares = (ours - real).square().sum(1).mean().item()
    assert scores["feature_distance_squared_inception"] == pytest.approx(squares)
    assert scores["rfid"] == pytest.approx(frechet_distance(statistics(ours), statistics(real)))
    assert whole["codes"]["vocab_size"] == 200
    result = whole["results"][0]
    assert result["bits_per_pixel"] == pytest.approx(2 * math.log2(200) / 256)
    assert result["entropy_bits_per_pixel"] < result["bits_per_pixel"]


def test_what_is_plausible_and_what_is_faithful_are_apart(whole, monkeypatch):
    class Brightness(Evaluator):
        name = "brightness"

        def measure(self, images):
            return {"brightness": images.mean(dim=(1, 2, 3))}

        def scores(self, rows):
            return {"brightness": float(rows.made("brightness").mean())}

    for result in whole["results"]:
        plausible, faithful = set(result["plausible"]), set(result["faithful"])
        assert {"sharpness", "kid", "rfid", "precision"} <= plausible
        features = {f"feature_distance{kind}_inception" for kind in ("", "_squared")}
        assert faithful == {"psnr", "mse", "ssim", *features}
        assert not plausible & faithful
        assert {**result["plausible"], **result["faithful"]} == result["scores"]
    monkeypatch.setitem(EVALUATORS, "brightness", lambda setting: Brightness())
    (result,) = evaluate(tokenizer(), emoji(5), [Cell(1, 1)], options(networks=()))["results"]
    grouped = {*result["plausible"], *result["faithful"]}
    assert set(result["scores"]) - grouped == {"brightness"}, "neither of the two"


def test_the_report_says_all_that_the_numbers_depend_on(whole):
    settings = whole["settings"]
    for key in ("crop", "interpolation", "dtype", "seed", "sample_count", "reference_hash"):
        assert settings[key] is not None, key
    for key in ("model_hash", "flextok_version", "image_size", "solver", "guidance"):
        assert settings[key] is not None, key
    assert settings["dtype"] == "float64"
    assert settings["labels"]["balanced"] is False
    ways = [(r["num_steps"], r["guidance_scale"], r["count"]) for r in whole["results"]]
    assert ways == [(2, 7.5, NUMBER), (2, 1.5, NUMBER)]
    other = evaluate(tokenizer(), emoji(9), [Cell(1, 1)], options(seed=1))
    assert other["settings"]["reference_hash"] != settings["reference_hash"]
    assert any("fewer than a subset" in warning for warning in other["warnings"])
    assert any("9 images for 12 features" in warning for warning in other["warnings"])


def test_other_networks_never_bear_fids_name(monkeypatch):
    for name in ("inception_0123abcd", "other"):
        monkeypatch.setitem(EVALUATORS, name, stand_in(name))
    report = evaluate(
        tokenizer(), emoji(9), [Cell(1, 1)], options(networks=("inception_0123abcd", "other"))
    )
    scores = set(report["results"][0]["scores"])
    assert {"frechet_other", "kernel_other", "frechet_inception_0123abcd"} <= scores
    assert not {"rfid", "gfid", "kid", "precision", "inception_score_10_shuffled"} & scores
    assert any("not the weights that FID" in warning for warning in report["warnings"])


# --- interruptions ------------------------------------------------------------------------------


class Stop(BaseException):
    pass


def run_until(stop_after, output, monkeypatch, **changes):
    """Evaluate into a folder; stop, as by a signal, before picture number `stop_after`. Returns the
    report, or None, and the pictures that were encoded."""
    seen = []
    encode = sources.encode_rows

    def counting(model, images, seed, numbers):
        if stop_after is not None and len(seen) + len(images) > stop_after:
            raise Stop
        seen.extend(numbers.tolist())
        return encode(model, images, seed, numbers)

    with monkeypatch.context() as patch:
        patch.setattr(sources, "encode_rows", counting)
        try:
            report = evaluate(tokenizer(), emoji(), CELLS, options(**changes), output)
        except Stop:
            report = None
    return report, len(seen)


def test_an_earlier_report_stays_until_there_is_another(tmp_path):
    """It was removed first, and a mistake in the second command lost it."""
    evaluate(tokenizer(), emoji(), [Cell(1, 1)], options(), tmp_path)
    before = (tmp_path / "report.json").read_text()
    broken = tokenizer()
    broken.get_parameter("decoder.head.weight").data.fill_(torch.nan)
    with pytest.raises(NotFinite):
        evaluate(broken, emoji(), [Cell(1, 1)], options(), tmp_path)
    assert (tmp_path / "report.json").read_text() == before
    evaluate(tokenizer(), emoji(), [Cell(8, 1)], options(), tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["results"][0]["num_tokens"] == 8


def test_evaluators_of_a_users_own_do_not_mix(monkeypatch):
    """The last one's column stood for both."""

    class Least(Evaluator):
        name = "least"

        def measure(self, images):
            return {"pixel": images.amin((1, 2, 3))}

        def scores(self, rows):
            return {"least": float(rows.made("pixel").min())}

    class Most(Least):
        name = "most"

    class Tokens(Evaluator):
        name, needs = "tokens", ("indices",)

        def measure(self, indices):
            return {"first": indices[:, 0]}

        def scores(self, rows):
            return {"largest_first": int(rows.made("first").max())}

    class Both(Tokens):
        name, needs = "both", ("images", "indices")

    def measured(*kinds):
        with monkeypatch.context() as patch:
            for kind in kinds:
                patch.setitem(EVALUATORS, kind.name, lambda setting, kind=kind: kind())
            return evaluate(tokenizer(), emoji(), [Cell(1, 1)], options())

    assert measured(Least)["results"][0]["scores"]["least"] == -1
    with pytest.raises(ValueError, match="evaluator most measures 'pixel', and so does another"):
        measured(Least, Most)
    assert measured(Tokens)["codes"]["largest_first"] >= 0
    with pytest.raises(ValueError, match="evaluator both needs images, indices: indices come"):
        measured(Both)


def test_an_interrupted_evaluation_continues_after_its_last_part(whole, tmp_path, monkeypatch):
    assert run_until(PART + 5, tmp_path, monkeypatch, batch_size=4)[0] is None
    assert not (tmp_path / "report.json").exists()
    report, seen = run_until(None, tmp_path, monkeypatch, batch_size=64)
    assert seen == NUMBER - PART
    assert_same(report, whole)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert names_in(tmp_path) == ["report.json"]


def test_records_of_another_evaluation_are_thrown_away(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    run_until(PART + 5, tmp_path, monkeypatch, batch_size=4)
    report, seen = run_until(None, tmp_path, monkeypatch, seed=1)
    assert seen == NUMBER
    assert "another evaluation: starting over" in caplog.text
    assert_same(report, evaluate(tokenizer(), emoji(), CELLS, options(seed=1)))


def test_a_damaged_part_is_measured_again(whole, tmp_path, monkeypatch, caplog):
    """One bad part made every later run of the evaluation fail. Every byte counts: a bit that
    flips in a number would be a wrong score."""
    for place in (0, 100, -5, None):
        output = tmp_path / f"{place}"
        run_until(PART + 5, output, monkeypatch, batch_size=4)
        part = output / "flextok-reconstructed" / "part-000000.safetensors"
        data = bytearray(part.read_bytes())
        if place is None:
            data = data[: len(data) // 2]
        else:
            data[place] ^= 4
        part.write_bytes(data)
        report, seen = run_until(None, output, monkeypatch, batch_size=64)
        assert seen == NUMBER
        assert f"{part} is damaged" in caplog.text
        assert_same(report, whole)


def test_files_of_the_users_own_are_never_removed(tmp_path, monkeypatch):
    """`--output DIR` removed a folder DIR/records, whatever it held."""
    mine = {
        name: tmp_path / name for name in ("records/thesis.txt", "flextok-reconstructed/notes.txt")
    }
    for path in mine.values():
        path.parent.mkdir()
        path.write_text("years of work")
    with pytest.raises(ValueError, match=r"such as notes\.txt.*choose another output folder"):
        evaluate(tokenizer(), emoji(5), [Cell(1, 1)], options(), tmp_path)
    mine.pop("flextok-reconstructed/notes.txt").unlink()
    evaluate(tokenizer(), emoji(5), [Cell(1, 1)], options(), tmp_path)
    assert all(path.read_text() == "years of work" for path in mine.values())
    run_until(PART + 5, tmp_path / "b", monkeypatch, batch_size=4)
    note = tmp_path / "b" / "flextok-reconstructed" / "note.txt"
    note.write_text("mine")  # put there while it ran
    run_until(None, tmp_path / "b", monkeypatch, seed=1)
    assert [p.name for p in note.parent.iterdir()] == ["note.txt"]
    (tmp_path / "c").mkdir()
    report = tmp_path / "c" / "report.json"
    report.write_text('{"settings": ["of another program"]}')
    with pytest.raises(ValueError, match=r"report\.json was not written by flextok"):
        evaluate(tokenizer(), emoji(5), [Cell(1, 1)], options(), tmp_path / "c")
    assert report.read_text() == '{"settings": ["of another program"]}'


def test_a_damaged_manifest_starts_over(whole, tmp_path, monkeypatch):
    for text in ("[]", "null", "{", ""):
        run_until(PART + 5, tmp_path, monkeypatch, batch_size=4)
        (tmp_path / "flextok-reconstructed" / "manifest.json").write_text(text)
        report, seen = run_until(None, tmp_path, monkeypatch, batch_size=64)
        assert seen == NUMBER
        assert_same(report, whole)


def test_unreadable_pictures_are_counted(picture_folder, tmp_path):
    (picture_folder / "cats" / "1.png").write_bytes(b"broken")
    report = evaluate(
        tokenizer(), ImageFolder(picture_folder), [Cell(1, 1)], options(batch_size=2), tmp_path
    )
    assert report["settings"]["sample_count"] == 5
    assert report["results"][0]["count"] == 5
    assert any("1 of 6 images could not be read" in w for w in report["warnings"])
    for path in picture_folder.rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="no image of the data set could be read"):
        evaluate(tokenizer(), ImageFolder(picture_folder), [Cell(1, 1)], options())


def test_a_perfect_picture_counts_as_100_db(monkeypatch):
    monkeypatch.setattr(sources, "decode_rows", lambda model, indices, *rest: images)
    transform, data = ImageTransform(16), emoji(5)
    images = torch.stack([transform(data[i]["image"]) for i in range(5)])
    report = evaluate(tokenizer(), data, [Cell(1)], options())
    assert report["results"][0]["scores"]["psnr"] == 100
    assert report["results"][0]["scores"]["rfid"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cells": [Cell(9)]}, r"num_tokens=9 must be in \[1, 8\]"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"num_samples": 1}, "num_samples=1 must be at least 2"),
        ({"networks": (), "reference": "x.npz"}, "needs a feature network"),
        ({"networks": (), "save_reference": "x.npz"}, "choose one of --networks"),
        ({"reference": "x.npz"}, "x.npz is not an .npz file"),
        ({"save_reference": "x.dat"}, r"must end in \.npz"),
        ({"number": 3}, "3 images are too few"),
        ({"networks": ("lpips",), "inception_weights": "x.pth"}, "add inception there, or leave"),
    ],
)
def test_mistakes_are_told_before_the_work(change, message):
    cells, number = change.pop("cells", [Cell(1)]), change.pop("number", 5)
    model = tokenizer()
    model.encode = None  # the work would fail otherwise
    with pytest.raises(ValueError, match=message):
        evaluate(model, emoji(number), cells, options(**change))


def test_prefixes_of_a_tokenizer_that_decodes_none_are_refused_before_networks_load(monkeypatch):
    monkeypatch.setattr(job, "load_evaluators", None)
    model = TiTok(TiTokConfig(**TITOK))
    with pytest.raises(ValueError, match=r"num_tokens=2 must be 6: .* all of its tokens only"):
        evaluate(model, emoji(5), [Cell(6), Cell(2)], options())


def test_a_model_that_diverged_is_refused():
    model = tokenizer()
    with torch.no_grad():
        model.decoder.head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="values that are not finite"):
        evaluate(model, emoji(5), [Cell(1, 1)], options())


def test_several_processes_need_a_folder(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(ValueError, match="need an output folder"):
        evaluate(tokenizer(), emoji(5), [Cell(1, 1)], options())


@pytest.mark.slow
def test_the_offline_network_end_to_end(monkeypatch):
    """With real features: what the command computes is torch-fidelity's distance of them."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    network = EfficientNetLite0("cpu", torch.float32)
    monkeypatch.setitem(EVALUATORS, "inception", lambda setting: FeatureDistances(network))
    report = evaluate(tokenizer(), emoji(8), [Cell(8, 2)], options())
    transform, data = ImageTransform(16), emoji(8)
    images = torch.stack([transform(data[i]["image"]) for i in range(8)])
    model = tokenizer()
    rngs = row_generators(0, NOISE, range(8))
    decoded = model.decode(model.encode(images), num_steps=2, generator=rngs)
    sides = [
        fid_features_to_statistics(network(to_8_bit(x)).pooled.double()) for x in (decoded, images)
    ]
    theirs = fid_statistics_to_metric(*sides, verbose=False)["frechet_inception_distance"]
    ours = report["results"][0]["scores"]["frechet_efficientnet_lite0"]
    assert ours == pytest.approx(theirs, rel=1e-4)


# --- references ---------------------------------------------------------------------------------


@pytest.fixture
def adm(tmp_path):
    """Writes a reference as ADM's is laid out; returns its path."""

    def write(size=16, number=40, statistics_too=True, **changes):
        draws = np.random.default_rng(0)
        pictures = draws.integers(0, 256, (number, size, size, 3), dtype=np.uint8)
        arrays = {"arr_0": pictures}
        if statistics_too:
            rows = Projection()(torch.from_numpy(pictures[:, :16, :16]).movedim(-1, 1)).pooled
            stats = statistics(rows)
            arrays |= {"mu": stats.mean, "sigma": stats.covariance}
        arrays |= changes
        path = tmp_path / "reference.npz"
        np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
        return path

    return write


def test_adms_reference_loads_and_its_statistics_are_the_pictures(adm):
    network = Projection("inception")
    stored, computed = (Reference(adm(statistics_too=s), network, 16) for s in (True, False))
    assert frechet_distance(stored.statistics, computed.statistics) == pytest.approx(0, abs=1e-9)
    assert computed.statistics.count == 40
    assert len(stored.features) == 40
    assert any("how many images" in warning for warning in stored.warnings)


def test_generated_pictures_against_a_stored_reference(adm):
    path = adm()
    report = evaluate(
        *(tiny_gpt().double(), path, [Cell(8, 1)], options(num_samples=20)), tokenizer=tokenizer()
    )
    scores = report["results"][0]["scores"]
    assert scores["gfid"] > 1
    assert {"kid", "precision", "recall"} <= set(scores)  # from arr_0
    assert report["settings"]["stored_reference_hash"]
    assert any("how many images" in warning for warning in report["warnings"])
    bare = adm(arr_0=None)
    report = evaluate(
        *(tiny_gpt().double(), bare, [Cell(8, 1)], options(num_samples=20)), tokenizer=tokenizer()
    )
    assert report["results"][0]["scores"]["gfid"] == pytest.approx(scores["gfid"])
    assert "precision" not in report["results"][0]["scores"]
    assert any("image size and crop" in warning for warning in report["warnings"])
    with pytest.raises(ValueError, match="how many images to generate"):
        evaluate(tiny_gpt().double(), bare, [Cell(8, 1)], options(), tokenizer=tokenizer())


def test_a_data_set_is_a_reference_too(tmp_path):
    """So that held-out reconstructions are compared with the training images."""
    others = take(Emoji("train"), 40)
    names = {"reference": "emoji:train"}
    folder = tmp_path / "a"
    report = evaluate(tokenizer(), emoji(20), CELLS, options(reference=others), folder, names)
    assert names_in(folder) == ["report.json"], "no rows are left"
    assert report["settings"]["stored_reference"] == "emoji:train"
    assert report["settings"]["stored_reference_count"] == 40
    network, transform, data = Projection(), ImageTransform(16), emoji(20)
    theirs = network(
        to_8_bit(torch.stack([transform(others[i]["image"]) for i in range(40)]))
    ).pooled
    images = torch.stack([transform(data[i]["image"]) for i in range(20)])
    model, rngs = tokenizer(), row_generators(0, NOISE, range(20))
    decoded = model.decode(model.encode(images), num_steps=2, guidance_scale=1.5, generator=rngs)
    ours, scores = network(to_8_bit(decoded)).pooled, report["results"][1]["plausible"]
    assert scores["kid_to_reference"] == pytest.approx(kernel_distance(ours, theirs)[0])
    fid = frechet_distance(statistics(ours), statistics(theirs))
    assert scores["fid_to_reference"] == pytest.approx(fid)
    assert scores["kid"] != pytest.approx(scores["kid_to_reference"])
    itself = evaluate(tokenizer(), data, [Cell(8, 2)], options(reference=data))["results"][0]
    for score in ("kid", "precision", "recall"):
        assert itself["scores"][f"{score}_to_reference"] == itself["scores"][score]
    assert itself["scores"]["fid_to_reference"] == itself["scores"]["rfid"]


def test_references_that_cannot_serve_are_refused():
    few = take(Emoji("train"), 3)
    with pytest.raises(ValueError, match="3 images are too few"):
        evaluate(tokenizer(), emoji(9), [Cell(1, 1)], options(reference=few))
    with pytest.raises(ValueError, match="needs a feature network"):
        evaluate(tokenizer(), emoji(9), [Cell(1, 1)], options(reference=few, networks=()))
    how = options(reference=few)
    with pytest.raises(ValueError, match="compared with its data: name the reference there"):
        evaluate(tiny_gpt().double(), emoji(9), [Cell(8, 1)], how, tokenizer=tokenizer())


def test_our_own_reference_round_trips_through_an_evaluation(tmp_path):
    path = tmp_path / "own.npz"
    evaluate(
        tokenizer(), emoji(30), [Cell(1, 1)], options(save_reference=str(path)), tmp_path / "a"
    )
    report = evaluate(
        tokenizer(), emoji(30), [Cell(1, 1)], options(reference=str(path)), tmp_path / "b"
    )
    scores = report["results"][0]["scores"]
    assert scores["fid_to_reference"] == pytest.approx(scores["rfid"], rel=1e-9)
    assert report["settings"]["stored_reference_count"] == 30
    with pytest.raises(ValueError, match=r"of inception .* not of other"):
        Reference(path, Projection("other"), 16)
    with pytest.raises(ValueError, match=r"must end in \.npz"):
        save_reference(tmp_path / "own.dat", statistics(torch.randn(9, 2)), Projection(), 16, "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 32}, "of 32 px images, the model's have 16 px"),
        ({"mu": np.full(12, np.nan)}, "not finite"),
        ({"sigma": np.zeros((12, 3))}, r"sigma \(12, 3\) must be"),
        ({"sigma": np.triu(np.ones((12, 12)))}, "not symmetric"),
        ({"arr_0": np.zeros((3, 16, 16), np.uint8)}, "expected uint8"),
        ({"arr_0": None, "mu": None}, "neither mu and sigma nor images"),
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, "5 dimensions"),
    ],
)
def test_a_wrong_reference_is_refused(adm, changes, message):
    path = adm(**changes)
    with pytest.raises(ValueError, match=message):
        evaluate(tokenizer(), emoji(5), [Cell(1, 1)], options(reference=str(path)))


def test_a_reference_of_too_few_pictures_is_flagged(adm):
    path = adm(number=10, statistics_too=False)
    report = evaluate(tokenizer(), emoji(20), [Cell(1, 1)], options(reference=str(path)))
    assert any(f"{path}: 10 images for 12 features" in w for w in report["warnings"])


def test_a_pickled_reference_is_refused(tmp_path):
    path = tmp_path / "hostile.npz"
    np.savez(path, mu=np.array([object()]), sigma=np.eye(1))
    with pytest.raises(ValueError, match="allow_pickle"):
        Reference(path, Projection("inception"), 16)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -2.0])
def test_a_way_to_decode_out_of_range_is_refused_before_the_networks_load(scale, monkeypatch):
    monkeypatch.setattr(job, "load_evaluators", None)
    with pytest.raises(ValueError, match=rf"guidance_scale={scale!r} must be"):
        evaluate(tokenizer(), emoji(), [Cell(8, 1, scale)], options())


@pytest.mark.parametrize("part", ["encoder.registers", "decoder.mask_token"])
def test_a_model_that_is_not_finite_gets_no_score(part, tmp_path):
    broken = tokenizer()
    broken.get_parameter(part).data.view(-1)[0] = torch.nan
    with pytest.raises(NotFinite, match="are not finite"):
        evaluate(broken, emoji(), [Cell(1, 1)], options(), tmp_path)
    assert not list(tmp_path.rglob("report.json"))


# --- two at once, few images, replaced images -----------------------------------------------------


def test_a_second_evaluation_in_a_folder_is_refused(tmp_path, monkeypatch):
    """Both wrote the same rows and reported a score of neither. One within training has a folder
    below the run's, which the run has locked."""
    refused = []

    def second():
        try:
            evaluate(tokenizer(), emoji(5), [Cell(1, 1)], options(seed=1), tmp_path / "a")
        except ValueError as error:
            refused.append(str(error))

    encode = sources.encode_rows

    def meanwhile(*arguments):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        return encode(*arguments)

    expected = evaluate(tokenizer(), emoji(5), [Cell(1, 1)], options())
    monkeypatch.setattr(sources, "encode_rows", meanwhile)
    with only_one(tmp_path):
        report = evaluate(tokenizer(), emoji(5), [Cell(1, 1)], options(), tmp_path / "a")
    assert refused == [
        f"another process is at work in {tmp_path / 'a'}: wait until it ends, or name another "
        "folder"
    ]
    assert_same(report, expected)


def labels_drawn(monkeypatch, number, images, **changes):
    """The labels that a generator of 5 classes is asked for, and the report."""
    asked, generate = [], GPT.generate

    def listening(model, cond, *rest, **how):
        asked.extend(cond.tolist())
        return generate(model, cond, *rest, **how)

    how = options(num_samples=number, **changes)
    with monkeypatch.context() as patch:
        patch.setattr(GPT, "generate", listening)
        report = evaluate(tiny_gpt().double(), images, [Cell(8, 1)], how, tokenizer=tokenizer())
    return asked, report


class Labelled(torch.utils.data.Dataset):
    """Emoji whose labels are given."""

    class_names = tuple("abcde")

    def __init__(self, labels):
        self.emoji, self.labels = Emoji("validation"), labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {**self.emoji[index], "label": self.labels[index]}


def test_fewer_samples_than_classes_are_evenly_spread_and_told(monkeypatch):
    """They were of the first classes alone, and called balanced."""
    asked, report = labels_drawn(monkeypatch, 4, emoji(5))
    assert asked == [0, 1, 2, 4]
    assert report["settings"]["labels"] == {
        "classes": 5, "fewest": 0, "most": 1, "balanced": False
    }  # fmt: skip
    assert "4 images for 5 classes, evenly spread: 1 have none" in report["warnings"]
    asked, report = labels_drawn(monkeypatch, 7, emoji(5))
    assert asked == [0, 1, 2, 3, 4, 0, 1]
    assert report["settings"]["labels"]["balanced"] is True
    assert not any("have none" in warning for warning in report["warnings"])


def test_each_class_comes_as_often():
    assert each_class(7, 3) == [0, 1, 2, 0, 1, 2, 0]
    assert len(set(each_class(2, 4))) == 2


def test_fewer_samples_than_images_take_labels_and_captions_from_all_of_them(monkeypatch):
    sorted_by_class = Labelled([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    asked, report = labels_drawn(monkeypatch, 4, sorted_by_class, labels="data")
    assert asked == [0, 1, 2, 3]
    assert report["settings"]["labels"]["fewest"] == 0  # of the fifth class
    assert not any("have none" in warning for warning in report["warnings"])
    asked, _ = labels_drawn(monkeypatch, 14, sorted_by_class, labels="data")
    assert [asked.count(label) for label in range(4)] == [4, 3, 4, 3]
    encoder = {"name": "bytes", "dim": 16, "depth": 1, "num_heads": 2, "max_length": 64}
    gpt = tiny_gpt(conditioner={"name": "text", "encoder": encoder}).double()
    prompts, generate = [], gpt.generate

    def listening(cond, *rest, **how):
        prompts.extend(cond)
        return generate(cond, *rest, **how)

    gpt.generate = listening
    evaluate(gpt, emoji(12), [Cell(8, 1)], options(num_samples=4), tokenizer=tokenizer())
    assert prompts == [emoji(12)[i]["caption"] for i in sample_evenly(4, 12)]


def test_rows_of_a_replaced_picture_are_measured_again(picture_folder, tmp_path, monkeypatch):
    """Only the first, the middle and the last picture told one data set from another."""
    monkeypatch.setattr(runner, "PART", 2)
    seen, encode = [], sources.encode_rows

    def stopping(*arguments):
        if len(seen) == 2:
            seen.clear()
            raise KeyboardInterrupt
        seen.append(1)
        return encode(*arguments)

    def run(output):
        data = ImageFolder(picture_folder)
        return evaluate(tokenizer(), data, [Cell(1, 1)], options(batch_size=2), output)

    monkeypatch.setattr(sources, "encode_rows", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out")
    monkeypatch.setattr(sources, "encode_rows", encode)
    draw_pictures(picture_folder / "cats", ["1.png"], width=9, height=30)
    assert_same(run(tmp_path / "out"), run(tmp_path / "fresh"))


def test_a_damaged_reference_is_named(adm):
    """A flipped byte ended in a traceback of zipfile."""
    for arrays, statistics_too in ((b"mu.npy", True), (b"arr_0.npy", False)):
        path = adm(statistics_too=statistics_too)
        data = bytearray(path.read_bytes())
        data[data.index(arrays) + 200] ^= 255
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"reference .*reference\.npz is damaged: Bad CRC-32"):
            Reference(path, Projection("inception"), 16)


def test_stored_statistics_are_not_saved_again(adm, tmp_path):
    how = options(num_samples=20, save_reference=str(tmp_path / "again.npz"))
    with pytest.raises(ValueError, match="holds statistics already: leave --save-reference out"):
        evaluate(tiny_gpt().double(), adm(), [Cell(8, 1)], how, tokenizer=tokenizer())


def test_other_items_of_the_same_files_are_another_evaluation(tmp_path, monkeypatch):
    """The first, the middle and the last one told one selection from another."""
    monkeypatch.setattr(runner, "PART", 2)
    chosen = [[0, 1, 4, 5, 9], [0, 2, 4, 6, 9]]
    few = [torch.utils.data.Subset(Emoji("validation"), some) for some in chosen]
    seen, encode = [], sources.encode_rows

    def interrupted(tokenizer, images, *rest):
        seen.append(len(images))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return encode(tokenizer, images, *rest)

    monkeypatch.setattr(sources, "encode_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tokenizer(), few[0], [Cell(1, 1)], options(), tmp_path)
    found = evaluate(tokenizer(), few[1], [Cell(1, 1)], options(), tmp_path)
    assert_same(found, evaluate(tokenizer(), few[1], [Cell(1, 1)], options()))


def test_a_process_that_reads_other_files_says_so(tmp_path, monkeypatch):
    """It waited for ever."""
    monkeypatch.setattr(runner, "PART", 2)
    monkeypatch.setattr(runner.processes, "barrier", lambda: None)
    monkeypatch.setattr(runner.processes, "count", lambda: 2)
    job = runner.make_job(tokenizer(), [Cell(1, 1)], options(), None)
    for rank, number in ((0, 5), (1, 5), (1, 6)):
        monkeypatch.setattr(runner.processes, "rank", lambda rank=rank: rank)
        images = sources.Images(emoji(number), 16)
        other = pytest.raises(ValueError, match="process 1 is to measure something else than the f")
        with other if number == 6 else nullcontext():
            runner.measure(job, "reconstructed", images, sources.reconstructed, tmp_path)


def test_images_without_a_class_are_not_generated_as_one(monkeypatch):
    labels = [0, 1, "a", 2.0, "bee", None]
    with pytest.raises(ValueError, match="2 of 6 images have a label that is none of the classes"):
        labels_drawn(monkeypatch, 6, Labelled(labels), labels="data")
    asked, _ = labels_drawn(monkeypatch, 4, Labelled(labels[:4]), labels="data")
    assert asked == [0, 1, 0, 2]


def test_names_of_a_report_may_be_paths(tmp_path):
    names = {"model": Path("a/model"), "data": tmp_path}
    report = evaluate(tokenizer(), emoji(5), [Cell(1, 1)], options(), names=names)
    assert report["settings"]["model"] == str(names["model"])


def test_a_continuous_tokenizer_in_training_mode_is_measured_by_the_mean():
    """Its codes were drawn from PyTorch's own generator, and differed from call to call."""
    model = TiTok(TiTokConfig(**{**TITOK, "quantizer": {"name": "kl", "dim": 4}})).train()
    images = torch.stack([sources.Images(emoji(4), model.image_size)[i]["image"] for i in range(4)])
    first, second = (sources.encode_rows(model, images, 0, range(4)) for _ in range(2))
    assert torch.equal(first, second)
    assert model.training
    assert torch.equal(first, sources.encode_rows(model.eval(), images, 0, range(4)))
