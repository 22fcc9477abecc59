"""How far trainings of one recipe lie apart, by which a study that was run again is compared."""

from collections.abc import Iterable
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


def deviations(rows: Iterable[Runs], scores: Iterable[str]) -> dict[str, float]:
    """Score -> the standard deviation between trainings with different seeds, pooled over all rows
    and numbers of tokens with several; without the scores that none has several of."""
    kept = list(rows)
    found = {}
    for score in scores:
        squares, freedom = 0.0, 0
        for runs in kept:
            for values in values_of(runs, score).values():
                mean = sum(values) / len(values)
                scale = scale_of(score, mean)
                squares += sum(((value - mean) / scale) ** 2 for value in values)
                freedom += len(values) - 1
        if squares > 0:
            found[score] = (squares / freedom) ** 0.5
    return found


def repeated(
    row: str, before: Runs, now: Runs, scores: Iterable[str], deviation: dict[str, float]
) -> list[Repeated]:
    """The numbers of a table's row in two runs of the study."""
    found = []
    for score in scores:
        one, other = values_of(before, score), values_of(now, score)
        for k in sorted(one.keys() & other.keys()):
            old, new = (sum(values[k]) / len(values[k]) for values in (one, other))
            expected = deviation[score] * (1 / len(one[k]) + 1 / len(other[k])) ** 0.5
            apart = abs(new - old) / scale_of(score, (old + new) / 2) / expected
            found.append(Repeated(row, score, k, old, new, apart))
    return found


def deviation_table(deviation: dict[str, float]) -> str:
    """Markdown: within what 95 % of differences lie."""
    lines = [
        "| score | between two trainings | between two means over two seeds |",
        "|---|---|---|",
    ]
    for score, (title, digits) in titled(deviation).items():
        cells = [
            f"{2 * value:.0%}" if score.startswith(RELATIVE) else f"{2 * value:.{digits}f}"
            for value in (deviation[score] * 2**0.5, deviation[score])
        ]
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
