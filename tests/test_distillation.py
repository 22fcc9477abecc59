import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers.models import bend, tiny_tokenizer
from PIL import Image

from flextok.config import ExperimentConfig
from flextok.draws import BatchDraws
from flextok.objectives import DistillationConfig, DistillationObjective
from flextok.objectives.distillation import Stretch
from flextok.objectives.nested_dropout import NestedDropout
from flextok.registry import build_model, like_start
from flextok.schema import ConfigError, from_mapping
from flextok.tokenizers import TOKENIZERS, FlexTok
from flextok.tokenizers.decoding import DecodeOptions, solve
from flextok.training.plan import build
from flextok.training.prepare import prepare

TEACHES = DecodeOptions(guidance={"name": "cfg"}, guidance_scale=2.0)


def make_teacher(**changes) -> FlexTok:
    model = tiny_tokenizer(decode=copy.copy(TEACHES), **changes)
    bend(model.decoder)
    return model


def distillation(teacher: FlexTok, **changes) -> DistillationObjective:
    student = tiny_tokenizer(decode=copy.copy(TEACHES), **changes)
    return DistillationObjective(
        student, DistillationConfig(num_steps=2, teacher_steps=4), teacher=teacher
    )


def pictures(seed: int, batch: int = 16) -> torch.Tensor:
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def error(student: FlexTok, teacher: FlexTok) -> float:
    """Of the student's two steps against the teacher's eight, on unseen codes and noise, relative
    to how far the teacher's solution moves from the noise."""
    codes = teacher.quantizer.indices_to_codes(teacher.encode(pictures(7)))
    noise = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(8))
    keep = torch.tensor([1, 2, 4, 8] * 4)
    many = solve(
        teacher.conditions(codes, keep), noise, teacher.config.decode, times=torch.linspace(1, 0, 9)
    )
    few = solve(student.conditions(codes, keep), noise, student.config.decode)
    return float((few - many).norm() / (many - noise).norm())


def test_the_student_comes_to_the_teachers_many_steps():
    teacher = make_teacher()
    objective = distillation(teacher)
    student = objective.model
    before = error(student, teacher)
    optimizer = torch.optim.AdamW(
        [p for p in student.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.0
    )
    draws, losses = torch.Generator().manual_seed(0), []
    student.train()
    for step in range(120):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / 120)
        loss = objective({"image": pictures(100 + step, 8)}, draws)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    after = error(student.eval(), teacher)
    assert after < before / 2, (before, after)
    assert sum(losses[-20:]) < sum(losses[:20]) / 2
    state, taught = student.state_dict(), teacher.state_dict()
    same = {name for name in state if torch.equal(state[name], taught[name])}
    assert {name for name in state if name.startswith("encoder.")} < same  # the same tokens


def test_a_teacher_without_bends_is_matched_from_the_start():
    """With a constant velocity the mean over a step is the velocity: no error, no gradient."""
    teacher = make_teacher()
    with torch.no_grad():
        teacher.decoder.head.weight.zero_()
    draws = torch.Generator().manual_seed(0)
    assert distillation(teacher)({"image": pictures(0)}, draws)["loss"] < 1e-10


def test_the_flag_travels_and_decides_how_to_decode(tmp_path):
    student = distillation(make_teacher()).model
    student.save_pretrained(tmp_path)
    loaded = FlexTok.from_pretrained(tmp_path)
    assert (loaded.config.distilled, loaded.config.decode.num_steps) == (True, 2)
    indices, calls = loaded.encode(pictures(0, 2)), []
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = loaded.decode(indices, noise=noise, callback=lambda n, x: calls.append(n))
    assert calls == [1, 2]  # two steps, one velocity each
    asked = loaded.decode(indices, noise=noise, num_steps=2, guidance_scale=1.0)
    assert torch.equal(plain, asked)
    others = ({"guidance": {"name": "apg"}}, {"guidance_interval": [0.2, 0.8]})
    for option in ({"num_steps": 4}, {"guidance_scale": 2.0}, {"solver": "heun"}, *others):
        (key,) = option
        with pytest.raises(ValueError, match=f"{key}=.*distilled"):
            loaded.decode(indices, **option)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"as start\.teacher \(got nothing\)"):
        DistillationObjective(tiny_tokenizer())
    with pytest.raises(ConfigError, match="sizes of what it starts from"):
        distillation(make_teacher(decoder_dim=48))
    with pytest.raises(ConfigError, match=r"num_steps=0 must be"):
        from_mapping(DistillationConfig, {"num_steps": 0})


def test_shares_of_a_batch_compute_what_the_whole_does():
    objective, images = distillation(make_teacher()), pictures(0, 8)
    draws = [torch.Generator().manual_seed(5) for _ in range(3)]
    whole = objective({"image": images}, draws[0])["loss"]
    shares = [
        objective({"image": images[rows], "row": rows}, rng)["loss"]
        for rows, rng in zip((range(3), range(3, 8)), draws[1:], strict=True)
    ]
    torch.testing.assert_close((3 * shares[0] + 5 * shares[1]) / 8, whole)


def test_a_student_has_the_sizes_and_codes_of_its_teacher(tmp_path):
    """Where its config states no others: another bound, say, would change what indices mean."""
    quantizer = {"name": "fsq", "levels": [4, 4, 4], "bound": "ifsq"}
    teacher = make_teacher(quantizer=quantizer, num_registers=5)
    teacher.save_pretrained(tmp_path / "teacher")
    folder = {"name": "folder", "root": str(tmp_path)}
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    config = from_mapping(
        ExperimentConfig,
        {
            **{"task": "tokenizer", "output_dir": str(tmp_path / "run")},
            **{"model": {"name": "flextok", "decode": {"time_shift": 2.0}}},
            **{"objective": {"name": "distillation"}, "data": {"train": folder}},
            **{"start": {"teacher": str(tmp_path / "teacher")}, "trainer": {"max_steps": 1}},
        },
    )
    student = prepare(config).objective.model
    assert student.codes_id == teacher.codes_id
    assert (student.num_tokens, student.config.decoder_depth) == (5, teacher.config.decoder_depth)
    assert student.config.decode.guidance == TEACHES.guidance, "as the teacher decodes, and"
    assert student.config.decode.time_shift == 2.0, "as stated"
    assert build(config, torch.device("cpu")).model.num_tokens == 5, "and so it is planned"


def test_a_model_that_begins_as_a_few_step_one_takes_many_steps():
    few = distillation(make_teacher()).model
    spec = like_start({"name": "flextok"}, {"weights": few})
    model = build_model(TOKENIZERS, spec)
    assert few.config.distilled
    assert not model.config.distilled
    assert model.config.decode == DecodeOptions()
    assert model.num_tokens == few.num_tokens


def test_a_student_of_other_codes_is_refused():
    teacher = make_teacher()
    other = {**teacher.config.quantizer, "bound": "ifsq"}
    with pytest.raises(ConfigError, match=r"bound.*is not the teacher's.*leave it out"):
        distillation(teacher, quantizer=other)


def test_training_begins_with_the_noise_that_decoding_begins_with():
    """Scaled by the number of tokens: without noise, the loss knows nothing of the noise drawn."""
    losses = []
    for scale, seed in ((0.0, 0), (0.0, 1), (1.0, 0), (1.0, 1)):
        student = tiny_tokenizer(decode=replace(TEACHES, noise_scale=[scale, scale]))
        config = DistillationConfig(nested_dropout="none", num_steps=1, teacher_steps=2)
        objective = DistillationObjective(student, config, teacher=make_teacher())
        draws = torch.Generator().manual_seed(seed)
        losses.append(objective({"image": pictures(0)}, draws)["loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[2] != pytest.approx(losses[3], rel=1e-4)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_students_steps_and_prefix_lengths_are_drawn_apart(groups):
    """They came from one number: short prefixes never trained the last steps."""
    dropout = NestedDropout("pow2", 8, groups)
    decode = DecodeOptions(num_steps=4, guidance={"name": "cfg"})
    found = Counter()
    for seed in range(2000):
        draws = BatchDraws(1, torch.Generator().manual_seed(seed))
        (length,) = dropout.lengths(draws)
        found[int(length), len(Stretch.drawn(draws, decode, 2).walked)] += 1
    assert len(found) == 16
    assert max(found.values()) < 2 * min(found.values())
