"""A study that was run again is compared by how far trainings lie apart."""

import random
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "experiments"))

from repeats import comparison, deviation_table, deviations, repeated, summary

DEVIATION = {"psnr": 0.2, "frechet_classifier": 0.1}  # of the latter in parts of the mean


def training(rng, level):
    """A result whose PSNR and Fréchet distance deviate by chance from those of the recipe."""
    rows = []
    for k in (1, 2, 4, 8):
        psnr = level + k + rng.gauss(0, 0.2)
        frechet = 100 * level / k * (1 + rng.gauss(0, 0.1))
        rows.append({"num_tokens": k, "scores": {"psnr": psnr, "frechet_classifier": frechet}})
    return {"report": {"results": rows}}


@pytest.mark.parametrize(("before", "now"), [(2, 2), (1, 2), (3, 1)])
def test_as_many_numbers_lie_within_the_spread_as_it_states(before, now):
    rng = random.Random(0)
    seeds = [[training(rng, level) for _ in range(2)] for level in range(10, 110)]
    found = deviations([*seeds, [training(rng, 5)]], ["psnr", "frechet_classifier", "ssim"])
    assert found == pytest.approx(DEVIATION, rel=0.1)
    numbers = []
    for level in range(10, 110):
        runs = ([training(rng, level) for _ in range(count)] for count in (before, now))
        numbers += repeated(f"row {level}", *runs, DEVIATION, found)
    assert len(numbers) == 800
    assert sum(one.apart <= 2 for one in numbers) / 800 == pytest.approx(0.95, abs=0.02)


def test_numbers_that_lie_apart_are_named_the_farthest_first():
    def run(psnr, frechet):
        scores = {"psnr": psnr, "frechet_classifier": frechet}
        return [{"report": {"results": [{"num_tokens": 4, "scores": scores}]}}]

    numbers = repeated("ours", run(20, 10), run(20.1, 14), DEVIATION, DEVIATION)
    numbers += repeated("theirs", run(20, 10), run(19, 11), DEVIATION, DEVIATION)
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
    assert f"| {psnr} | 0.57 | 0.40 |" in deviation_table(DEVIATION)
    assert "(classifier) | 28% | 20% |" in deviation_table(DEVIATION)


def test_scores_of_one_training_have_no_deviation():
    assert deviations([[training(random.Random(0), 10)]], ["psnr"]) == {}
