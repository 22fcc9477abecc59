"""The probe reads scenes, and the alignment score tells a generator that obeys from one that does
not, more tokens from fewer, and chance from both."""

from types import SimpleNamespace

import pytest
import torch
from helpers.models import tiny_gpt, tiny_tokenizer

from flextok.cli import measure
from flextok.emoji.alignment import (
    alignment,
    caption_facts,
    derangement,
    format_report,
    scene_verifier,
)
from flextok.emoji.probe import (
    GRIDS,
    Probe,
    degrade,
    fact_sizes,
    read_scenes,
    scene_facts,
    train_probe,
)
from flextok.emoji.scenes import EmojiScenes
from flextok.registry import make_dataset

OPTIONS = {"max_objects": 2, "vocabulary": "basic"}
SIZE, NUMBER = 32, 64


@pytest.fixture(scope="module")
def probe():
    return train_probe(EmojiScenes(prompts="train", **OPTIONS), SIZE, steps=180, num_scenes=1500)


@pytest.fixture(scope="module")
def held_out():
    return EmojiScenes(prompts="held_out", **OPTIONS)


class Oracle:
    """Generator and tokenizer in one, with perfect or shuffled obedience: an index is the number
    of a real scene; at fewer than 4 tokens it shows their mean colour."""

    model_type, image_size, num_tokens, vocab_size = "oracle", SIZE, 4, NUMBER
    device = torch.device("cpu")

    def __init__(self, scenes, conditioner, obeys=True):
        self.images, facts, captions = read_scenes(scenes, SIZE, NUMBER)
        self.numbers = {caption: i for i, caption in enumerate(captions)}
        self.by_label = {int(f[0]): i for i, f in enumerate(facts)}
        self.conditioner, self.obeys = conditioner, obeys
        self.metadata = {"class_names": scenes.class_names}

    def parameters(self):
        yield torch.zeros(1)

    def decode_options(self, asked, options=None):
        assert not asked
        return options

    generate_options = decode_options

    def generate(self, cond, num_tokens, **options):
        table = self.by_label if isinstance(cond, torch.Tensor) else self.numbers
        rows = cond.tolist() if isinstance(cond, torch.Tensor) else cond
        found = torch.tensor([table[row] for row in rows])
        if not self.obeys:
            found = found.roll(7)
        return found[:, None].expand(-1, num_tokens)

    def encode(self, images, *, generator=None):
        same = (images[:, None] - self.images).abs().flatten(2).sum(2)
        return same.argmin(1)[:, None].expand(-1, 4)

    def decode(self, indices, **options):
        images = self.images[indices[:, 0]]
        if indices.shape[1] < 4:
            images = images.mean(dim=(2, 3), keepdim=True).expand_as(images)
        return images


def text_conditioner():
    encoder = {"name": "bytes", "dim": 16, "depth": 1, "num_heads": 2}
    return tiny_gpt(conditioner={"name": "text", "encoder": encoder}).conditioner


def test_facts_are_those_of_the_scene(held_out):
    colors = list(fact_sizes(held_out))
    assert colors == ["count", "arrangement", "background", "second color", "object 1", "object 2"]
    for i in range(40):
        scene = held_out[i]
        count, grid, first, second, *kinds = scene_facts(scene, 2).tolist()
        assert count == len(scene["objects"]) - 1
        assert GRIDS[grid] == {"left of": (2, 1), "above": (1, 2)}.get(
            next((w for w in ("left of", "above") if w in scene["caption"]), ""), (1, 1)
        )
        assert (first == second) == scene["background"].endswith(" background")
        names = [held_out.kinds[k] for k in kinds if k >= 0]
        assert names == [thing["name"] for thing in scene["objects"]]


@pytest.mark.parametrize("options", [OPTIONS, {}, {"split": "validation", "max_objects": 4}])
def test_a_caption_states_its_scene(options):
    scenes = EmojiScenes(**options)
    for i in range(60):
        scene = scenes[i]
        facts = scene_facts(scene, scenes.max_objects)
        assert torch.equal(caption_facts(scene["caption"], scenes), facts), scene["caption"]


def test_a_prompt_states_what_it_mentions(held_out):
    key, heart = held_out.kinds.index("key"), held_out.kinds.index("red heart")
    for prompt in ("a red heart above a key", "one sees a red heart above a key."):
        facts = caption_facts(prompt, held_out).tolist()
        assert facts == [1, GRIDS.index((1, 2)), -1, -1, heart, key]
    with pytest.raises(ValueError, match="'a monkey' names 0"):
        caption_facts("a monkey", held_out)
    with pytest.raises(ValueError, match="names 3"):
        caption_facts("a key, a key and a key", held_out)
    with pytest.raises(ValueError, match="unknown background 'mauve'"):
        caption_facts("a key on a mauve background", held_out)


def test_the_verifier_prefers_the_image_of_the_caption(probe, held_out):
    images, _, captions = read_scenes(held_out, SIZE, NUMBER)
    score = scene_verifier(probe, held_out)
    own = score(images, captions, images)
    other = score(images, [captions[i] for i in derangement(NUMBER, 0)], images)
    assert (own > other).float().mean() > 0.9
    assert (own <= 0).all()


def test_the_probe_reads_scenes_that_it_has_not_seen(probe, held_out):
    images, facts, _ = read_scenes(held_out, SIZE, NUMBER)
    found = probe.read(images)
    right = (found == facts).float().mean(0)
    assert right[0] > 0.9  # how many
    assert right[1] > 0.8  # left of or above
    assert right[2] > 0.6  # one of 21 colours
    assert right[4] > 0.3  # one of 24 things
    with torch.random.fork_rng():
        noise = probe.read(torch.randn(NUMBER, 3, SIZE, SIZE).clamp(-1, 1))
    assert (noise == facts)[:, 4].float().mean() < 0.2


def test_the_score_tells_obedience_from_chance_and_more_tokens_from_fewer(probe, held_out):
    def measure(obeys):
        model = Oracle(held_out, text_conditioner(), obeys)
        return alignment(model, model, probe, held_out, [1, 4], NUMBER)

    report, control = measure(True), measure(False)
    coarse, fine = report.results
    # its pictures are the real ones; some captions occur twice
    assert fine.score == pytest.approx(report.real, abs=0.03)
    assert fine.reconstructed == pytest.approx(report.real)
    assert fine.score > fine.shuffled + 0.3
    assert fine.score > coarse.score + 0.1
    assert control.results[1].score == pytest.approx(fine.shuffled, abs=0.1)
    assert set(fine.by_count) == {1, 2}
    count = list(fine.by_count.values())
    assert min(count) <= fine.score <= max(count)
    assert 0 < fine.error < 0.05
    assert fine.by_fact["background"] > fine.shuffled_by_fact["background"] + 0.3
    table = format_report(report)
    assert f"{fine.score:.3f} ±{fine.error:.3f} ({fine.shuffled:.3f})" in table
    assert "1 object" in table


def test_a_class_generator_is_held_to_the_count_alone(probe, held_out):
    conditioner = tiny_gpt(conditioner={"name": "class", "num_classes": 2}).conditioner
    model = Oracle(held_out, conditioner)
    report = alignment(model, model, probe, held_out, [4], NUMBER)
    assert list(report.results[0].by_fact) == ["count"]
    assert report.results[0].score > 0.9
    assert report.results[0].shuffled < 0.75  # one of two
    model.metadata["class_names"] = ["cats", "dogs"]
    with pytest.raises(ValueError, match="are not the numbers of objects"):
        alignment(model, model, probe, held_out, [4], NUMBER)
    model.conditioner = tiny_gpt(conditioner={"name": "none"}).conditioner
    with pytest.raises(ValueError, match="unconditional"):
        alignment(model, model, probe, held_out, [4], NUMBER)


def test_a_probe_of_other_scenes_is_refused(probe, held_out):
    model = Oracle(held_out, text_conditioner())
    with pytest.raises(ValueError, match="trained for other scenes"):
        alignment(model, model, probe, EmojiScenes(max_objects=2), [1], 4)


def test_a_saved_probe_reads_the_same(probe, held_out, tmp_path):
    path = tmp_path / "deep" / "probe.safetensors"
    probe.save(path)
    images = read_scenes(held_out, SIZE, 8)[0]
    assert torch.equal(Probe.load(path).read(images), probe.read(images))
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds no probe"):
        Probe.load(path)


def test_training_a_probe_repeats_and_leaves_the_global_draws_alone(held_out):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, two = (train_probe(held_out, SIZE, steps=2, num_scenes=8) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_degrading_keeps_a_flat_picture_flat_but_for_noise():
    images = torch.full((64, 3, 16, 16), 0.5)
    out = degrade(images, torch.Generator().manual_seed(0))
    assert abs(out.mean() - 0.5) < 0.01
    levels = out.std(dim=(1, 2, 3))
    assert levels.min() < 0.05 < 0.15 < levels.max() < 0.25


@pytest.mark.parametrize("number", [2, 5, 64])
def test_nobody_gets_his_own_prompt_as_control(number):
    for seed in range(5):
        others = derangement(number, seed)
        assert sorted(others.tolist()) == list(range(number))
        assert not (others == torch.arange(number)).any()


@pytest.mark.parametrize("prompts", ["all", "train", "held_out"])
def test_the_classifier_learns_from_other_scenes_than_it_reads(monkeypatch, prompts):
    monkeypatch.setattr(measure.scene_probe, "train_probe", lambda data, *rest, **how: data)
    spec = {"name": "emoji_scenes", **OPTIONS, "prompts": prompts, "length": 5}
    scenes, options = make_dataset(spec), SimpleNamespace(probe=None, probe_steps=None)
    learned = measure.probe_for(scenes, spec, tiny_tokenizer(), options)
    keys = [{data[i]["key"] for i in range(5)} for data in (scenes, learned)]
    assert len(keys[0] | keys[1]) == 10
