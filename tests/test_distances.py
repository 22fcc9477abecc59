"""Distances between sets, torch-fidelity's, held against their formulas on features of real
images."""

import numpy as np
import pytest
import torch
from PIL import ImageFilter

from flextok.data.transforms import ImageTransform
from flextok.emoji.datasets import Emoji
from flextok.evaluation.distances import (
    ADM_CHUNK,
    Statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    mixed,
    precision_recall,
    statistics,
    thinned,
)
from flextok.evaluation.evaluators import CodeUse, Rows, entropy
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


def by_eigenvectors(a, b):
    """The Frechet distance with the trace's root from symmetric matrices, which is another way than
    torch-fidelity's."""
    mu_a, mu_b, cov_a, cov_b = a.mean(0), b.mean(0), a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_b)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ cov_a @ root).clamp_min(0).sqrt().sum()
    return float((mu_a - mu_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * overlap)


def test_frechet_distance_with_singular_covariances(features):
    """40 and 30 images for 1,280 features."""
    ours = frechet_distance(*map(statistics, features))
    assert ours == pytest.approx(by_eigenvectors(*features), rel=1e-5)
    assert ours > 1


@pytest.mark.parametrize("size", [20, 30, 1000])
def test_kernel_distance_is_the_unbiased_mmd(features, size):
    """Of 10 images more or less a side, by hand; of sets smaller than a subset, taken whole."""
    real, generated = features
    mean, std = kernel_distance(generated, real, subsets=10, subset_size=size)
    rng = np.random.RandomState(2020)
    size, found = min(size, 30), []
    for _ in range(10):
        x = generated[rng.choice(len(generated), size, replace=False)]
        y = real[rng.choice(len(real), size, replace=False)]
        xx, yy, xy = ((p @ q.T / 1280 + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        found.append(float(within - 2 * xy.mean()))
    assert mean == pytest.approx(np.mean(found))
    assert std == pytest.approx(np.std(found))
    alone, no_spread = kernel_distance(generated, real[:30])
    assert no_spread == 0
    assert alone != 0


def test_precision_and_recall_count_the_covered(features):
    real, generated = features
    precision, recall = precision_recall(generated, real)
    assert 0 < precision < 1

    def covered(points, centres):
        radius = torch.cdist(centres, centres).sort(dim=1).values[:, 3]
        return float((torch.cdist(points, centres) <= radius).any(dim=1).double().mean())

    assert precision == pytest.approx(covered(generated, real))
    assert recall == pytest.approx(covered(real, generated))
    assert precision_recall(generated + 1000, real) == (0, 0)
    assert precision_recall(real, real) == (1, 1)
    with pytest.raises(ValueError, match="more than 3 images"):
        precision_recall(real[:3], real)


def test_inception_score_in_both_conventions(real_and_generated):
    logits = real_and_generated[0].logits.double()

    def score(part):
        p = part.softmax(dim=1)
        return float((p * (p / p.mean(dim=0)).log()).sum(dim=1).mean().exp())

    order = np.random.RandomState(2020).permutation(40)
    parts = [score(logits[order[i : i + 4]]) for i in range(0, 40, 4)]
    assert inception_score(logits, shuffle=True) == pytest.approx((np.mean(parts), np.std(parts)))
    assert inception_score(logits[:3], shuffle=True)[0] == pytest.approx(1)  # one image a part
    many = logits.repeat(200, 1)[:7000]  # ADM's: as they come, a chunk of 5,000 and a rest
    parts = [score(many[:5000]), score(many[5000:])]
    assert inception_score(many, shuffle=False) == pytest.approx((np.mean(parts), np.std(parts)))


def test_frechet_distance_of_gaussians_is_the_formula():
    mean = np.array([3.0, 4.0])
    one = Statistics(mean, np.diag([1.0, 9.0]), None)
    four = Statistics(mean * 0, np.diag([4.0, 1.0]), None)
    assert frechet_distance(one, four) == pytest.approx(25 + 1 + 4)  # (1-2)^2 + (3-1)^2
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="2 and of 3 dimensions"):
        frechet_distance(one, statistics(torch.randn(9, 3)))


def test_statistics_refuse_nan_and_a_single_image(features):
    broken = features[0].clone()
    broken[3, 5] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        statistics(broken)
    with pytest.raises(ValueError, match="at least 2"):
        statistics(features[0][:1])


def test_large_sets_are_thinned_evenly_for_precision():
    """Every fifth row of images that go through the classes over and over are a fifth of these."""
    found = thinned(torch.arange(10.0)[:, None], 5).flatten()
    assert (found // 2).tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(found, thinned(torch.arange(10.0)[:, None], 5).flatten())
    assert thinned(torch.arange(3), 5).tolist() == [0, 1, 2]
    for rows, classes, size in ((50_000, 100, 10_000), (20_000, 10, 10_000), (5_000, 5, 1_000)):
        for labels in (torch.arange(rows) % classes, torch.arange(rows) * classes // rows):
            counts = thinned(labels, size).bincount(minlength=classes)
            assert counts.sum() == size
            assert counts.min() > 0.6 * size / classes
            assert counts.max() < 1.4 * size / classes


def test_the_class_score_of_chunks_is_of_images_in_no_order():
    """A chunk of a folder that is sorted by class has few of the classes."""
    logits = 20 * torch.eye(10)[torch.arange(2 * ADM_CHUNK) * 10 // (2 * ADM_CHUNK)].double()
    assert inception_score(logits, shuffle=False)[0] == pytest.approx(5, rel=0.01)
    assert inception_score(mixed(logits), shuffle=False)[0] == pytest.approx(10, rel=0.01)
    assert torch.equal(mixed(logits).sum(0), logits.sum(0))


def test_the_network_sees_what_is_on_the_photographs(network):
    """Proves that the packaged weights sit in timm's network in the right places."""
    data = pytest.importorskip("skimage.data")
    from PIL import Image

    expected = {"chelsea": {281, 282, 285}, "coffee": {504, 967, 968}, "rocket": {657, 812}}
    for name, classes in expected.items():
        image = ImageTransform(224)(Image.fromarray(getattr(data, name)()))
        assert network(to_8_bit(image[None])).logits.argmax().item() in classes, name


def test_at_their_own_size_small_images_keep_what_distinguishes_them(network):
    """Enlarged to 224 px, sharp and blurred emoji are both blurred to the network."""
    native = EfficientNetLite0("cpu", torch.float32, native=True)
    assert native.name != network.name
    assert native.weights == network.weights
    emoji, transform = Emoji("validation"), ImageTransform(64)
    pictures = [emoji[i]["image"] for i in range(32)]
    blur = ImageFilter.GaussianBlur(2)
    sharp, blurred = (
        to_8_bit(torch.stack([transform(p) for p in some]))
        for some in (pictures, [p.filter(blur) for p in pictures])
    )
    apart = {
        one.name: kernel_distance(one(blurred[:16]).pooled, one(sharp[16:]).pooled)[0]
        for one in (network, native)
    }
    assert apart[native.name] > 5 * apart[network.name] > 0
    image = to_8_bit(ImageTransform(224)(pictures[0])[None])
    torch.testing.assert_close(native(image).pooled, network(image).pooled)


def test_entropy_and_usage_of_known_codes():
    uniform = torch.arange(16).view(16, 1) % 8
    constant = torch.full((16, 1), 3)
    indices = torch.cat([uniform, constant], dim=1)
    evaluator = CodeUse(16)
    rows = evaluator.measure(indices)
    report = evaluator.scores(Rows(rows.__getitem__, None, paired=False))
    assert report["entropy_bits_per_position"] == pytest.approx([3, 0])
    assert report["usage_per_position"] == [0.5, 1 / 16]
    assert report["usage"] == 0.5
    assert report["largest_entropy_bits_measurable"] == 4
    assert entropy(torch.tensor([1, 1, 2])).item() == pytest.approx(1.5)


@pytest.mark.parametrize("more", [1, 100, ADM_CHUNK - 1])
def test_an_incomplete_chunk_does_not_change_the_class_score(more):
    """The mean with a chunk of one image, whose score is 1, was half of it."""
    draws = torch.Generator().manual_seed(0)
    logits = 8 * torch.randn(ADM_CHUNK + more, 10, generator=draws, dtype=torch.float64)
    whole = inception_score(logits[:ADM_CHUNK], shuffle=False)
    assert inception_score(logits, shuffle=False) == pytest.approx(whole)
    assert inception_score(logits[:more], shuffle=False)[1] == 0
