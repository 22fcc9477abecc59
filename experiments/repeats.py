"""How far trainings of one recipe lie apart, by which a study that was run again is compared."""

from collections.abc import Iterable
from itertools import product
from typing import NamedTuple

from study import Runs, titled, values_of

# distances between sets or images, whose differences are relative to their mean
RELATIVE = ("frechet_", "rfid", "gfid", "kernel_", "kid", "feature_distance_squared_")


class Repeated(NamedTuple):
    """A number of a table, in two runs of the study."""

    row: str
    score: str
    tokens: int
    before: float
    now: float
    apart: float  # in standard deviations of such a difference


def scale_of(score: str, mean: float) -> float:
    """What a difference between two values is divided by."""
    return abs(mean) or 1.0 if score.startswith(RELATIVE) else 1.0


def kind_of(runs: Runs, tokens: int) -> str:
    """Of a number in a row: those of a kind lie about equally far apart, and are pooled."""
    if runs[0]["config"]["task"] == "generator":
        return "generators"
    return "from one token" if tokens == 1 else "from more"


KINDS = ("from one token", "from more", "generators")
Deviations = dict[tuple[str, str], float]  # (score, kind) -> standard deviation


def deviations(rows: Iterable[Runs], scores: Iterable[str]) -> Deviations:
    """The standard deviation between trainings with different seeds, pooled over all rows and
    numbers of tokens of a kind with several; without those that none has several of."""
    kept, found = list(rows), {}
    for score, kind in product(scores, KINDS):
        squares, freedom = 0.0, 0
        for runs in kept:
            for tokens, values in values_of(runs, score).items():
                if kind_of(runs, tokens) == kind:
                    mean = sum(values) / len(values)
                    scale = scale_of(score, mean)
                    squares += sum(((value - mean) / scale) ** 2 for value in values)
                    freedom += len(values) - 1
        if squares > 0:
            found[score, kind] = (squares / freedom) ** 0.5
    return found


def repeated(
    row: str, before: Runs, now: Runs, scores: Iterable[str], deviation: Deviations
) -> list[Repeated]:
    """The numbers of a table's row in two runs of the study, of which the deviation is known."""
    found = []
    for score in scores:
        one, other = values_of(before, score), values_of(now, score)
        for k in sorted(one.keys() & other.keys()):
            if known := deviation.get((score, kind_of(before, k))):
                old, new = (sum(values[k]) / len(values[k]) for values in (one, other))
                expected = known * (1 / len(one[k]) + 1 / len(other[k])) ** 0.5
                apart = abs(new - old) / scale_of(score, (old + new) / 2) / expected
                found.append(Repeated(row, score, k, old, new, apart))
    return found


def deviation_table(deviation: Deviations) -> str:
    """Markdown: within what 95 % of the differences between two trainings lie."""
    if not deviation:
        return "*No recipe has two seeds.*"
    lines = [f"| score | {' | '.join(KINDS)} |", "|---|---|---|---|"]
    for score, (title, digits) in titled(dict.fromkeys(score for score, _ in deviation)).items():
        cells = []
        for kind in KINDS:
            apart = 2 * 2**0.5 * deviation.get((score, kind), 0.0)
            text = f"{apart:.0%}" if score.startswith(RELATIVE) else f"{apart:.{digits}f}"
            cells.append(text if apart else "")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def comparison(numbers: list[Repeated]) -> str:
    """Markdown: how many numbers lie within two deviations by score, and those that do not."""
    names = titled(dict.fromkeys(one.score for one in numbers))
    lines = [summary(numbers), "", "| score | numbers | within |", "|---|---|---|"]
    for score, (title, _) in names.items():
        some = [one for one in numbers if one.score == score]
        lines.append(f"| {title} | {len(some)} | {sum(one.apart <= 2 for one in some)} |")
    lines += ["", "The others:", "", "| row | score | tokens | before | now | deviations |"]
    lines.append("|---|---|---|---|---|---|")
    for one in sorted(numbers, key=lambda one: -one.apart):
        if one.apart > 2:
            title, digits = names[one.score]
            values = f"{one.before:.{digits}f} | {one.now:.{digits}f} | {one.apart:.1f}"
            lines.append(f"| {one.row} | {title} | {one.tokens} | {values} |")
    return "\n".join(lines) + "\n"


def summary(numbers: list[Repeated]) -> str:
    within, count = sum(one.apart <= 2 for one in numbers), len(numbers)
    return (
        f"Of {count} numbers of the tables, {within} ({within / count:.1%}) lie within "
        "two standard deviations of those published, as 95 % would by chance."
    )
