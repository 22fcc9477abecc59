"""Search over prefixes: what it finds, what it costs, what it refuses before the work."""

import json

import pytest
import torch
from helpers.models import tiny_gpt, tiny_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
)

from flextok import search
from flextok.generators import MaskGIT, MaskGITConfig
from flextok.pipeline import decode_prefixes
from flextok.tree_search import classifier, image_text, likelihood

FEW = {"num_steps": 1, "guidance_scale": 1.0}
PROMPTS = ["a red heart", "a bomb", "a star"]
TEXT = {
    "name": "text",
    "encoder": {"name": "bytes", "dim": 16, "depth": 1, "num_heads": 2, "max_length": 24},
}


@pytest.fixture(scope="module")
def tokenizer():
    """In float64, so that another batch size rounds no draw across a boundary."""
    return tiny_tokenizer().double()


@pytest.fixture(scope="module")
def gpt():
    return tiny_gpt(conditioner=TEXT).double()


def brightness(images, cond, indices):
    return images.double().mean(dim=(1, 2, 3))


def look(gpt, tokenizer, cond=PROMPTS, verifier=brightness, **options):
    return search(gpt, tokenizer, cond, verifier, decoding=FEW, **options)


def test_a_larger_best_of_n_never_scores_less(gpt, tokenizer):
    found = [look(gpt, tokenizer, lengths=[8], budget=n, beams=1) for n in (1, 2, 8)]
    assert [one.decodes for one in found] == [1, 2, 8]
    scores = torch.stack([one.scores for one in found])
    assert (scores.diff(dim=0) >= 0).all()
    assert (scores[2] > scores[0]).any()
    # the first candidates of 8 are those of 2
    assert torch.equal(found[2].tree[0].indices[:, :2], found[1].tree[0].indices)


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_the_tree_is_a_beam_search(gpt, tokenizer, lookahead):
    """Children continue the best candidates of the level above, and the result is the best of those
    with all tokens."""
    lengths, beams = [1, 3, 8], 2
    found = look(gpt, tokenizer, lengths=lengths, budget=14, beams=beams, lookahead=lookahead)
    assert [level.num_tokens for level in found.tree] == lengths
    assert [level.scores.shape[1] for level in found.tree] == [4, 5, 5]
    assert found.decodes == 14
    assert (found.tree[0].parents == -1).all()
    for i, level in enumerate(found.tree):
        assert level.indices.shape[2] == lengths[min(i + lookahead, 2)]
        if i == 0:
            continue
        above = found.tree[i - 1]
        for row in range(3):
            best = above.scores[row].topk(beams).indices.tolist()
            assert set(level.parents[row].tolist()) == set(best)
            for candidate, parent in enumerate(level.parents[row].tolist()):
                mine = level.indices[row, candidate, : above.num_tokens]
                assert torch.equal(mine, above.indices[row, parent, : above.num_tokens])
    complete = [level for level in found.tree if level.indices.shape[2] == 8]
    assert len(complete) == lookahead + 1
    most = torch.stack([level.scores.max(dim=1).values for level in complete]).max(dim=0).values
    assert torch.equal(found.scores, most)
    for row, path in enumerate(found.paths):
        end = found.tree[len(path) - 1]
        assert torch.equal(end.indices[row, path[-1]], found.indices[row])
        for i in range(1, len(path)):
            assert found.tree[i].parents[row, path[i]] == path[i - 1]


def test_the_images_are_those_of_the_indices(gpt, tokenizer):
    found = look(gpt, tokenizer, lengths=[2, 8], budget=4, beams=1, seed=3)
    again = decode_prefixes(tokenizer, found.indices, [8], seed=3, decoding=FEW)[8]
    torch.testing.assert_close(found.images, again, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.scores, brightness(again, None, None), atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("groups", [None, [1, 1, 2, 4]])
def test_shared_caches_change_no_index(tokenizer, monkeypatch, scale, lookahead, groups):
    """Each level generated from its prefixes alone, which computes all keys and values again."""
    gpt = tiny_gpt(conditioner=TEXT, groups=groups).double()
    options = {
        "lengths": [1, 2, 5, 8],
        "budget": 12,
        "lookahead": lookahead,
        "sampling": {"guidance_scale": scale},
    }
    fast = look(gpt, tokenizer, **options)
    generate = gpt.generate
    held = []

    def without(cond, *, caches, **asked):
        held.append(caches[0].length)
        return generate(cond, **asked)

    monkeypatch.setattr(gpt, "generate", without)
    slow = look(gpt, tokenizer, **options)
    assert held == [0, 1, 2, 5]  # positions that were not computed again
    assert torch.equal(fast.indices, slow.indices)
    for a, b in zip(fast.tree, slow.tree, strict=True):
        assert torch.equal(a.indices, b.indices)


def test_a_result_does_not_depend_on_the_batch_size(gpt, tokenizer):
    whole = look(gpt, tokenizer, lengths=[2, 8], budget=8)
    for size in (1, 8):
        parts = look(gpt, tokenizer, lengths=[2, 8], budget=8, batch_size=size)
        assert torch.equal(parts.indices, whole.indices)
        assert parts.paths == whole.paths
    other = look(gpt, tokenizer, lengths=[2, 8], budget=8, seed=1)
    assert not torch.equal(other.indices, whole.indices)


def test_candidates_that_none_continues_are_generated_in_batches(gpt, tokenizer):
    """All of a condition's were once, which a large best-of-N had no memory for."""
    whole = look(gpt, tokenizer, lengths=[2, 8], budget=16)
    sizes = []

    def show(done, images):
        sizes.append(len(images))

    parts = look(gpt, tokenizer, lengths=[2, 8], budget=16, batch_size=3, callback=show)
    assert sizes == [8, 3, 3, 2] * 3
    for a, b in zip(whole.tree, parts.tree, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.parents, b.parents)
    assert parts.paths == whole.paths


def test_beam_search_finds_what_best_of_n_cannot(tokenizer):
    """Without a generator: the first indices are matched one by one, which as many draws of all of
    them at once match by chance only."""
    wanted = torch.tensor([30, 70, 170, 110, 50])

    def matches(images, cond, indices):
        near = (indices[:, :5] - wanted[: indices.shape[1]]).abs() < 20
        return near.double().sum(dim=1)

    cond = ["anything"] * 8
    beam = look(None, tokenizer, cond, matches, lengths=[1, 2, 3, 4, 5], budget=60)
    best = look(None, tokenizer, cond, matches, lengths=[5], budget=60)
    assert beam.scores.mean() > best.scores.mean() + 0.5
    assert beam.indices.min() >= 0
    assert beam.indices.max() < 200


def test_by_default_a_generator_has_best_of_n_and_a_uniform_prior_a_tree(gpt, tokenizer):
    def levels(prior):
        return [level.num_tokens for level in look(prior, tokenizer, budget=6).tree]

    assert levels(gpt) == [8]
    assert levels(None) == [1, 4, 8]


def test_a_uniform_prior_draws_every_index_as_often(tokenizer):
    def none(images, cond, indices):
        return torch.zeros(len(images))

    found = look(None, tokenizer, [""] * 4, none, lengths=[8], budget=500, beams=1)
    counts = found.tree[0].indices.flatten().bincount(minlength=200)
    assert len(counts) == 200
    assert 40 < counts.min() < 80 < counts.max() < 130  # of 80 each, by chance


def test_the_verifier_is_given_its_conditions(tokenizer):
    gpt = tiny_gpt().double()
    seen = []

    def verifier(images, cond, indices):
        seen.append((cond.tolist(), tuple(images.shape), tuple(indices.shape)))
        return torch.zeros(len(images))

    done = []
    labels = torch.tensor([3, 1])
    options = {"lengths": [2, 8], "budget": 4, "callback": lambda n, x: done.append((n, len(x)))}
    look(gpt, tokenizer, labels, verifier, **options)
    assert seen == [
        ([3, 3, 1, 1], (4, 3, 16, 16), (4, 2)),
        ([3, 3, 1, 1], (4, 3, 16, 16), (4, 8)),
    ]
    assert done == [(4, 4), (8, 4)]


def test_likelihood_is_that_of_the_generator(tokenizer):
    gpt = tiny_gpt().double()
    labels = torch.tensor([0, 4])
    found = look(gpt, tokenizer, labels, likelihood(gpt), lengths=[2, 8], budget=8)
    logs = gpt(found.indices[:, :-1], labels).log_softmax(dim=-1)
    expected = torch.stack(
        [sum(logs[row, j, found.indices[row, j]] for j in range(8)) for row in range(2)]
    )
    torch.testing.assert_close(found.scores, expected.detach())
    chance = look(gpt, tokenizer, labels, likelihood(gpt), lengths=[8], budget=1, beams=1)
    assert (found.scores > chance.scores).all()


def test_a_classifier_scores_its_own_class():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5)).eval()
    images = torch.rand(4, 3, 8, 8)
    scores = torch.stack([classifier(network)(images, [c] * 4, images) for c in range(5)])
    torch.testing.assert_close(scores.exp().sum(dim=0), torch.ones(4))
    assert torch.equal(scores.argmax(dim=0), network(images).argmax(dim=1))
    large = torch.rand(2, 3, 16, 16)
    assert classifier(network, 8)(large, torch.tensor([0, 1]), large).shape == (2,)


def save_clip(folder):
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes["num_attention_heads"] = 2
    ends = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    text = {**sizes, **ends, "vocab_size": len(words), "max_position_embeddings": 12}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    model.save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(words)}
    pictures = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = CLIPProcessor(pictures, CLIPTokenizer(vocab=vocabulary, merges=[]))
    processor.tokenizer.model_max_length = 12
    processor.save_pretrained(folder)
    return folder


def test_an_image_text_model_scores_by_cosine(tmp_path):
    save_clip(tmp_path)
    score = image_text(str(tmp_path))
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    scores = score(images, ["a cat", "dog", "a cat"], images)
    assert scores.abs().max() <= 1
    alone = [score(images[i : i + 1], [p], images) for i, p in enumerate(["a cat", "dog", "a cat"])]
    torch.testing.assert_close(scores, torch.cat(alone))
    assert not torch.allclose(score(images, ["dog"] * 3, images)[[0, 2]], scores[[0, 2]])
    with pytest.raises(ValueError, match=r"there is no folder '.*nowhere'"):
        image_text(str(tmp_path / "nowhere"))


def without_a_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def truncated(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def with_code(folder):
    """transformers would ask on standard input whether to run it."""
    (folder / "code.py").write_text("raise SystemExit('code was run')")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoModel": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))


def without_images(folder):
    CLIPModel.from_pretrained(folder).text_model.save_pretrained(folder)


def without_processor(folder):
    for path in folder.glob("*processor_config.json"):
        path.unlink()


def without_words(folder):
    for path in folder.glob("tokenizer*.json"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without_words, "has no vocabulary"),
        (without_a_tensor, "lacks weights of its model: 'visual_projection.weight' for one"),
        (truncated, "gives no model of images and texts"),
        (with_code, "asks to run code of its own .*refused"),
        (without_images, "does not score images by prompts"),
        (without_processor, "no model of images and texts|does not score images by prompts"),
    ],
)
def test_an_image_text_model_that_cannot_score_is_refused_at_once(
    tmp_path, monkeypatch, damage, said
):
    damage(save_clip(tmp_path))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    with pytest.raises(ValueError, match=said):
        image_text(str(tmp_path))


def test_a_generator_without_prefixes_has_best_of_n(tokenizer):
    maskgit = MaskGIT(
        MaskGITConfig(
            vocab_size=200,
            num_tokens=8,
            depth=1,
            dim=16,
            num_heads=2,
            conditioner={"name": "class", "num_classes": 5, "learned_null": True},
        )
    ).eval()
    labels = torch.tensor([1, 2])
    found = look(maskgit, tokenizer, labels, budget=4)
    assert [level.num_tokens for level in found.tree] == [8]
    assert torch.equal(found.scores, found.tree[0].scores.max(dim=1).values)
    with pytest.raises(ValueError, match=r"lengths=\[4, 8\] must be \[8\]"):
        look(maskgit, tokenizer, labels, lengths=[4, 8])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lengths": [2, 9]}, "lengths=9 must be a whole number from 1 to 8"),
        ({"lengths": [4, 4]}, r"lengths=\[4, 4\] must rise"),
        ({"lengths": []}, r"lengths=\[\] must rise"),
        ({"lengths": [2, 8], "budget": 1}, "budget=1 must be a whole number from 2"),
        (
            {"lengths": [2, 8], "budget": 5, "beams": 3},
            "beams=3 must be a whole number from 1 to 2",
        ),
        ({"lengths": [2, 8], "lookahead": 2}, "lookahead=2 must be a whole number from 0 to 1"),
        ({"verifier": "clip"}, "verifier='clip' must be a function"),
        ({"cond": []}, "no condition"),
        ({"cond": torch.tensor([1])}, "takes prompts"),
        ({"sampling": {"temperature": -1}}, "temperature=-1 must be"),
        ({"batch_size": 0}, "batch_size=0 must be"),
        ({"generator": None, "sampling": {"top_k": 4}}, "needs a generator"),
        ({"generator": tiny_gpt(vocab_size=12)}, "vocabulary has 12 indices, the tokenizer's 200"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_work(gpt, tokenizer, monkeypatch, options, said):
    def work(*args, **options):
        raise AssertionError("the work began")

    monkeypatch.setattr(gpt, "new_caches", work)
    monkeypatch.setattr("flextok.tree_search.decode_rows", work)
    asked = {"generator": gpt, "tokenizer": tokenizer, "cond": PROMPTS, "verifier": brightness}
    with pytest.raises(ValueError, match=said):
        search(**{**asked, **options})


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (torch.zeros(3, 2), r"returned \(3, 2\), expected a \(3,\) tensor"),
        ([0.0] * 3, r"expected a \(3,\) tensor"),
        (torch.tensor([0.0, torch.nan, 1.0]), "not finite"),
    ],
)
def test_a_verifier_that_returns_no_scores_is_named(gpt, tokenizer, scores, said):
    with pytest.raises(ValueError, match=said):
        look(gpt, tokenizer, ["a bomb"], lambda *_: scores, lengths=[2, 8], budget=6)
