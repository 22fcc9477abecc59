import itertools

import pytest
import torch
from helpers.models import overfit, tiny_gpt

from flextok.draws import row_generators
from flextok.generators import GPT, GPTConfig
from flextok.objectives import NextTokenConfig, NextTokenObjective
from flextok.schema import from_mapping


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


LABELS = torch.tensor([0, 3, 4, 1])
SCHEDULES = [[1, 1, 2, 4], [1, 1, 1, 5], [1, 7], [4, 4]]  # of 8 indices


@torch.no_grad()
def test_kv_cache_equals_the_full_forward():
    model = tiny_gpt()
    indices = torch.randint(0, 200, (4, 8), generator=seeded())
    full = model(indices[:, :-1], LABELS)
    for chunks in ([1] * 8, [3, 5], [1, 4, 3], [8]):
        caches, logits = model.new_caches(4, 8), []
        x = model.join_start(indices[:, :-1], model.condition(LABELS))
        for piece in x.split(chunks, dim=1):
            for block, cache in zip(model.blocks, caches, strict=True):
                piece = block(piece, is_causal=True, cache=cache)
            logits.append(model.head(model.norm(piece)))
        torch.testing.assert_close(torch.cat(logits, dim=1), full, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_position_j_sees_only_what_came_before():
    model = tiny_gpt()
    indices = torch.randint(0, 200, (4, 7), generator=seeded())
    other = indices.clone()
    other[:, 4:] = (other[:, 4:] + 1) % 200
    before, after = model(indices, LABELS), model(other, LABELS)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_generation_equals_a_plain_loop(scale):
    """Greedy, with guidance, without a cache: the slow definition."""
    model = tiny_gpt()
    indices = torch.empty(4, 0, dtype=torch.long)
    null = torch.full_like(LABELS, -1)
    for _ in range(8):
        c, u = (model(indices, cond)[:, -1] for cond in (LABELS, null))
        new = (u + scale * (c - u)).argmax(dim=-1, keepdim=True)
        indices = torch.cat([indices, new], dim=1)
    fast = model.generate(LABELS, temperature=0, guidance_scale=scale)
    assert torch.equal(fast, indices)


@pytest.mark.parametrize("groups", [None, *SCHEDULES])
def test_a_shorter_generation_is_a_prefix_of_a_longer_one(groups):
    model = tiny_gpt(groups=groups)
    long = model.generate(LABELS, generator=seeded())
    for k in (1, 5):
        assert torch.equal(model.generate(LABELS, num_tokens=k, generator=seeded()), long[:, :k])


def test_the_generator_decides_every_draw():
    model = tiny_gpt()
    torch.manual_seed(0)
    first = model.generate(LABELS, generator=seeded())
    torch.manual_seed(1)
    assert torch.equal(model.generate(LABELS, generator=seeded()), first)
    assert not torch.equal(model.generate(LABELS, generator=seeded(1)), first)


def test_a_generator_for_each_row_makes_it_independent_of_its_batch():
    """Float64, so that another batch size rounds no draw across a boundary."""
    model = tiny_gpt().double()
    together = model.generate(LABELS, generator=row_generators(3, 6, range(4)))
    for i in range(4):
        alone = model.generate(LABELS[i : i + 1], generator=row_generators(3, 6, [i]))
        assert torch.equal(alone, together[i : i + 1])
    same = model.generate(LABELS[:1].expand(4), generator=row_generators(3, 6, range(4)))
    assert len(same.unique(dim=0)) == 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_whose_weights_are_not_finite_is_refused(value, temperature):
    model = tiny_gpt()
    model.head.weight.data[3] = value
    with pytest.raises(ValueError, match="logits hold values that are not finite"):
        model.generate(LABELS, temperature=temperature, generator=seeded())


@pytest.mark.parametrize("groups", [None, *SCHEDULES])
def test_continuing_a_prefix(groups):
    model = tiny_gpt(groups=groups)
    whole = model.generate(LABELS, temperature=0)
    for p in (1, 6, 8):
        assert torch.equal(model.generate(LABELS, temperature=0, prefix=whole[:, :p]), whole)
    forced = torch.tensor([[7, 9]] * 4)
    assert torch.equal(model.generate(LABELS, prefix=forced, generator=seeded())[:, :2], forced)


@torch.no_grad()
def test_groups_of_one_index_are_the_model_without_groups():
    plain, ones = tiny_gpt(), tiny_gpt(groups=[1] * 8)
    indices = torch.randint(0, 200, (4, 7), generator=seeded())
    assert plain.state_dict().keys() == ones.state_dict().keys()
    assert torch.equal(plain(indices, LABELS), ones(indices, LABELS))
    sampled = plain.generate(LABELS, generator=seeded())
    assert torch.equal(ones.generate(LABELS, generator=seeded()), sampled)
    ones.grouped = True  # what larger groups compute, with their mask
    torch.testing.assert_close(ones(indices, LABELS), plain(indices, LABELS))
    assert torch.equal(ones.generate(LABELS, generator=seeded()), sampled)


@torch.no_grad()
@pytest.mark.parametrize("groups", SCHEDULES)
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_generation_by_groups_equals_a_plain_loop(groups, scale):
    """Greedy, with guidance, without a cache; and it takes a step for each group."""
    model = tiny_gpt(groups=groups)
    indices, null = torch.zeros(4, 8, dtype=torch.long), torch.full_like(LABELS, -1)
    ends = list(itertools.accumulate(groups))
    for first, end in zip([0, *ends], ends, strict=False):
        c, u = (model(indices[:, :-1], cond)[:, first:end] for cond in (LABELS, null))
        indices[:, first:end] = (u + scale * (c - u)).argmax(dim=-1)
    passes = []
    model.norm.register_forward_hook(lambda *_: passes.append(1))
    steps = list(model.stream(LABELS, temperature=0, guidance_scale=scale))
    assert torch.equal(steps[-1], indices)
    assert [some.shape[1] for some in steps] == ends
    assert len(passes) == len(groups)


@torch.no_grad()
@pytest.mark.parametrize("groups", [None, *SCHEDULES])
def test_the_logits_of_a_part_are_those_of_the_whole(groups):
    model = tiny_gpt(groups=groups)
    indices = torch.randint(0, 200, (4, 7), generator=seeded())
    whole = model(indices, LABELS)
    for k in range(7):
        torch.testing.assert_close(model(indices[:, :k], LABELS), whole[:, : k + 1])


@pytest.mark.parametrize("groups", [[1] * 8, *SCHEDULES])
def test_an_index_is_predicted_from_those_of_earlier_groups_and_from_all_of_them(groups):
    model = tiny_gpt(groups=groups)
    embedded = []
    model.embedding.register_forward_hook(lambda *call: embedded.append(call[2]))
    logits = model(torch.arange(7).expand(4, 7), LABELS)
    first = [end - size for size, end in zip(groups, itertools.accumulate(groups), strict=True)]
    starts = [start for start, size in zip(first, groups, strict=True) for _ in range(size)]
    for j, start in enumerate(starts):
        loss = torch.nn.functional.cross_entropy(logits[:, j], torch.arange(4))
        (slope,) = torch.autograd.grad(loss, embedded, retain_graph=True, allow_unused=True)
        read = [] if slope is None else slope.abs().sum(dim=(0, 2)).nonzero().flatten().tolist()
        assert read == list(range(start))


def test_a_model_continues_with_other_groups(tmp_path):
    """Groups have no weights of their own."""
    plain, grouped = tiny_gpt(), tiny_gpt(groups=[1, 1, 2, 4])
    grouped.init_weights()
    NextTokenObjective(grouped, weights=plain)
    for name, value in plain.state_dict().items():
        assert torch.equal(grouped.state_dict()[name], value)
    grouped.save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path)
    assert loaded.config.groups == [1, 1, 2, 4]
    sampled = grouped.generate(LABELS, generator=seeded())
    assert torch.equal(loaded.generate(LABELS, generator=seeded()), sampled)
    again = GPT.from_pretrained(tmp_path, overrides={"groups": None})
    assert torch.equal(again.generate(LABELS, temperature=0), plain.generate(LABELS, temperature=0))


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        (
            [1, 1, 2],
            r"groups=\[1, 1, 2\] hold 4 indices in all, but num_tokens=8: change",
        ),
        ([], r"groups=\[\] hold 0 indices"),
        ([1, 4, 3], r"a group of 3 cannot read all indices of one of 4 before it: order the sizes"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups, said):
    """By the config, which is checked before a data set is tokenized."""
    with pytest.raises(ValueError, match=said):
        GPTConfig(num_tokens=8, groups=groups)


def test_batched_generation_is_each_alone():
    model = tiny_gpt()
    together = model.generate(LABELS, temperature=0, guidance_scale=2.0)
    for i in range(4):
        alone = model.generate(LABELS[i : i + 1], temperature=0, guidance_scale=2.0)
        assert torch.equal(alone, together[i : i + 1])


def test_dropped_condition_is_the_null_class():
    model = tiny_gpt()
    indices = torch.randint(0, 200, (4, 7), generator=seeded())
    dropped = model(indices, LABELS, torch.ones(4, dtype=torch.bool))
    assert torch.equal(dropped, model(indices, torch.full_like(LABELS, -1)))
    assert not torch.allclose(dropped, model(indices, LABELS))


def inputs_and_loss(model, indices, monkeypatch):
    """What the embedding reads while the loss is computed, and the loss."""
    seen, embed = [], model.embedding.forward
    monkeypatch.setattr(model.embedding, "forward", lambda x: seen.append(x) or embed(x))
    objective = NextTokenObjective(model, NextTokenConfig(cond_drop=0.0, context_noise=0.25))
    batch = {"indices": indices, "label": LABELS[:1].expand(len(indices))}
    loss = objective(batch, seeded())["loss"]
    return seen[0], loss


def test_context_noise_replaces_a_share_of_the_inputs_in_training_only(monkeypatch):
    indices = torch.zeros(400, 8, dtype=torch.long)
    model = tiny_gpt()
    read, clean = inputs_and_loss(model.eval(), indices, monkeypatch)
    assert torch.equal(read, indices[:, :-1])
    read, noisy = inputs_and_loss(model.train(), indices, monkeypatch)
    replaced = read != 0
    assert replaced.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert len(read[replaced].unique()) > 150  # of 200, uniformly
    targets = model(read, LABELS[:1].expand(400)).flatten(0, 1)  # clean ones are still predicted
    expected = torch.nn.functional.cross_entropy(targets, indices.flatten())
    torch.testing.assert_close(noisy, expected)
    assert not torch.equal(noisy, clean)
    with pytest.raises(ValueError, match=r"context_noise=1\.5"):
        from_mapping(NextTokenConfig, {"context_noise": 1.5})


def test_unconditional_model():
    model = tiny_gpt(conditioner={"name": "none"})
    assert model.generate(torch.zeros(3), num_tokens=4, generator=seeded()).shape == (3, 4)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [None, [1, 1, 2, 4]])
def test_one_batch_overfits(groups):
    torch.manual_seed(0)
    model = tiny_gpt(dim=64, groups=groups)
    model.init_weights()
    model.train()
    indices = torch.randint(0, 200, (4, 8), generator=seeded())
    assert overfit(model, indices, LABELS, steps=120) < 0.05
    assert torch.equal(model.eval().generate(LABELS, temperature=0, guidance_scale=1), indices)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, r"num_tokens=0 must be in \[1, 8\]"),
        ({"num_tokens": 9}, r"num_tokens=9 must be in \[1, 8\]"),
        ({"temperature": -1}, "temperature=-1"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"prefix": torch.zeros(2, 2, dtype=torch.long)}, "prefix has shape"),
        ({"prefix": torch.zeros(4, dtype=torch.long)}, "prefix has shape"),
        ({"prefix": torch.full((4, 2), 200)}, r"indices span \[200, 200\]"),
        ({"prefix": torch.full((4, 8), -1)}, r"indices span \[-1, -1\]"),
        ({"prefix": torch.full((4, 2), 3.7)}, "dtype torch.float32"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_gpt().generate(LABELS, **options)


@pytest.mark.parametrize("labels", [torch.tensor([5]), torch.tensor([-2]), torch.tensor([0.5])])
def test_bad_labels_are_refused(labels):
    with pytest.raises(ValueError, match="class labels"):
        tiny_gpt().generate(labels)


def test_bad_indices_are_refused():
    batch = {"indices": torch.full((1, 8), 200), "label": torch.tensor([0])}
    with pytest.raises(ValueError, match=r"expected \[0, 199\]"):
        NextTokenObjective(tiny_gpt())(batch)


def test_a_generator_of_the_first_indices_trains_on_these():
    objective, label = NextTokenObjective(tiny_gpt()), torch.tensor([0])
    indices = torch.randint(0, 200, (1, 12), generator=seeded())
    losses = [objective({"indices": i, "label": label})["loss"] for i in (indices, indices[:, :8])]
    assert torch.equal(*losses)


def test_shares_of_a_batch_compute_what_the_whole_does():
    config = NextTokenConfig(cond_drop=0.5, context_noise=0.3)
    objective = NextTokenObjective(tiny_gpt().train(), config)
    indices = torch.randint(0, 200, (8, 8), generator=seeded())
    label = torch.arange(8) % 5

    def loss(rows):
        batch = {"indices": indices[rows], "label": label[rows], "row": rows}
        return objective(batch, seeded(4))["loss"]

    shares = loss(range(5)) * 5 / 8 + loss(range(5, 8)) * 3 / 8
    torch.testing.assert_close(shares, loss(range(8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unconditional_model_has_no_guidance(dtype):
    """Its condition is the null condition: no row is computed twice, in any dtype."""
    model = tiny_gpt(conditioner={"name": "none"}).to(dtype)
    widths = set()
    model.head.register_forward_hook(lambda head, inputs, output: widths.add(len(output)))
    drawn = [
        model.generate(torch.zeros(3), guidance_scale=scale, generator=seeded())
        for scale in (1.0, 2.5)
    ]
    assert torch.equal(*drawn)
    assert widths == {3}
