"""The length head: how many tokens an image needs, predicted without decoding."""

import json

import pytest
import torch
from helpers.files import CATS_AND_DOGS, draw_pictures
from helpers.models import DRAWER, TITOK, tiny_tokenizer
from safetensors.torch import load_file
from torch.utils.data import Subset

from flextok.cli import main
from flextok.data.sets import take
from flextok.draws import NOISE, row_generators
from flextok.emoji.datasets import Emoji
from flextok.evaluation import Options
from flextok.evaluation.adaptive import fit, fit_length_head, relate, spearman
from flextok.objectives import (
    DistillationObjective,
    DrawingObjective,
    FlowObjective,
    make_objective,
)
from flextok.registry import build_model, like_start
from flextok.schema import ConfigError, from_mapping
from flextok.tokenizers import TOKENIZERS, FlexTok, TiTok, TiTokConfig
from flextok.tokenizers.length import LengthHead, LengthHeadConfig, Target

LENGTHS = [1, 2, 4, 8]
HEAD = {"metric": "psnr", "lengths": LENGTHS, "dim": 16}
ONE = {"num_steps": 1, "guidance_scale": 1.0}


def pictures(number=16, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(number, 3, 16, 16, generator=rng) * 2 - 1


def with_head(**changes) -> FlexTok:
    """A FlexTok with a head that predicts PSNRs of some 10 dB, as if it had been fitted."""
    model = tiny_tokenizer(length_head=HEAD, decode=ONE, **changes)
    model.length_head.scale.fill_(4.0)
    torch.nn.init.normal_(model.length_head.first.weight)
    model.length_head.last.bias.data[0] = 2.5
    return model


def fitted(metric="psnr", number=400):
    """A head, summaries and scores: the longer an image, the later its score is good."""
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    head = LengthHead(LengthHeadConfig(metric, LENGTHS, 32), 3, 8)
    read = torch.randn(number, 6, generator=rng) * torch.tensor([1, 1, 1, 1e-2, 1e-2, 10.0]) + 5
    need = 4 + 2 * (read[:, :1] - 5)
    scores = 20 + 5 * (torch.tensor(LENGTHS).log2() - need)  # psnr
    if metric == "lpips":
        scores = (60 - scores) / 100
    fit(head, read, scores, seed=0)
    return head.eval(), read, scores


@pytest.mark.parametrize("scale", [3.0, -0.1])
def test_the_predicted_curve_is_monotone_whatever_the_weights(scale):
    head = with_head().length_head
    head.scale.fill_(scale)
    curves = head(torch.randn(200, 64) * 30)
    rises = curves.diff(dim=1) * scale
    assert (rises >= 0).all()
    assert (rises > 0).any()


@pytest.mark.parametrize(("metric", "targets"), [("psnr", [10, 20, 25]), ("lpips", [0.5, 0.4])])
def test_a_fitted_head_predicts_the_length_for_any_target(metric, targets):
    head, read, scores = fitted(metric)
    with torch.no_grad():
        error = (head(read) - scores).square().mean() / scores.var()
        assert error < 0.05
        for value in targets:
            target = Target(metric, value)
            needed, guessed = ((~target.met(x)).sum(dim=1) for x in (scores, head(read)))
            assert spearman(guessed, needed) > 0.85, value


def test_encode_with_a_target_is_encode_with_lengths():
    model, images = with_head(), pictures()
    indices = model.encode(images)
    before = torch.zeros(16, dtype=torch.long)
    keeps = []
    for value in (-100, 8, 11, 12, 13, 14, 1000):
        found = model.encode(images, target=f"psnr={value}")
        assert torch.equal(found.indices, indices)
        assert set(found.keep.tolist()) <= set(LENGTHS)
        assert (found.keep >= before).all(), "a higher target needs no fewer tokens"
        assert torch.equal(found.met, found.value >= value)
        assert (found.keep[~found.met] == 8).all()
        assert found.decodes == 0
        before = found.keep
        keeps.append(found.keep.double().mean())
    assert keeps[0] == 1
    assert keeps[-1] == 8
    assert len(set(keeps)) > 3
    assert found.reason[0].startswith("not met: psnr ")
    assert model.decode(found.indices, keep=found.keep).shape == images.shape


def test_it_is_saved_with_the_tokenizer_and_changes_nothing_else(tmp_path):
    plain, model, images = tiny_tokenizer(decode=ONE), with_head(), pictures()
    again = FlexTok.from_pretrained(model.save_pretrained(tmp_path))
    assert again.config == model.config
    found, same = (m.encode(images, target="psnr=12") for m in (model, again))
    assert torch.equal(found.keep, same.keep)
    assert torch.equal(found.value, same.value)
    assert again.codes_id == plain.codes_id
    assert torch.equal(again.encode(images), plain.encode(images))


def test_fitting_measures_prefixes_and_repeats():
    data, options = take(Emoji("train"), 24), Options(batch_size=8, seed=3)
    models = [tiny_tokenizer(decode=ONE) for _ in range(2)]
    for model in models:
        fit_length_head(model, data, "psnr", options)
    first, second = (m.state_dict() for m in models)
    assert all(torch.equal(first[name], second[name]) for name in second)
    model = models[0]
    assert model.config.length_head.lengths == LENGTHS
    report = relate(model, data, Target("psnr", 9.0), options)
    assert 0 <= report["predicted"]["met"] <= 24
    assert report["predicted"]["seconds_per_picture"]["prediction"] > 0
    assert relate(model, data, Target("ssim", 0.1), options)["predicted"] is None
    images = torch.stack([model.transform(data[i]["image"]) for i in range(24)])
    found = model.encode(images, target="psnr=1000")  # of all tokens
    decoded = model.decode(found.indices, generator=row_generators(3, NOISE, range(24)))
    measured = -10 * ((decoded - images) / 2).square().mean(dim=(1, 2, 3)).log10()
    assert torch.corrcoef(torch.stack([found.value, measured.double()]))[0, 1] > 0.6


def test_a_head_that_is_tested_on_what_it_learned_says_so(caplog):
    def predict(first, last):
        caplog.clear()
        relate(model, Subset(emoji, range(first, last)), Target("psnr", 9.0), options, training)
        return caplog.text

    emoji, options, model = Emoji("train"), Options(batch_size=8), tiny_tokenizer(decode=ONE)
    training = fit_length_head(model, Subset(emoji, range(12)), "psnr", options)
    assert "4 of the 10 test images are training images, too" in predict(8, 18)
    assert "training images" not in predict(12, 18)


def test_the_command_fits_saves_and_compares(tmp_path, capsys, caplog):
    tiny_tokenizer(decode=ONE).save_pretrained(tmp_path / "model")
    draw_pictures(tmp_path / "photos", CATS_AND_DOGS)
    photos, out = str(tmp_path / "photos"), tmp_path / "out"
    arguments = ["adaptive", str(tmp_path / "model"), "--target", "ssim=0.1", "--data", photos]
    assert main([*arguments, "--train", photos, "--output", str(out)]) == 0
    assert "predicted lengths: Spearman with these" in capsys.readouterr().out
    assert "test images are training images, too: predicted lengths agree too well" in caplog.text
    model = FlexTok.from_pretrained(out / "tokenizer", dtype="auto")
    assert model.dtype == torch.float32
    assert model.encode(pictures(), target="ssim=0.1").keep.max() <= 8
    predicted = json.loads((out / "report.json").read_text())["predicted"]
    arguments[1] = str(out / "tokenizer")  # which needs no --train now
    assert main([*arguments, "--output", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "report.json").read_text())["predicted"]
    assert again["mean_tokens"] == predicted["mean_tokens"]
    TiTok(from_mapping(TiTokConfig, TITOK)).save_pretrained(tmp_path / "titok")
    arguments[1] = str(tmp_path / "titok")
    assert main([*arguments, "--train", photos]) == 1
    assert "is a titok, not a FlexTok" in capsys.readouterr().err


def test_a_published_file_has_no_head(tmp_path):
    vae = {"name": "kl", "channels": 4, "block_channels": [32]}
    sizes = {"vae": {**vae, "layers_per_block": 1}, "quantizer": {"name": "fsq", "levels": [8, 5]}}
    torch.manual_seed(0)
    with_head(**sizes).save_published(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert written
    assert not [name for name in written if "length" in name]
    assert FlexTok.from_pretrained(tmp_path / "model.safetensors").length_head is None


def test_training_leaves_the_head_out():
    """Its predictions are about the images of the decoder before."""
    head = with_head()
    begun = [
        FlowObjective(with_head(), weights=head),
        DistillationObjective(with_head(), teacher=head),
        DrawingObjective(with_head(drawer=DRAWER), weights=head),
    ]
    for objective in begun:
        assert objective.model.length_head is None
        assert objective.model.config.length_head is None
        assert torch.equal(objective.model.encode(pictures()), head.encode(pictures()))


def test_what_it_does_not_predict_is_refused():
    with pytest.raises(ValueError, match=r"target psnr=12 needs a length head.*--train"):
        tiny_tokenizer().encode(pictures(), target="psnr=12")
    with pytest.raises(ValueError, match=r"lpips=0.3: this tokenizer's length head predicts psnr"):
        with_head().encode(pictures(), target="lpips=0.3")
    with pytest.raises(ValueError, match="must look like psnr=20"):
        with_head().encode(pictures(), target="good")
    with pytest.raises(ValueError, match="not fitted yet"):
        tiny_tokenizer(length_head=HEAD).encode(pictures(), target="psnr=12")
    for lengths in ([], [1, 2, 4], [2, 1, 8], [1, 8, 8]):
        with pytest.raises(ConfigError, match=r"length_head\.lengths=.* must ascend to all 8"):
            tiny_tokenizer(length_head={**HEAD, "lengths": lengths})
    with pytest.raises(ConfigError, match=r"unknown length_head\.metric 'pnsr'"):
        tiny_tokenizer(length_head={**HEAD, "metric": "pnsr"})


def test_a_start_with_a_head_may_have_another_number_of_registers():
    spec = like_start({"name": "flextok", "num_registers": 16}, {"weights": with_head()})
    model = build_model(TOKENIZERS, spec)
    assert model.num_tokens == 16
    make_objective(model, {"name": "flow"}, {"weights": with_head()})
