"""Distances between sets, held against torch-fidelity on features of real pictures."""

import numpy as np
import pytest
import torch
from PIL import ImageFilter

from flextok.data.emoji import Emoji
from flextok.data.transforms import ImageTransform
from flextok.evaluation import distances
from flextok.evaluation.codes import code_report, entropy
from flextok.evaluation.distances import (
    chunks_in_order,
    class_score,
    covered,
    frechet_distance,
    kernel_distance,
    precision_recall,
    shuffled_splits,
    statistics,
)
from flextok.evaluation.features import EfficientNetLite0, Features
from flextok.evaluation.metrics import to_8_bit


@pytest.fixture(scope="module")
def network():
    return EfficientNetLite0("cpu", torch.float32)


@pytest.fixture(scope="module")
def real_and_generated(network):
    """Features and logits of emoji and photographs, and of other, blurred ones: 40 and 30."""
    data = pytest.importorskip("skimage.data")
    from PIL import Image

    crops = []
    for photograph in (data.astronaut(), data.chelsea(), data.coffee(), data.rocket()):
        picture = Image.fromarray(photograph)
        crops += [picture.crop((x, y, x + 128, y + 128)) for x in (0, 150) for y in (0, 100)]
    emoji = Emoji("validation")
    pictures = [emoji[i]["image"] for i in range(54)] + crops
    transform = ImageTransform(64)
    sharp = [transform(p) for p in pictures[::2] + pictures[1:11:2]]
    blurred = [transform(p.filter(ImageFilter.GaussianBlur(1.5))) for p in pictures[11::2]]
    seen = []
    for side in (sharp, blurred):
        pieces = [network(to_8_bit(batch)) for batch in torch.stack(side).split(8)]
        seen.append(Features(*map(torch.cat, zip(*pieces, strict=True))))
    return seen


@pytest.fixture(scope="module")
def features(real_and_generated):
    return [side.pooled.double() for side in real_and_generated]


def test_frechet_distance_is_torch_fidelitys(features):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, features), verbose=False)
    ours = frechet_distance(*map(statistics, features))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours > 1


@pytest.mark.parametrize("size", [20, 30])
def test_kernel_distance_is_torch_fidelitys(features, size):
    from torch_fidelity.metric_kid import kid_features_to_metric

    real, generated = features
    theirs = kid_features_to_metric(
        generated, real, kid_subsets=10, kid_subset_size=size, verbose=False
    )
    mean, std = kernel_distance(generated, real, subsets=10, subset_size=size)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-4)


def test_precision_and_recall_are_torch_fidelitys(features, monkeypatch):
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, generated = features
    theirs = prc_features_to_metric(generated, real, verbose=False)
    for block in (1024, 7):  # whole, and in pieces
        monkeypatch.setattr(distances, "BLOCK", block)
        precision, recall = precision_recall(generated, real)
        assert precision == pytest.approx(theirs["precision"], rel=1e-4)
        assert recall == pytest.approx(theirs["recall"], rel=1e-4)
    assert 0 < precision < 1


def test_inception_score_is_torch_fidelitys(real_and_generated):
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = real_and_generated[0].logits
    theirs = isc_features_to_metric(logits)
    mean, std = class_score(logits, shuffled_splits(len(logits)))
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert std == pytest.approx(theirs["inception_score_std"], rel=1e-4)
    # ADM's: as they come, in whole chunks and a rest
    theirs = isc_features_to_metric(logits, splits=2, shuffle=False)  # 40 pictures in two
    mean, _ = class_score(logits, chunks_in_order(len(logits), size=20))
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-4)


def test_frechet_distance_of_gaussians_is_the_formula():
    mean = torch.tensor([3.0, 4.0], dtype=torch.float64)
    one, four = (distances.Statistics(m, c, None) for m, c in (
        (mean, torch.diag(torch.tensor([1.0, 9.0], dtype=torch.float64))),
        (mean * 0, torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))),
    ))  # fmt: skip
    assert frechet_distance(one, four) == pytest.approx(25 + 1 + 4)  # (1-2)^2 + (3-1)^2
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="2 and of 3 dimensions"):
        frechet_distance(one, statistics(torch.randn(9, 3)))


def test_statistics_do_not_depend_on_blocks_and_refuse_nan(features, monkeypatch):
    whole = statistics(features[0])
    monkeypatch.setattr(distances, "BLOCK", 13)
    pieces = statistics(features[0])
    torch.testing.assert_close(pieces.covariance, whole.covariance, rtol=1e-12, atol=1e-14)
    broken = features[0].clone()
    broken[3, 5] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        statistics(broken)
    with pytest.raises(ValueError, match="at least 2"):
        statistics(features[0][:1])


def test_large_sets_are_thinned_evenly_for_precision(features):
    rows = distances.Thinned(torch.arange(10.0)[:, None], 5)
    assert rows[0:5].flatten().tolist() == [0, 2, 4, 6, 8]
    far = features[1] + 1000
    assert covered(far, features[0], 3) == 0
    assert covered(features[0], features[0], 3) == 1


def test_the_network_sees_what_is_on_the_photographs(network):
    """Proves that the packaged weights sit in timm's network in the right places."""
    data = pytest.importorskip("skimage.data")
    from PIL import Image

    expected = {"chelsea": {281, 282, 285}, "coffee": {504, 967, 968}, "rocket": {657, 812}}
    for name, classes in expected.items():
        image = ImageTransform(224)(Image.fromarray(getattr(data, name)()))
        assert network(to_8_bit(image[None])).logits.argmax().item() in classes, name


def test_entropy_and_usage_of_known_codes():
    uniform = torch.arange(16).view(16, 1) % 8
    constant = torch.full((16, 1), 3)
    report = code_report(torch.cat([uniform, constant], dim=1), 2, 16)
    assert report["entropy_bits_per_position"] == pytest.approx([3, 0])
    assert report["usage_per_position"] == [0.5, 1 / 16]
    assert report["usage"] == 0.5
    assert report["largest_entropy_bits_measurable"] == 4
    assert entropy(torch.tensor([1, 1, 2])).item() == pytest.approx(1.5)


def test_shuffled_splits_cover_every_picture_once():
    split = shuffled_splits(103)
    sizes = np.bincount(split)
    assert len(sizes) == 10
    assert sizes.sum() == 103
    assert sizes.max() - sizes.min() <= 1
