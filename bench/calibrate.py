"""Calibrates the nominal levels of adaptive campaigns and writes them to lem/results/levels.json.

Run with `python -m nox -s calibrate`. The functions of `lem campaign` are applied to simulated campaigns of two arms
that do not differ. From the minimum number of cycles on, the interval is computed at a nominal level after every cycle,
and the campaign stops as soon as the interval is narrow enough. The calibrated level is the lowest one at which 95% of
the reported intervals contain the true ratio, even at the noise with the lowest coverage. The result depends only on
the seed and the number of repetitions.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lem.results import stopping
from lem.results.compare import CONFIDENCE, Analysis, position_effects
from lem.results.statistics import t_quantile
from lem.results.stopping import Level
from lem.studies.orders import order

SEED, REPETITIONS = 20_261_126, 200_000
# The number of different orders of shuffled campaigns, each simulated equally often.
ORDERS = 1_000
# The pairs of minimum and maximum numbers of cycles for which levels are calibrated. Users cannot choose a minimum of
# 3; these pairs serve only for comparison with known values.
LIMITS: dict[Analysis, tuple[tuple[int, int], ...]] = {
    "paired": ((3, 10), (3, 20), (5, 10), (5, 20), (5, 30), (5, 50), (5, 100), (8, 30), (10, 50), (10, 100)),
    "position": ((5, 10), (5, 20), (5, 30), (5, 50), (5, 100), (8, 30), (10, 50), (10, 100)),
}
# Standard deviations of the logarithm of one cycle's ratio, in units of the requested half-width. At the lowest one,
# nearly every campaign stops at once; at the highest one, nearly every campaign reaches its maximum number of cycles.
NOISES = tuple(float(noise) for noise in np.round(np.geomspace(0.5, 6.0, 31), 3))
FILE = Path(stopping.__file__).with_name(stopping.LEVELS)


@dataclass(frozen=True)
class Looks:
    """The estimates that simulated campaigns give after each of several cycles, for a noise of 1.

    `means` and `errors` have a row for each campaign and a column for each of `cycles`.
    """

    cycles: tuple[int, ...]
    means: np.ndarray[Any, Any]
    errors: np.ndarray[Any, Any]
    degrees_of_freedom: tuple[int, ...]

    def within(self, least: int, most: int) -> Looks:
        """Return the estimates after `least` to `most` cycles."""
        part = slice(self.cycles.index(least), self.cycles.index(most) + 1)
        return Looks(self.cycles[part], self.means[:, part], self.errors[:, part], self.degrees_of_freedom[part])

    def halves(self, level: float) -> np.ndarray[Any, Any]:
        """Return the half-width of each interval at a nominal level."""
        return self.errors * [t_quantile(0.5 + level / 2, each) for each in self.degrees_of_freedom]


def looks(analysis: Analysis, least: int, most: int, repetitions: int, seed: int) -> Looks:
    """Simulate campaigns of two arms that do not differ.

    Args:
        analysis: how the position in the cycle is treated; for `position`, orders of shuffled campaigns are drawn.
        least: the first cycle after which a campaign may stop.
        most: the last cycle.
        repetitions: the number of campaigns.
        seed: the seed of the noise.
    """
    rng = np.random.default_rng([seed, ("paired", "position").index(analysis)])
    differences = rng.normal(size=(repetitions, most))
    offsets = np.zeros(differences.shape)  # pairs without positions
    if analysis == "position":
        drawn = [_offsets(most, order_seed) for order_seed in range(min(ORDERS, repetitions))]
        offsets = np.resize(np.array(drawn), differences.shape)
    # A shorter campaign has the same first cycles, in the same order, as a longer one.
    found = [position_effects(differences[:, :n], offsets[:, :n]) for n in range(least, most + 1)]
    means, errors, degrees = zip(*found, strict=True)
    return Looks(tuple(range(least, most + 1)), np.stack(means, 1), np.stack(errors, 1), degrees)


def _offsets(cycles: int, seed: int) -> list[float]:
    """Return, for each cycle of a shuffled campaign of two arms, the second arm's position minus the first's."""
    return [float(2 * place.position - 3) for place in order("shuffled", 2, cycles, seed) if place.arm == 1]


def stopped(found: Looks, level: float, noise: float) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return, for each campaign, whether its interval contains the true ratio, and its number of cycles.

    Args:
        found: the campaigns.
        level: the nominal level at which intervals are computed.
        noise: the standard deviation of the logarithm of one cycle's ratio, in units of the requested half-width.
    """
    halves = found.halves(level)
    narrow = halves * noise <= 1
    narrow[:, -1] = True
    ends = narrow.argmax(1)[:, None]
    covers = np.abs(np.take_along_axis(found.means, ends, 1)) <= np.take_along_axis(halves, ends, 1)
    return covers[:, 0], np.array(found.cycles)[ends[:, 0]]


def calibrated(found: Looks, analysis: Analysis) -> Level:
    """Return the lowest level, to a hundredth of a percent, that gives at least 95% coverage at every noise."""
    # The noise with the lowest coverage at one level is among those with the lowest coverage at similar levels.
    near = sorted(NOISES, key=lambda noise: _coverage(found, 0.97, noise))[:8]
    low, high = 9_500, 9_999  # `high` is high enough, `low` is not
    while high - low > 1:
        middle = (low + high) // 2
        if min(_coverage(found, middle / 10_000, noise) for noise in near) >= CONFIDENCE:
            high = middle
        else:
            low = middle
    level = high / 10_000
    coverage, worst = min((_coverage(found, level, noise), noise) for noise in NOISES)
    return Level(analysis, found.cycles[0], found.cycles[-1], level, worst, round(coverage, 5))


def _coverage(found: Looks, level: float, noise: float) -> float:
    return float(stopped(found, level, noise)[0].mean())


def table(repetitions: int = REPETITIONS, seed: int = SEED) -> dict[str, Any]:
    """Return the calibrated levels, with the seed and the other values that they depend on."""
    levels = []
    for analysis, limits in LIMITS.items():
        least, most = min(each for each, _ in limits), max(each for _, each in limits)
        everything = looks(analysis, least, most, repetitions, seed)
        for first, last in limits:
            levels.append(calibrated(everything.within(first, last), analysis))
            print(f"{analysis}, {first} to {last} cycles: {levels[-1].level:.2%}", flush=True)
    return {
        "confidence": CONFIDENCE,
        "seed": seed,
        "repetitions": repetitions,
        "noises": NOISES,
        "levels": [asdict(each) for each in levels],
    }


def main() -> int:
    """Calibrate and write the table."""
    text = json.dumps(table(), indent=1)
    FILE.write_text(f"{text}\n", encoding="utf-8")
    print(f"Wrote {FILE.name}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
