"""The generator under a text: padding, batches, cache and guidance change nothing they should not.

The kinds of text encoder behind it: over bytes and over words, trained along, and a frozen one.
"""

import pytest
import torch
from helpers.models import overfit, save_encoder, tiny_gpt

from flextok.generators import GPT
from flextok.objectives import NextTokenObjective

PROMPTS = ["a red heart", "a bomb left of a star on a blue background", "", "whale"]
SIZES = {"dim": 16, "depth": 2, "num_heads": 2}
BYTES = {"name": "bytes", **SIZES}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_encoder(tmp_path_factory.mktemp("t5")))


@pytest.fixture(params=["bytes", "words", "pretrained"])
def model(request, folder):
    frozen = request.param == "pretrained"
    encoder = {"name": request.param, **({"model": folder} if frozen else SIZES)}
    return tiny_gpt(conditioner={"name": "text", "encoder": encoder})


def indices_of(seed=0, batch=4, length=8):
    return torch.randint(0, 200, (batch, length), generator=seeded(seed))


@torch.no_grad()
def test_kv_cache_equals_the_full_forward(model):
    indices = indices_of()
    full = model(indices[:, :-1], PROMPTS)
    condition = model.condition(PROMPTS)
    contexts, mask = model.contexts(condition), condition.context.mask[:, None, None]
    for chunks in ([1] * 8, [3, 5], [8]):
        caches, logits = model.new_caches(4, 8), []
        for piece in model.join_start(indices[:, :-1], model.condition(PROMPTS)).split(
            chunks, dim=1
        ):
            for block, cache, context in zip(model.blocks, caches, contexts, strict=True):
                piece = block(
                    piece, is_causal=True, cache=cache, context=context, context_mask=mask
                )
            logits.append(model.head(model.norm(piece)))
        torch.testing.assert_close(torch.cat(logits, dim=1), full, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_generation_equals_a_plain_loop(model, scale):
    """Greedy, with guidance towards the null text "", without a cache: the slow definition."""
    indices = torch.empty(4, 0, dtype=torch.long)
    for _ in range(8):
        c, u = (model(indices, cond)[:, -1] for cond in (PROMPTS, [""] * 4))
        new = (u + scale * (c - u)).argmax(dim=-1, keepdim=True)
        indices = torch.cat([indices, new], dim=1)
    assert torch.equal(model.generate(PROMPTS, temperature=0, guidance_scale=scale), indices)


@torch.no_grad()
def test_padding_changes_nothing(model):
    indices = indices_of()[:, :-1]
    text = model.conditioner.prepare(PROMPTS, torch.device("cpu"))
    padded = text.pad_to(text.mask.shape[1] + 9)
    noise = torch.randint(0, 200, padded.values.shape, generator=seeded()).to(padded.values.dtype)
    where = padded.mask.view(*padded.mask.shape, *[1] * (padded.values.ndim - 2))
    padded.values = torch.where(where, padded.values, noise)  # whatever stands there
    expected = model(indices, text)
    torch.testing.assert_close(model(indices, padded), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_batched_is_each_alone(model):
    together = model(indices_of()[:, :-1], PROMPTS)
    greedy = model.generate(PROMPTS, temperature=0)
    for i, prompt in enumerate(PROMPTS):
        alone = model(indices_of()[i : i + 1, :-1], [prompt])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)
        assert torch.equal(model.generate([prompt], temperature=0)[0], greedy[i])


def test_keys_of_a_prompt_are_computed_once(model):
    calls = []
    for block in model.blocks:
        for part in (block.cross_attn.wk, block.cross_attn.wv):
            part.register_forward_hook(lambda *_: calls.append(1))
    model.generate(PROMPTS, generator=seeded())
    assert len(calls) == 2 * len(model.blocks)  # not once for each of the 8 indices


def test_a_prompt_given_twice_is_encoded_once(model, monkeypatch):
    asked = []
    original = type(model.conditioner.encoder).rows

    def rows(self, prompts, device="cpu"):
        asked.extend(prompts)
        return original(self, prompts, device)

    monkeypatch.setattr(type(model.conditioner.encoder), "rows", rows)
    drawn = model.generate(["a", "b", "a", "a"], guidance_scale=1, generator=seeded())
    assert asked == ["a", "b"]
    assert not torch.equal(drawn[0], drawn[2])  # samples, not copies


@torch.no_grad()
def test_a_dropped_prompt_is_the_null_text(model):
    indices = indices_of()[:, :-1]
    dropped = model(indices, PROMPTS, torch.tensor([True, False, False, True]))
    expected = model(indices, ["", PROMPTS[1], "", ""])
    torch.testing.assert_close(dropped, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(dropped, model(indices, PROMPTS), atol=1e-4)


@torch.no_grad()
def test_every_token_of_a_prompt_counts(model):
    for parameter in model.conditioner.encoder.parameters():  # so that its attention discerns
        parameter.mul_(5)
    indices = indices_of(batch=1)[:, :-1]
    prompts = ["a red heart", "a rad heart", "heart red a", "a red hear"]
    logits = [model(indices, [prompt]) for prompt in prompts]
    for i in range(4):
        for j in range(i):
            assert not torch.allclose(logits[i], logits[j], atol=1e-5), (prompts[i], prompts[j])


def test_saved_and_loaded_it_generates_the_same(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert torch.equal(
        again.generate(PROMPTS, generator=seeded()), model.generate(PROMPTS, generator=seeded())
    )
    held = any(key.startswith("conditioner.encoder.") for key in model.state_dict())
    assert held == (not model.conditioner.encoder.frozen)  # a frozen encoder stays where it was


def test_what_trains(model):
    model.train()
    batch = {"indices": indices_of(), "text": PROMPTS}
    NextTokenObjective(model)(batch, seeded())["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_training_drops_a_tenth_of_the_prompts():
    model = tiny_gpt(conditioner={"name": "text", "encoder": BYTES}).train()
    dropped = []
    original = model.conditioner.forward

    def forward(cond, drop):
        dropped.append(drop)
        return original(cond, drop)

    model.conditioner.forward = forward
    objective = NextTokenObjective(model)
    objective({"indices": indices_of(batch=1000), "text": ["x"] * 1000}, seeded())
    assert 70 < dropped[0].sum() < 130
    objective.eval()({"indices": indices_of(), "text": PROMPTS})
    assert dropped[1] is None


@pytest.mark.slow
def test_a_batch_of_prompts_overfits():
    torch.manual_seed(0)
    model = tiny_gpt(conditioner={"name": "text", "encoder": BYTES}, dim=64)
    model.init_weights()
    model.train()
    indices = indices_of(length=6)
    assert overfit(model, indices, PROMPTS, steps=150) < 0.05
    drawn = model.eval().generate(PROMPTS, num_tokens=6, temperature=0, guidance_scale=1)
    assert torch.equal(drawn, indices)


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        ([], "no prompts"),
        (["a", None], "must be texts, got None"),
        (torch.tensor([1]), "not class labels"),
    ],
)
def test_bad_prompts_are_refused(model, cond, message):
    with pytest.raises(ValueError, match=message):
        model.generate(cond)


def test_prompts_for_a_class_generator_are_refused():
    with pytest.raises(ValueError, match="unknown class 'a heart'; known: 0, 1, 2, 3, 4"):
        tiny_gpt().generate(["a heart"])


def test_no_mlp_needs_the_models_width():
    with pytest.raises(ValueError, match="project=False needs embeddings of the model's width 32"):
        tiny_gpt(conditioner={"name": "text", "encoder": BYTES, "project": False})
