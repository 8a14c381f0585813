"""Mean, standard deviation, coefficient of variation and confidence interval of repeated measurements.

This module works on plain numbers. With fewer than two values, the spread is None, not 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Statistics of n values; the interval is Student's t-interval of the mean, with a confidence of 95%."""

    n: int
    mean: float | None
    sd: float | None
    cv: float | None
    ci95_low: float | None
    ci95_high: float | None


def summarize(values: Sequence[float]) -> Summary:
    """Summarize values; a mean needs at least one value, and a spread at least two.

    The standard deviation is the sample standard deviation (n - 1). The interval assumes independent, roughly normal
    values (Student 1908); consecutive cycles on a warm machine meet this assumption only approximately.
    """
    n = len(values)
    if n == 0:
        return Summary(0, None, None, None, None, None)
    mean = math.fsum(values) / n
    if n == 1:
        return Summary(1, mean, None, None, None, None)
    # statistics.stdev computes with fractions, which takes ten times as long.
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = t_quantile(0.5 + CONFIDENCE / 2, n - 1) * sd / math.sqrt(n)
    return Summary(n, mean, sd, sd / abs(mean) if mean else None, mean - half, mean + half)


# The quantiles of Student's t for a 95% interval with 1 to 9 degrees of freedom. They make scipy unnecessary for up to
# ten cycles; importing scipy takes longer than computing the rows of a thousand experiments. A test compares these
# values with scipy's.
_T_975 = (
    12.706204736432095, 4.302652729911275, 3.182446305284263, 2.7764451051977987, 2.570581835636314,
    2.4469118511449692, 2.3646242515927844, 2.306004135204166, 2.2621571627409915,
)  # fmt: skip


@cache
def t_quantile(probability: float, degrees_of_freedom: float) -> float:
    """Return a quantile of Student's t distribution; the degrees of freedom may be fractional, as in Welch's test."""
    if probability == 0.5 + CONFIDENCE / 2 and degrees_of_freedom in range(1, len(_T_975) + 1):
        return _T_975[int(degrees_of_freedom) - 1]
    from scipy.special import stdtrit  # imported in a fraction of the time that scipy.stats takes

    return float(stdtrit(degrees_of_freedom, probability))


@cache
def detectable_errors(confidence: float, power: float, degrees_of_freedom: int) -> float:
    """Return how many standard errors a mean must be from 0 for its interval to exclude 0 with this power.

    This is the noncentrality of Student's t. The tiny probability that the interval lies on the other side of 0 is not
    counted. Source: J. Cohen, Statistical Power Analysis for the Behavioral Sciences, 2nd ed. (1988), ch. 2.
    """
    from scipy.special import nctdtrinc

    return float(nctdtrinc(degrees_of_freedom, 1 - power, t_quantile(0.5 + confidence / 2, degrees_of_freedom)))


@dataclass(frozen=True)
class Line:
    """A straight line fitted by least squares: its slope, the slope's standard error, and the p-value for a slope of 0.

    If all values lie on the line, the error is 0 and the p-value is 1, because without noise nothing can be tested.
    """

    slope: float
    error: float
    degrees_of_freedom: int
    p_value: float

    @property
    def half_width(self) -> float:
        """Half of the slope's 95% interval (Student's t)."""
        return t_quantile(0.5 + CONFIDENCE / 2, self.degrees_of_freedom) * self.error


def line_through(places: Sequence[float], values: Sequence[float], means_taken: int = 1) -> Line | None:
    """Fit a straight line; None if there are too few values to estimate an error, or if all positions are the same.

    Args:
        places: the position of each value.
        values: the values; if they form several groups, the caller has subtracted each group's mean.
        means_taken: the number of means subtracted from the values, by the caller or by the fit; each costs a degree of
            freedom.
    """
    from scipy.special import stdtr

    n, degrees_of_freedom = len(places), len(places) - means_taken - 1
    mean = math.fsum(places) / n if n else 0.0
    spread = math.fsum((place - mean) ** 2 for place in places)
    if degrees_of_freedom < 1 or spread == 0:
        return None
    slope = math.fsum((place - mean) * value for place, value in zip(places, values, strict=True)) / spread
    level = math.fsum(values) / n
    rest = math.fsum((v - level - slope * (place - mean)) ** 2 for place, v in zip(places, values, strict=True))
    error = math.sqrt(rest / degrees_of_freedom / spread)
    p_value = float(2 * stdtr(degrees_of_freedom, -abs(slope) / error)) if error else 1.0
    return Line(slope, error, degrees_of_freedom, p_value)


def sd_limit(sd: float, degrees_of_freedom: int, confidence: float) -> float:
    """Return the upper confidence limit of the true standard deviation, for normally distributed values.

    The sample variance follows a scaled chi-squared distribution (Cochran 1934).
    """
    from scipy.special import chdtri

    return sd * math.sqrt(degrees_of_freedom / float(chdtri(degrees_of_freedom, confidence)))


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return a percentile of values in ascending order (at least one), interpolating linearly between neighbors."""
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
