"""A study that was run again is compared by how far trainings lie apart."""

import random
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "experiments"))

from repeats import KINDS, comparison, deviation_table, deviations, repeated, summary

ONE, MORE, GENERATORS = KINDS
DEVIATION = {  # of Fréchet distances in parts of the mean
    **{("psnr", ONE): 0.6, ("frechet_classifier", ONE): 0.05},
    **{("psnr", MORE): 0.2, ("frechet_classifier", MORE): 0.1},
    ("frechet_classifier", GENERATORS): 0.2,
}


def result(task, rows):
    rows = [{"num_tokens": k, "scores": scores} for k, scores in rows.items()]
    return {"config": {"task": task}, "report": {"results": rows}}


def training(rng, level, task="tokenizer"):
    """A result whose PSNR and Fréchet distance deviate by chance from those of the recipe."""
    rows = {}
    for k in (1, 2, 4, 8):
        kind = GENERATORS if task == "generator" else ONE if k == 1 else MORE
        chance = 1 + rng.gauss(0, DEVIATION["frechet_classifier", kind])
        rows[k] = {"frechet_classifier": 100 * level / k * chance}
        if task == "tokenizer":
            rows[k]["psnr"] = level + k + rng.gauss(0, DEVIATION["psnr", kind])
    return result(task, rows)


@pytest.mark.parametrize(("before", "now"), [(2, 2), (1, 2), (3, 1)])
def test_as_many_numbers_lie_within_the_spread_as_it_states(before, now):
    rng = random.Random(0)
    recipes = [(level, task) for level in range(10, 310) for task in ("tokenizer", "generator")]
    seeds = [[training(rng, *recipe) for _ in range(2)] for recipe in recipes]
    scores = ["psnr", "frechet_classifier", "ssim"]
    found = deviations([*seeds, [training(rng, 5)]], scores)
    assert found == pytest.approx(DEVIATION, rel=0.15)
    numbers = []
    for recipe in recipes:
        runs = ([training(rng, *recipe) for _ in range(count)] for count in (before, now))
        numbers += repeated(str(recipe), *runs, scores, found)
    assert len(numbers) == 300 * 12
    for some in (
        [one for one in numbers if one.score == "psnr" and one.tokens == 1],
        [one for one in numbers if one.score == "psnr" and one.tokens > 1],
        [one for one in numbers if "generator" in one.row],
    ):
        within = sum(one.apart <= 2 for one in some) / len(some)
        assert within == pytest.approx(0.95, abs=0.03)


def test_numbers_that_lie_apart_are_named_the_farthest_first():
    def run(psnr, frechet):
        return [result("tokenizer", {4: {"psnr": psnr, "frechet_classifier": frechet}})]

    scores = ["psnr", "frechet_classifier"]
    numbers = repeated("ours", run(20, 10), run(20.1, 14), scores, DEVIATION)
    numbers += repeated("theirs", run(20, 10), run(19, 11), scores, DEVIATION)
    # between two trainings, of 0.2 dB each
    assert numbers[2].apart == pytest.approx(1 / (0.2 * 2**0.5))
    # 4 of a mean of 12
    assert numbers[1].apart == pytest.approx(4 / 12 / (0.1 * 2**0.5))
    assert "Of 4 numbers of the tables, 2 (50.0%) lie within" in summary(numbers)
    begun, _, others = comparison(numbers).partition("The others:")
    psnr, frechet = "Faithful: PSNR (dB), higher is better", "Plausible: Fréchet distance, lower"
    assert f"| {psnr} | 2 | 1 |" in begun
    first, second = (line for line in others.splitlines() if "is better" in line)
    assert first == f"| theirs | {psnr} | 4 | 20.00 | 19.00 | 3.5 |"
    assert second.startswith(f"| ours | {frechet}")


def test_the_table_has_a_column_for_each_kind_of_number():
    table = deviation_table(DEVIATION)
    assert "PSNR (dB), higher is better | 1.70 | 0.57 |  |" in table
    assert "(classifier) | 14% | 28% | 57% |" in table


def test_scores_of_one_training_have_no_deviation():
    assert deviations([[training(random.Random(0), 10)]], ["psnr"]) == {}
    assert "two seeds" in deviation_table({})
