"""Training that starts from trained weights of other sizes, and parts that stay as they are."""

import copy
import json

import pytest
import torch
from helpers.models import TITOK, VQGAN, overfit, randomize, tiny_gpt, tiny_tokenizer

import flextok
from flextok.generators import MaskGIT, MaskGITConfig
from flextok.objectives import make_objective
from flextok.schema import ConfigError
from flextok.tokenizers import MaskGITVQGAN, TiTok, TiTokConfig, VQGANConfig

LABELS = torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize("registers", [3, 12])
def test_a_tokenizer_goes_on_with_fewer_or_more_registers(images, registers, caplog):
    """Register i sees none after it, so that the first indices stay."""
    trained = tiny_tokenizer()
    model = randomize(tiny_tokenizer(num_registers=registers), seed=5)
    with caplog.at_level("INFO"):
        make_objective(model, start={"weights": trained})
    both = min(registers, 8)
    model.eval()
    assert torch.equal(model.encode(images)[:, :both], trained.encode(images)[:, :both])
    line = f"encoder.registers goes from [8, 32] to [{registers}, 32]: {both} taken over"
    assert line in caplog.text
    assert f"{registers - both} new" in caplog.text


def test_a_tokenizer_goes_on_at_another_size(caplog):
    trained = tiny_tokenizer()
    model = tiny_tokenizer(image_size=24)
    with caplog.at_level("INFO"):
        make_objective(model, start={"weights": trained})
    assert "decoder.patch_pos goes from [1, 32, 4, 4] to [1, 32, 6, 6]: interpolated" in caplog.text
    grey = torch.full((1, 3, 24, 24), 0.3)
    assert model.eval().encode(grey).shape == (1, 8)


def test_what_cannot_be_resized_is_refused():
    with pytest.raises(ConfigError, match="must have the sizes of what it starts from"):
        make_objective(tiny_tokenizer(decoder_dim=64), start={"weights": tiny_tokenizer()})
    with pytest.raises(ConfigError, match="must have the sizes of what it starts from"):
        make_objective(tiny_gpt(dim=64), start={"weights": tiny_gpt()})
    with pytest.raises(ConfigError, match=r"starts from a trained gpt model.*got a flextok"):
        make_objective(tiny_gpt(), start={"weights": tiny_tokenizer()})


@pytest.mark.parametrize("tokens", [5, 11])
def test_a_generator_goes_on_with_fewer_or_more_tokens(tokens):
    trained, model = tiny_gpt(), tiny_gpt(num_tokens=tokens)
    make_objective(model, start={"weights": trained})
    indices = torch.arange(4 * 4).view(4, 4)
    assert torch.equal(model.eval()(indices, LABELS), trained(indices, LABELS))


def test_a_generator_s_classes_go_by_name(caplog):
    """Kept ones, wherever they stand now; new ones begin as they were made."""
    trained = tiny_gpt()
    trained.metadata["class_names"] = ["ant", "bee", "cat", "dog", "emu"]
    model = tiny_gpt(conditioner={"name": "class", "num_classes": 3})
    model.metadata["class_names"] = ["dog", "yak", "bee"]
    fresh = model.conditioner.embedding.weight[1].clone()
    with caplog.at_level("INFO"):
        make_objective(model, start={"weights": trained})
    assert "embedding.weight goes from [5, 32] to [3, 32]: 2 taken over, 1 new" in caplog.text
    found = model.eval().generate(["dog", "bee", "none"], temperature=0)
    assert torch.equal(found, trained.generate(["dog", "bee", "none"], temperature=0))
    assert torch.equal(model.conditioner.embedding.weight[1], fresh)


def test_equal_numbers_of_other_classes_are_no_equal_classes():
    trained, model = tiny_gpt(), tiny_gpt()
    trained.metadata["class_names"] = list("abcde")
    model.metadata["class_names"] = list("edcba")
    make_objective(model, start={"weights": trained})
    drawn = model.eval().generate(list("ab"), temperature=0)
    assert torch.equal(drawn, trained.generate(list("ab"), temperature=0))


def tiny_maskgit(classes: int, tokens: int = 8, seed: int = 0) -> MaskGIT:
    conditioner = {"name": "class", "num_classes": classes, "learned_null": True}
    sizes = {"vocab_size": 12, "num_tokens": tokens, "depth": 1, "dim": 16, "num_heads": 2}
    return randomize(MaskGIT(MaskGITConfig(**sizes, conditioner=conditioner)), seed).eval()


@pytest.mark.parametrize("names", ["none", "trained", "own"])
@pytest.mark.parametrize("classes", [3, 12])
def test_no_class_goes_to_no_class_where_no_names_are_known(classes, names):
    """As in a published model, which has none."""
    trained, model = tiny_maskgit(8, seed=1), tiny_maskgit(classes, seed=2)
    for each, who in ((trained, "trained"), (model, "own")):
        if names == who:
            count = each.conditioner.num_classes
            each.metadata["class_names"] = [f"class {i}" for i in range(count)]
    old, fresh = (m.conditioner.embedding.weight.detach().clone() for m in (trained, model))
    make_objective(model, start={"weights": trained})
    now, both = model.conditioner.embedding.weight, min(8, classes)
    assert torch.equal(now[classes], old[8])
    assert torch.equal(now[:both], old[:both])
    assert torch.equal(now[both:classes], fresh[both:classes])


def test_maskgit_keeps_its_class_of_none():
    def make(classes, tokens):
        model = tiny_maskgit(len(classes), tokens, len(classes))
        model.metadata["class_names"] = classes
        return model

    trained, model = make(["a", "b"], 8), make(["x", "b", "y"], 6)
    make_objective(model, start={"weights": trained})
    options = {"temperature": 0, "num_tokens": 6, "num_steps": 2, "guidance_scale": 2.0}
    drawn = [m.eval().generate(["b", "none"], **options) for m in (model, trained)]
    assert torch.equal(*drawn)


def test_other_codes_are_warned_of(caplog):
    trained, model = tiny_gpt(), tiny_gpt()
    trained.metadata["codes_id"], model.metadata["codes_id"] = "one", "other"
    make_objective(model, start={"weights": trained})
    assert "trained on codes one, this tokenizer has other" in caplog.text


@pytest.mark.parametrize("objective", ["reconstruction", "adversarial"])
def test_a_titok_goes_on(images, objective):
    """Of the same sizes it decodes as before; of others its positions are interpolated, and the
    first tokens' taken over."""

    def make(**changes):
        return TiTok(TiTokConfig(**{**TITOK, "stage": "single", **changes}))

    trained = randomize(make()).eval()
    same = make()
    make_objective(same, {"name": objective}, {"weights": trained})
    indices = trained.encode(images)
    assert torch.equal(same.eval().decode(indices), trained.decode(indices))
    larger = make(image_size=24, num_tokens=9)
    make_objective(larger, {"name": objective}, {"weights": trained})
    assert torch.equal(larger.encoder.latent_pos[:6], trained.encoder.latent_pos)
    row = trained.encoder.patch_pos[1:].mean(dim=0)
    torch.testing.assert_close(larger.encoder.patch_pos[1:].mean(dim=0), row, atol=0.05, rtol=0)
    legacy = make(legacy=True, num_tokens=9)
    with pytest.raises(ConfigError, match="mix all of its tokens"):
        make_objective(legacy, {"name": objective}, {"weights": make(legacy=True)})


def test_a_vqgan_goes_on(images):
    trained = randomize(MaskGITVQGAN(VQGANConfig(**VQGAN))).eval()
    model = MaskGITVQGAN(VQGANConfig(**{**VQGAN, "image_size": 32}))  # convolutions fit any
    make_objective(model, start={"weights": trained})
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), trained.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", ["gpt", "maskgit"])
def test_parts_of_a_generator_stay_frozen(name):
    model = tiny_gpt()
    if name == "maskgit":
        sizes = {"vocab_size": 12, "num_tokens": 8, "depth": 1, "dim": 16, "num_heads": 2}
        conditioner = {"name": "class", "num_classes": 5}
        model = MaskGIT(MaskGITConfig(**sizes, conditioner=conditioner))
    objective = make_objective(model, {"train": ["conditioner", "head"]}).train()
    batch = {"indices": torch.zeros(2, 8, dtype=torch.long), "label": torch.tensor([0, 3])}
    objective(batch, torch.Generator())["loss"].backward()
    moved = {key.split(".")[0] for key, p in model.named_parameters() if p.grad is not None}
    assert moved == {"conditioner", "head"}
    with pytest.raises(ConfigError, match="names no part of the model"):
        make_objective(tiny_gpt(), {"train": ["haed"]})


@pytest.mark.slow
@pytest.mark.skipif(not flextok.list_models(), reason="no weights in flextok/releases")
def test_the_package_s_models_start_below_fresh_ones(tmp_path):
    """The benchmark behind the table in docs/train.md, at its smallest."""
    pytest.importorskip("skimage")
    import warm_start

    place = tmp_path / "found.json"
    warm_start.main(["--steps", "1", "--images", "24", "--seeds", "0", "--output", str(place)])
    found = json.loads(place.read_text())["validation_loss"]
    assert found.keys() == warm_start.CASES.keys()
    for case in ("tokenizer", "generator"):
        (warm,), (fresh,) = found[case]["trained weights"], found[case]["fresh weights"]
        assert [step for step, _ in warm] == [0, 1]
        assert warm[0][1] < fresh[0][1]


def test_a_generator_continued_on_new_classes_learns_them_sooner():
    """Below a fresh one at the start, and at the end of equally many steps."""
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(1)
    pattern = torch.randint(0, 200, (8,), generator=draws).expand(4, 8).clone()
    pattern[:, 0] = torch.tensor([3, 30, 60, 90])  # the class decides the first index only
    trained = tiny_gpt()
    trained.init_weights()
    trained.metadata["class_names"] = ["a", "b", "c", "d", "e"]
    overfit(trained, pattern, LABELS, steps=40)
    fresh = tiny_gpt()
    fresh.init_weights()
    fresh.metadata["class_names"] = ["v", "w", "x", "y", "z"]
    warm = copy.deepcopy(fresh)
    make_objective(warm, start={"weights": trained})
    new = pattern.clone()
    new[:, 0] = torch.tensor([120, 130, 140, 150])
    first = [overfit(model, new, LABELS, steps=1) for model in (warm, fresh)]
    last = [overfit(model, new, LABELS, steps=10) for model in (warm, fresh)]
    assert first[0] < first[1] / 2
    assert last[0] < last[1]
