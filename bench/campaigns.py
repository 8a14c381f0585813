"""Measures the coverage of a campaign's intervals, and its rate of false alarms, in simulated campaigns.

Run with `python -m nox -s accuracy`. It applies the functions of `lem campaign` to arms that do not differ, with
independent noise, a level that the cells of a cycle share, and a machine that drifts. Prints a table, and fails if
coverage or false alarms are outside their limits. The structures interleaved and grouped, which repeat the order, have
no limits; they are shown to warn against them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np

from lem.results.compare import latin_effects, paired_effects
from lem.results.statistics import t_quantile
from lem.spec.campaign import Structure
from lem.studies.orders import order

SEED = 20_261_126
ORDERS, EACH = 1_000, 20
NOISE, OF_CYCLE, DRIFT = 0.01, 0.03, 0.10
# If the machine drifts, a shuffled campaign counts the drift as noise, so its coverage may be above the nominal 95 %.
COVERAGE, FALSE_ALARMS = (0.94, 0.96), 0.055


@dataclass(frozen=True)
class Found:
    """The results of simulated campaigns of one kind: shares, and the mean half-width of the log-ratio's interval."""

    coverage: float
    false_alarms: float
    half_width: float


def simulate(structure: Structure, arms: int, cycles: int, drift: float) -> Found:
    """Simulate campaigns whose arms do not differ.

    Args:
        structure: the order of the cells.
        arms: the number of arms.
        cycles: the number of cycles.
        drift: the share by which the machine's level rises, linearly, from the first cell to the last.
    """
    rng = np.random.default_rng(SEED)
    covered, alarms, widths = [], [], []
    for seed in range(ORDERS):
        places = order(structure, arms, cycles, seed)
        positions, when = np.zeros((cycles, arms), int), np.zeros((cycles, arms))
        for i, place in enumerate(places):
            positions[place.cycle - 1, place.arm] = place.position
            when[place.cycle - 1, place.arm] = i / (len(places) - 1)
        logs = rng.normal(0, NOISE, (EACH, cycles, arms)) + rng.normal(0, OF_CYCLE, (EACH, cycles, 1))
        logs += np.log1p(drift * when)
        effects = latin_effects(logs, positions) if structure == "latin" else paired_effects(logs)
        means, errors, degrees_of_freedom = effects
        half = t_quantile(0.975, degrees_of_freedom) * errors[:, 1]
        covered.append(np.abs(means[:, 1]) <= half)
        widths.append(half)
        together = 1 - 0.05 / (arms - 1)
        alarms.append((np.abs(means) > t_quantile(0.5 + together / 2, degrees_of_freedom) * errors).any(1))
    return Found(float(np.mean(covered)), float(np.mean(alarms)), float(np.mean(widths)))


def main() -> int:
    """Simulate all kinds of campaigns and print a table; return 1 if a limit is exceeded."""
    print(f"campaigns without a difference, {ORDERS * EACH} each: noise {NOISE:.0%}, between cycles {OF_CYCLE:.0%}")
    heads = ("arms", "cycles", "drift", "coverage", "false alarms", "half-width")
    print(f"{'structure':<12}" + "".join(f"{head:>13}" for head in heads))
    within = True
    for structure in ("shuffled", "latin", "interleaved", "grouped"):
        for arms in (2, 4):
            for cycles in (3, 5, 10):
                for drift in (0.0, DRIFT):
                    found = simulate(structure, arms, cycles, drift)
                    print(
                        f"{structure:<12}{arms:13}{cycles:13}{drift:13.0%}{found.coverage:13.1%}"
                        f"{found.false_alarms:13.1%}{found.half_width:13.1%}"
                    )
                    if structure in ("shuffled", "latin"):
                        within &= found.coverage >= COVERAGE[0]
                        within &= found.coverage <= COVERAGE[1] or (structure == "shuffled" and drift > 0)
                        within &= found.false_alarms <= FALSE_ALARMS
    return int(not within)


if __name__ == "__main__":
    sys.exit(main())
