"""Tests whether runs differ more between times of day, or between weekdays, than runs at the same time do.

The replicate is a day: the runs of one slot on one day are averaged, on a logarithmic scale. All tests are F-tests of
nested linear models, computed by least squares, so that days with missing runs need no special treatment. This module
works on plain times and numbers; it knows nothing about files or experiments.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, time
from typing import Any, Literal

import numpy as np

from lem.results.compare import holm
from lem.results.statistics import Summary, summarize

# The joint level of a schedule's tests. It is below 5%, so that at least 95% of schedules without variation get the
# right verdict even if the assumptions of the tests hold only approximately (docs/concepts/statistics.md).
LEVEL = 0.04
# The power at which a difference is called detectable.
POWER = 0.95
# Up to this number, each time of day is a slot; with more times, those in the same hour share a slot.
MOST_SLOTS = 24
# Sums of squares below this share of the sum of the values' squares are rounding errors.
ROUNDING = 1e-20
# Eigenvalues below this belong to combinations of levels that other factors already explain; all others are near 1 or
# above, because the columns of the models are zeros and ones.
RANK_TOLERANCE = 1e-6
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
TWO_WAY = "F-test of slots, two-way analysis of variance with days as blocks"
ONE_WAY = "F-test of slots, one-way analysis of variance"
NESTED = "F-test of weekdays, nested analysis of variance with days within weekdays"

Factor = Literal["time of day", "weekday"]
Verdict = Literal["varies", "no variation found", "cannot tell"]


@dataclass(frozen=True)
class Point:
    """One value, greater than 0, and the planned local time of its run."""

    at: datetime
    value: float


@dataclass(frozen=True)
class FTest:
    """An F-test; `values` is the number of values, and `error_sd` the standard deviation of the error."""

    statistic: float
    numerator: int
    denominator: int
    p_value: float
    error_sd: float
    values: int


@dataclass(frozen=True)
class Level:
    """The values of one slot or weekday: their geometric mean, with its 95% interval (Student's t on the logarithms).

    The interval is None with fewer than two days.
    """

    name: str
    runs: int
    days: int
    mean: float
    ci95_low: float | None
    ci95_high: float | None


@dataclass(frozen=True)
class Variation:
    """How a metric varies over the slots or weekdays, and the verdict.

    `ratio` is the highest level's mean divided by the lowest one's. `error_share` is the standard deviation of repeats,
    as a share of the value. `reason` states why the verdict is "cannot tell".
    """

    factor: Factor
    levels: tuple[Level, ...]
    verdict: Verdict
    reason: str | None = None
    test: str | None = None
    result: FTest | None = None
    p_adjusted: float | None = None
    ratio: float | None = None
    error_share: float | None = None

    @property
    def detectable(self) -> float | None:
        """The ratio by which half of the levels must exceed the rest to be detected with probability `POWER`.

        None without a test, or if only an extreme ratio is detectable.
        """
        least = None if self.result is None else detectable_difference(self.result)
        return None if least is None else math.exp(least)


@dataclass(frozen=True)
class _Cell:
    """The runs of one slot on one day: the mean logarithm of their values, and the number of runs."""

    day: date
    slot: str
    log: float
    runs: int


# ------------------------------------------------------------------ the answer
def variations(points: Sequence[Point]) -> tuple[Variation, Variation]:
    """Return how values vary with the time of day and with the weekday; `judged` then adds the verdicts."""
    cells = _cells(points)
    return _by_time(cells), _by_weekday(cells)


def judged(found: Sequence[Variation]) -> list[Variation]:
    """Return the variations with verdicts; the p-values are adjusted for all tests in the list by Holm's method."""
    adjusted = iter(holm([one.result.p_value for one in found if one.result is not None]))
    return [one if one.result is None else _judged(one, next(adjusted)) for one in found]


def _judged(one: Variation, p_adjusted: float) -> Variation:
    verdict: Verdict = "varies" if p_adjusted < LEVEL else "no variation found"
    return replace(one, p_adjusted=p_adjusted, verdict=verdict)


def _by_time(cells: Sequence[_Cell]) -> Variation:
    levels = _levels([cell.slot for cell in cells], cells, [cell.log for cell in cells])
    slots, days = [cell.slot for cell in cells], [cell.day for cell in cells]
    unknown = Variation("time of day", levels, "cannot tell")
    if len(set(days)) < 2:
        return replace(unknown, reason="fewer than two days")
    if len(levels) < 2:
        return replace(unknown, reason="only one time of day")
    if all(level.days < 2 for level in levels):
        return replace(unknown, reason="no slot has repeats")
    # If no day has two slots, a block would hold a single value; the drift from day to day is then part of the error.
    has_blocks = len(set(days)) < len(cells)
    return _tested(
        unknown, TWO_WAY if has_blocks else ONE_WAY, cells, without=(days,) if has_blocks else (), factor=slots
    )


def _by_weekday(cells: Sequence[_Cell]) -> Variation:
    days, slots = [cell.day for cell in cells], [cell.slot for cell in cells]
    weekdays = [WEEKDAYS[day.weekday()] for day in days]
    levels = _of_weekdays(cells)
    unknown = Variation("weekday", levels, "cannot tell")
    # A week that begins in the middle of a day has the same weekday at both ends, which does not make a second week.
    if 2 * sum(level.days > 1 for level in levels) <= len(levels):
        return replace(unknown, reason="fewer than two weeks")
    if len(levels) < 2:
        return replace(unknown, reason="only one weekday")
    return _tested(unknown, NESTED, cells, without=(slots,), factor=weekdays, error=days)


def _tested(
    unknown: Variation,
    name: str,
    cells: Sequence[_Cell],
    *,
    without: Sequence[Sequence[Hashable]],
    factor: Sequence[Hashable],
    error: Sequence[Hashable] | None = None,
) -> Variation:
    """Return a variation with a test added or, if the test is impossible, with the reason why."""
    logs = [cell.log for cell in cells]
    result = f_test(logs, without=without, factor=factor, error=error)
    if result is None:
        return replace(
            unknown, reason="too few repeats, or repeats that are all equal, so there is no error to test against"
        )
    means = [level.mean for level in unknown.levels]
    return replace(
        unknown,
        test=name,
        result=result,
        ratio=max(means) / min(means),
        error_share=math.expm1(result.error_sd / math.sqrt(len(cells) / len(set(error)) if error else 1.0)),
    )


# ------------------------------------------------------------------ levels
def _cells(points: Sequence[Point]) -> list[_Cell]:
    name = slot_names([point.at for point in points])
    found: dict[tuple[date, str], list[float]] = defaultdict(list)
    for point in sorted(points, key=lambda point: point.at):
        found[point.at.date(), name[point.at.time()]].append(math.log(point.value))
    return [_Cell(day, slot, math.fsum(logs) / len(logs), len(logs)) for (day, slot), logs in found.items()]


def slot_names(times: Sequence[datetime]) -> dict[time, str]:
    """Return the slot of each planned local time of day: the time itself, or its hour if there are many times."""
    of_day = sorted({at.time() for at in times})
    if len(of_day) <= MOST_SLOTS:
        return {at: at.isoformat("seconds" if at.second else "minutes") for at in of_day}
    return {at: f"{at.hour:02}:00–{at.hour:02}:59" for at in of_day}


def _levels(names: Sequence[str], cells: Sequence[_Cell], logs: Sequence[float]) -> tuple[Level, ...]:
    """Return a level for each distinct name, sorted by name; `names` has the name of each cell's level.

    Each cell is one day of its level, so the intervals cover the variation from day to day.
    """
    found: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(names):
        found[name].append(place)
    return tuple(
        _level(name, sum(cells[i].runs for i in places), [logs[i] for i in places])
        for name, places in sorted(found.items())
    )


def _of_weekdays(cells: Sequence[_Cell]) -> tuple[Level, ...]:
    """Return the weekdays' levels, corrected for slots in which a day has no runs.

    A day's value is the overall mean plus the mean deviation of the day's cells from the means of their slots.
    """
    if not cells:
        return ()
    of_slots: dict[str, list[float]] = defaultdict(list)
    for cell in cells:
        of_slots[cell.slot].append(cell.log)
    means = {slot: math.fsum(logs) / len(logs) for slot, logs in of_slots.items()}
    overall = math.fsum(cell.log for cell in cells) / len(cells)
    deviations: dict[date, list[float]] = defaultdict(list)
    runs: dict[date, int] = defaultdict(int)
    for cell in cells:
        deviations[cell.day].append(cell.log - means[cell.slot])
        runs[cell.day] += cell.runs
    levels = []
    for weekday, name in enumerate(WEEKDAYS):
        days = [day for day in deviations if day.weekday() == weekday]
        of_days = [overall + math.fsum(deviations[day]) / len(deviations[day]) for day in days]
        if days:
            levels.append(_level(name, sum(runs[day] for day in days), of_days))
    return tuple(levels)


def _level(name: str, runs: int, logs: Sequence[float]) -> Level:
    of: Summary = summarize(logs)
    low, high = (None if end is None else math.exp(end) for end in (of.ci95_low, of.ci95_high))
    return Level(name, runs, len(logs), math.exp(of.mean or 0.0), low, high)


# ------------------------------------------------------------------ tests
def f_test(
    values: Sequence[float],
    *,
    without: Sequence[Sequence[Hashable]],
    factor: Sequence[Hashable],
    error: Sequence[Hashable] | None = None,
) -> FTest | None:
    """Test whether a factor explains more of the variation than chance would, by comparing nested linear models.

    The error is what the model with the factor leaves unexplained or, with `error`, only the part of it that is due to
    differences between the levels of `error`. With complete blocks, this is the classical analysis of variance; with
    incomplete blocks, it is the intra-block analysis (H. Scheffé, The Analysis of Variance, 1959, ch. 4 and 5).

    Args:
        values: the values.
        without: the level of each value in the factors that both models have, such as its block.
        factor: the level of each value in the tested factor.
        error: the level of each value in a random factor nested in the tested one, such as days within weekdays.

    Returns:
        The test, or None if no degrees of freedom are left for the factor or the error, or the error is 0.
    """
    from scipy.special import fdtrc

    centered = np.asarray(values, float) - np.mean(values)
    less, rank_less = residuals(centered, without)
    more, rank_more = residuals(centered, (*without, factor))
    rest, rank_rest = (0.0, len(centered)) if error is None else residuals(centered, (*without, factor, error))
    numerator, denominator = rank_more - rank_less, rank_rest - rank_more
    if numerator < 1 or denominator < 1 or more - rest <= ROUNDING * max(len(values), float(np.dot(values, values))):
        return None
    variance = (more - rest) / denominator
    statistic = max(0.0, less - more) / numerator / variance
    p_value = float(fdtrc(numerator, denominator, statistic))
    return FTest(float(statistic), numerator, denominator, p_value, math.sqrt(variance), len(values))


def residuals(values: np.ndarray[Any, Any], factors: Sequence[Sequence[Hashable]]) -> tuple[float, int]:
    """Return the residual sum of squares of an additive model with an intercept, and the rank of the model.

    The factor with the most levels is eliminated by subtracting its means (Frisch and Waugh 1933), so that
    computing time does not grow with the square of the number of days.
    """
    codes = sorted((_codes(levels) for levels in factors), key=lambda of: int(of.max()), reverse=True)
    largest, *others = codes or [np.zeros(len(values), int)]
    left = _centered(values[:, None], largest)[:, 0]
    rank = int(largest.max()) + 1
    if others:
        dummies = np.concatenate([np.eye(int(of.max()) + 1)[of] for of in others], axis=1)
        design = _centered(dummies, largest)
        sizes, directions = np.linalg.eigh(design.T @ design)
        used = design @ directions[:, sizes > RANK_TOLERANCE] / np.sqrt(sizes[sizes > RANK_TOLERANCE])
        left = left - used @ (used.T @ left)
        rank += used.shape[1]
    return float(left @ left), rank


def _codes(levels: Sequence[Hashable]) -> np.ndarray[Any, Any]:
    numbers = {level: number for number, level in enumerate(dict.fromkeys(levels))}
    return np.array([numbers[level] for level in levels])


def _centered(columns: np.ndarray[Any, Any], groups: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Subtract from each value the mean of its group in the same column."""
    counts = np.bincount(groups)
    sums = np.stack([np.bincount(groups, column) for column in columns.T], axis=1)
    return np.asarray(columns - (sums / counts[:, None])[groups])


def detectable_difference(result: FTest) -> float | None:
    """Return by how much half of the levels must exceed the rest to be detected with probability `POWER`.

    The test's significance level is `LEVEL`. The result is computed from the noncentral F distribution, for balanced
    data; it is None if only an extreme difference is detectable.
    """
    from scipy.optimize import brentq
    from scipy.special import fdtri, ncfdtr

    limit = float(fdtri(result.numerator, result.denominator, 1 - LEVEL))

    def lacking(noncentrality: float) -> float:
        return float(ncfdtr(result.numerator, result.denominator, noncentrality, limit)) - (1 - POWER)

    above = 1.0
    while lacking(above) > 0:
        above *= 2
    if math.isnan(lacking(above)):  # too large for the library, as with a single degree of freedom for the error
        return None
    return 2 * result.error_sd * math.sqrt(brentq(lacking, 0.0, above) / result.values)
