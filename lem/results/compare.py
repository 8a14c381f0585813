"""Compares the arms of a campaign: ratios to a baseline, with intervals, p-values and verdicts.

Each cell, which is one fresh process, is a replicate. Values are paired by cycle and compared as logarithms, because
noise and drift are multiplicative. This module works on plain numbers; the methods and their interval coverage are
explained in docs/how-to/campaigns.md. The module knows nothing about the tables or about how experiments are run.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lem.results.statistics import detectable_errors, t_quantile

if TYPE_CHECKING:
    import numpy as np

Verdict = Literal["less", "more", "the same", "cannot tell"]
# How a comparison treats the position of a cell in its cycle. The choice follows from the order of the cells, not from
# the data. `paired` leaves the effect of the position in the noise, `position` removes a straight-line effect of the
# position from each pair, and `latin` removes the mean of each position.
Analysis = Literal["paired", "position", "latin"]
CONFIDENCE = 0.95
# The smallest number of pairs to which `position` fits a line. With fewer pairs, the degree of freedom that the line
# costs widens the interval more than removing the drift narrows it.
POSITION_PAIRS = 5
# For `cycles_needed`: the power to reach, and the largest number of cycles worth suggesting.
POWER = 0.8
MOST_CYCLES = 10_000


@dataclass(frozen=True)
class Contrast:
    """An arm compared with the baseline; `ratio` is the arm's value divided by the baseline's.

    `cycles` counts the cycles in which the arm and the baseline both have a value. The intervals of all contrasts in a
    comparison hold simultaneously (Bonferroni); `confidence` is the level of a single interval. `p_value` is for the
    hypothesis that the ratio is 1, and `p_adjusted` is `p_value` adjusted by Holm's method. If there are too few values
    to estimate their spread, the interval and the p-values are None.
    """

    cycles: int
    ratio: float | None
    ci_low: float | None
    ci_high: float | None
    confidence: float
    p_value: float | None
    p_adjusted: float | None
    verdict: Verdict
    cycles_needed: int | None


@dataclass(frozen=True)
class Effect:
    """The mean logarithm of a ratio, its standard error, and the error's degrees of freedom."""

    mean: float
    error: float
    degrees_of_freedom: int


def contrasts(
    values: Sequence[Sequence[float | None]],
    *,
    baseline: int = 0,
    analysis: Analysis = "paired",
    positions: Sequence[Sequence[int]] | None = None,
    confidence: float = CONFIDENCE,
    margin: float | None = None,
) -> list[Contrast | None]:
    """Return each arm's contrast with the baseline, and None for the baseline itself.

    Args:
        values: a row for each cycle, with the value of each arm; None or 0 means a missing value.
        baseline: the arm with which the others are compared.
        analysis: how the position in the cycle is treated.
        positions: each cell's position in its cycle, from 1; needed unless the analysis is `paired`.
        confidence: the joint confidence of all intervals.
        margin: an arm whose ratio is shown to be within 1 ± margin gets the verdict "the same"; None rules out this
            verdict.
    """
    logs = [[math.log(value) if value else math.nan for value in row] for row in values]
    arms = range(len(logs[0]))
    each = 1 - (1 - confidence) / max(1, len(arms) - 1)
    effects = [None if arm == baseline else _effect(logs, analysis, positions, arm, baseline) for arm in arms]
    tested = [_p_value(effect) for effect in effects if effect is not None]
    adjusted = iter(holm(tested))
    pairs = [sum(not math.isnan(row[arm]) and not math.isnan(row[baseline]) for row in logs) for arm in arms]
    return [
        None
        if arm == baseline
        else _without_interval(logs, arm, baseline, each)
        if (effect := effects[arm]) is None
        else _contrast(pairs[arm], effect, each, next(adjusted), margin)
        for arm in arms
    ]


def paired_effects(logs: np.ndarray[Any, Any], baseline: int = 0) -> tuple[Any, Any, int]:
    """Return the mean difference of each arm from the baseline, its standard error and the degrees of freedom.

    Values are subtracted cycle by cycle.

    Args:
        logs: logarithms of complete campaigns, by campaign, cycle and arm.
        baseline: the arm that is subtracted; its own mean difference is 0.
    """
    import numpy as np

    cycles = logs.shape[-2]
    differences = logs - logs[..., baseline : baseline + 1]
    return differences.mean(-2), differences.std(-2, ddof=1) / np.sqrt(cycles), cycles - 1


def position_effects(differences: np.ndarray[Any, Any], offsets: np.ndarray[Any, Any]) -> tuple[Any, Any, int]:
    """Return the mean difference of an arm from the baseline, its standard error and the degrees of freedom.

    A straight line in the difference in position is fitted to the difference in value (ordinary least squares). The
    mean is the line's value at 0, so a linear drift within the cycles neither shifts the mean nor widens its interval.
    With fewer than `POSITION_PAIRS` pairs, or if the positions differ by the same number in all pairs, the pairs are
    compared without a line.

    Args:
        differences: the arm's logarithms minus the baseline's, by campaign and cycle.
        offsets: the arm's position minus the baseline's, by campaign and cycle, or by cycle for all campaigns.
    """
    import numpy as np

    cycles = differences.shape[-1]
    mean = differences.mean(-1)
    offset = offsets.mean(-1)
    away = offsets - offset[..., None]
    spread = (away**2).sum(-1)
    if cycles < POSITION_PAIRS or not spread.all():
        return mean, differences.std(-1, ddof=1) / np.sqrt(cycles), cycles - 1
    slope = (differences * away).sum(-1) / spread
    left = differences - mean[..., None] - slope[..., None] * away
    variance = (left**2).sum(-1) / (cycles - 2)
    return mean - slope * offset, np.sqrt(variance * (1 / cycles + offset**2 / spread)), cycles - 2


def latin_effects(
    logs: np.ndarray[Any, Any], positions: np.ndarray[Any, Any], baseline: int = 0
) -> tuple[Any, Any, int]:
    """Return the same quantities as `paired_effects`, but from a least-squares fit of cycle, arm and position.

    Args:
        logs: logarithms by campaign, cycle and arm; NaN for a missing cell; the same cells must be missing in all
            campaigns.
        positions: each cell's position, from 1, by cycle and arm; common to all campaigns.
        baseline: the arm that is subtracted.
    """
    import numpy as np

    cycles, arms = logs.shape[-2:]
    of_cycle = np.repeat(np.eye(cycles), arms, axis=0)
    of_arm = np.delete(np.tile(np.eye(arms), (cycles, 1)), baseline, axis=1)
    of_position = np.eye(arms)[positions.reshape(-1) - 1][:, 1:]
    design = np.hstack([of_arm, of_cycle, of_position])
    flat = logs.reshape(-1, cycles * arms)
    known = ~np.isnan(flat[0])
    design, flat = design[known], flat[:, known]
    inverse = np.linalg.pinv(design)
    found = flat @ inverse.T
    left = flat - found @ design.T
    degrees_of_freedom = int(known.sum() - np.linalg.matrix_rank(design))
    variance = (left**2).sum(-1) / max(1, degrees_of_freedom)
    spread = np.sqrt(np.diag(inverse @ inverse.T)[: arms - 1])
    means = np.insert(found[:, : arms - 1], baseline, 0.0, axis=1)
    errors = np.insert(np.sqrt(variance)[:, None] * spread, baseline, 0.0, axis=1)
    return means, errors, degrees_of_freedom


def expected_degrees_of_freedom(analysis: Analysis, cycles: int, arms: int) -> int:
    """Return the degrees of freedom of a campaign of at least two cycles in which no cell is missing."""
    if analysis == "latin":
        return max(1, (cycles - 2) * (arms - 1))
    return cycles - (2 if analysis == "position" and cycles >= POSITION_PAIRS else 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values, adjusted by Holm's step-down method, in their original order.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6
    (1979).
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for step, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - step) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def is_within(effect: Effect, margin: float, alpha: float = 1 - CONFIDENCE) -> bool:
    """Return whether two one-sided tests, each at level `alpha`, show that the ratio is within 1 ± margin.

    They do if the interval with confidence 1 - 2·alpha lies within 1 ± margin. Source: D. J. Schuirmann, A
    comparison of the two one-sided tests procedure and the power approach, J. Pharmacokinetics and Biopharmaceutics 15
    (1987).
    """
    half = t_quantile(1 - alpha, effect.degrees_of_freedom) * effect.error
    return math.log(1 - margin) < effect.mean - half and effect.mean + half < math.log(1 + margin)


def cycles_needed(mean: float, sd: float, confidence: float = CONFIDENCE, power: float = POWER) -> int | None:
    """Return the number of cycles needed to distinguish a mean from 0 with this power; None if above `MOST_CYCLES`.

    Args:
        mean: the mean difference of logarithms to detect.
        sd: the standard deviation of one cycle's difference.
        confidence: the confidence of the interval that must exclude 0.
        power: the probability that the interval excludes 0.
    """
    if sd == 0 or mean == 0:
        return 2 if mean else None

    def are_enough(cycles: int) -> bool:
        return abs(mean) / sd * math.sqrt(cycles) >= detectable_errors(confidence, power, cycles - 1)

    # If a number of cycles is enough, so is every larger number.
    cycles = 2 + bisect_left(range(2, MOST_CYCLES + 1), True, key=are_enough)
    return cycles if cycles <= MOST_CYCLES else None


def _effect(
    logs: Sequence[Sequence[float]],
    analysis: Analysis,
    positions: Sequence[Sequence[int]] | None,
    arm: int,
    baseline: int,
) -> Effect | None:
    """Return an arm's effect, or None if there are too few values to estimate their spread."""
    import numpy as np

    if analysis == "latin":
        means, errors, degrees_of_freedom = latin_effects(np.array([logs]), np.array(positions), baseline)
        if degrees_of_freedom >= 1:
            return Effect(float(means[0, arm]), float(errors[0, arm]), degrees_of_freedom)
    both = [i for i, row in enumerate(logs) if not math.isnan(row[arm]) and not math.isnan(row[baseline])]
    if len(both) < 2:
        return None
    differences = np.array([logs[i][arm] - logs[i][baseline] for i in both])
    # Without positions, the differences in position are treated as 0.
    offsets = np.zeros(len(both))
    if analysis == "position" and positions is not None:
        offsets = np.array([float(positions[i][arm] - positions[i][baseline]) for i in both])
    mean, error, degrees_of_freedom = position_effects(differences, offsets)
    return Effect(float(mean), float(error), degrees_of_freedom)


def _without_interval(logs: Sequence[Sequence[float]], arm: int, baseline: int, confidence: float) -> Contrast:
    differences = [row[arm] - row[baseline] for row in logs]
    known = [each for each in differences if not math.isnan(each)]
    ratio = math.exp(math.fsum(known) / len(known)) if known else None
    return Contrast(len(known), ratio, None, None, confidence, None, None, "cannot tell", None)


def _contrast(cycles: int, effect: Effect, confidence: float, p_adjusted: float, margin: float | None) -> Contrast:
    half = t_quantile(0.5 + confidence / 2, effect.degrees_of_freedom) * effect.error
    low, high = effect.mean - half, effect.mean + half
    verdict: Verdict = "less" if high < 0 else "more" if low > 0 else "cannot tell"
    if margin is not None and is_within(effect, margin, 1 - confidence):
        verdict = "the same"
    needed = None
    if verdict == "cannot tell":
        needed = cycles_needed(effect.mean, effect.error * math.sqrt(cycles), confidence)
    return Contrast(
        cycles=cycles,
        ratio=math.exp(effect.mean),
        ci_low=math.exp(low),
        ci_high=math.exp(high),
        confidence=confidence,
        p_value=_p_value(effect),
        p_adjusted=p_adjusted,
        verdict=verdict,
        cycles_needed=needed,
    )


def _p_value(effect: Effect) -> float:
    from scipy.special import stdtr

    if effect.error == 0:
        return 1.0 if effect.mean == 0 else 0.0
    return float(2 * stdtr(effect.degrees_of_freedom, -abs(effect.mean) / effect.error))
