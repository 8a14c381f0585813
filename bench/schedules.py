"""Measures how often the verdict on a schedule is right, in simulated schedules with and without a difference.

Run with `python -m nox -s accuracy`. The benchmark applies the functions of `lem results show SCHEDULE` to schedules
with log-normal noise, a level that the runs of a day share, and a difference between day (08:00 to 20:00) and night. It
prints a table, and fails if a verdict is right in less than 95% of the repetitions of a design that has a limit. The
designs without a limit show which schedules are too short for their noise, and how errors that last from one run to the
next affect the verdict.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import numpy as np

from lem.results.variation import Point, judged, variations

# The first day is a Monday. The seed differs from those of the other benchmarks.
BEGIN, SEED = datetime(2026, 3, 2, 3), 20_261_128
RIGHT = 0.95
# Repetitions of designs with a limit, and of the others.
TIMES, FEWER_TIMES = 10_000, 2_000
DIFFERENCE, OF_DAY = 0.05, 0.03
DAY = range(8, 20)
HOURS = {"12h": 12.0, "6h": 6.0, "3h": 3.0, "1h": 1.0, "5h": 5.0}
OUT = "  OUT OF RANGE"


@dataclass(frozen=True)
class Design:
    """A schedule: its interval and length; `lost` is the share of its runs that are missing, chosen at random."""

    interval: str
    days: int
    lost: float = 0.0

    @property
    def starts(self) -> list[datetime]:
        """The planned starts, in local time."""
        hours = HOURS[self.interval]
        return [BEGIN + timedelta(hours=i * hours) for i in range(int(self.days * 24 / hours))]


def share_right(
    design: Design, *, noise: float, of_day: float, difference: float, times: int, carried: float = 0.0
) -> float:
    """Return the share of simulated schedules whose verdict on the time of day is right.

    Args:
        design: the schedule.
        noise: the standard deviation of the logarithm of a run's value.
        of_day: the standard deviation of the level that the runs of a day share.
        difference: how much more a run costs by day than by night, as a share; if 0, no variation must be found.
        times: the number of schedules.
        carried: the correlation of the errors of two runs in a row.
    """
    starts = design.starts
    rng = np.random.default_rng(SEED)
    _, days = np.unique([at.date() for at in starts], return_inverse=True)
    by_day = np.array([at.hour in DAY for at in starts])
    right = "varies" if difference else "no variation found"
    hits = 0
    for _ in range(times):
        logs = math.log1p(difference) * by_day + rng.normal(0, of_day, days.max() + 1)[days]
        values = np.exp(logs + noise * _errors(rng, len(starts), carried))
        kept = rng.random(len(starts)) >= design.lost
        found = variations([Point(at, float(v)) for at, v, k in zip(starts, values, kept, strict=True) if k])
        hits += judged(found)[0].verdict == right
    return hits / times


def _errors(rng: np.random.Generator, count: int, carried: float) -> np.ndarray[Any, Any]:
    """Return errors of variance 1, each correlated with the one before it (a first-order autoregression)."""
    errors = rng.normal(size=count)
    for i in range(1, count if carried else 0):
        errors[i] = carried * errors[i - 1] + math.sqrt(1 - carried**2) * errors[i]
    return errors


@dataclass(frozen=True)
class Case:
    """A design with the noise of its runs; `is_limited` says whether the difference has to be found."""

    design: Design
    noise: float
    is_limited: bool = True
    carried: float = 0.0


CASES = (
    Case(Design("6h", 7), 0.02),
    Case(Design("6h", 7, lost=0.1), 0.02),
    Case(Design("6h", 7), 0.03, is_limited=False),
    Case(Design("3h", 7), 0.03),
    Case(Design("6h", 14), 0.03),
    Case(Design("12h", 14), 0.02),
    Case(Design("12h", 14), 0.03, is_limited=False),
    Case(Design("5h", 14), 0.02),
    Case(Design("6h", 7), 0.02, is_limited=False, carried=0.5),
    Case(Design("3h", 7), 0.02, is_limited=False, carried=0.5),
    Case(Design("1h", 7), 0.02, is_limited=False, carried=0.5),
    Case(Design("1h", 7), 0.02, is_limited=False, carried=0.9),
)


def main() -> int:
    """Print the table; return 1 if a share is below its limit."""
    print(f"Share of right verdicts; days differ by {OF_DAY:.0%} (standard deviation)")
    heads = f"{'schedules':>10} {'interval':>8} {'days':>5} {'lost':>5} {'noise':>6} {'carried':>8}"
    print(f"{heads} {'no difference':>14} {f'{DIFFERENCE:.0%} by day':>11}", flush=True)
    is_good = True
    for case in CASES:
        times = TIMES if case.is_limited else FEWER_TIMES
        shares = [
            share_right(
                case.design, noise=case.noise, of_day=OF_DAY, difference=difference, times=times, carried=case.carried
            )
            for difference in (0.0, DIFFERENCE)
        ]
        # With independent errors, false alarms must be rare even in a design that is too small for the difference.
        is_within = (shares[0] >= RIGHT or case.carried > 0) and (shares[1] >= RIGHT or not case.is_limited)
        is_good &= is_within
        of = case.design
        described = (
            f"{times:>10,} {of.interval:>8} {of.days:>5} {of.lost:>5.0%} {case.noise:>6.0%} {case.carried:>8.1f}"
        )
        print(f"{described} {shares[0]:>14.3f} {shares[1]:>11.3f}{'' if is_within else OUT}", flush=True)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
