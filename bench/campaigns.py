"""Measures the coverage of a campaign's intervals, and its rate of false alarms, in simulated campaigns.

Run with `python -m nox -s accuracy`. The benchmark applies the functions of `lem campaign` to arms that do not differ,
with independent noise, a level that the cells of a cycle share, and a machine that drifts. It prints four tables: two
of campaigns with a fixed number of cycles, one of adaptive campaigns of two arms, and one of adaptive campaigns of
several arms. It fails if coverage or false alarms are outside their limits. In the first two tables, the structures
`interleaved` and `grouped` have no limits. They show how a drift spoils the intervals if the order is always the same.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.calibrate import Looks, looks, stopped
from lem.results.compare import POSITION_PAIRS, Analysis, latin_effects, position_effects
from lem.results.statistics import t_quantile
from lem.results.stopping import ANALYSES, level_for, levels, rule_of
from lem.spec.campaign import FEWEST_ADAPTIVE_CYCLES, Campaign, Structure
from lem.studies.orders import order

# This seed differs from the seed of the calibration.
SEED = 20_261_127
ORDERS, EACH = 1_000, 40
# The standard deviation of the logarithm of one cell's value, and that of the level that the cells of a cycle share.
# The drift is so large, compared with the smaller noise, that it makes the intervals of shuffled campaigns of three
# cycles too wide.
NOISES, OF_CYCLE, DRIFT = (0.03, 0.01), 0.03, 0.10
COVERAGE, FALSE_ALARMS = (0.94, 0.96), 0.055
# For several arms: the noise of one cell, in units of the requested half-width, and the factor by which one arm may be
# noisier.
CELL_NOISES = (0.6, 0.8, 1.0, 1.2, 1.5, 2.0, 2.5)
NOISIER = 3.0
# The numbers of arms to simulate, by structure. Latin campaigns of two arms have the same level as shuffled ones.
JOINT: dict[Structure, tuple[int, ...]] = {"shuffled": (3, 4, 6), "latin": (2, 4), "interleaved": (4,)}
OUT = "  OUT OF RANGE"


@dataclass(frozen=True)
class Design:
    """The order of a campaign's cells, as arrays with a row for each cycle and a column for each arm.

    `positions` holds each cell's position in its cycle, counted from 1. `when` holds the time at which each cell is
    measured, from 0 for the campaign's first cell to 1 for its last.
    """

    positions: np.ndarray[Any, Any]
    when: np.ndarray[Any, Any]

    @classmethod
    def drawn(cls, structure: Structure, arms: int, cycles: int, seed: int) -> Design:
        """Return the order that `lem campaign` would choose."""
        places = order(structure, arms, cycles, seed)
        positions, when = np.zeros((cycles, arms), int), np.zeros((cycles, arms))
        for i, place in enumerate(places):
            positions[place.cycle - 1, place.arm] = place.position
            when[place.cycle - 1, place.arm] = i / (len(places) - 1)
        return cls(positions, when)


def effects(
    analysis: Analysis, logs: np.ndarray[Any, Any], positions: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], int]:
    """Return means and standard errors for each campaign and each arm but the first, and the degrees of freedom.

    Args:
        analysis: how the position in the cycle is treated.
        logs: the logarithms of the values, by campaign, cycle and arm.
        positions: the positions in the cycle, by cycle and arm.
    """
    if analysis == "latin":
        means, errors, degrees_of_freedom = latin_effects(logs, positions)
        return means[:, 1:], errors[:, 1:], degrees_of_freedom
    differences = np.moveaxis(logs[..., 1:] - logs[..., :1], 2, 1)
    offsets = (positions[:, 1:] - positions[:, :1]).T * (1.0 if analysis == "position" else 0.0)
    return position_effects(differences, np.broadcast_to(offsets, differences.shape))


@dataclass(frozen=True)
class Found:
    """The results of simulated campaigns of one kind."""

    coverage: float
    false_alarms: float
    half_width: float


def simulate(structure: Structure, arms: int, cycles: int, drift: float, noise: float) -> Found:
    """Simulate campaigns with a fixed number of cycles, in which the arms do not differ.

    Args:
        structure: the order of the cells.
        arms: the number of arms.
        cycles: the number of cycles.
        drift: the steady rise of the machine's level from the first cell to the last.
        noise: the standard deviation of the logarithm of one cell's value.
    """
    rng = np.random.default_rng(SEED)
    covered, alarms, widths = [], [], []
    for seed in range(ORDERS):
        design = Design.drawn(structure, arms, cycles, seed)
        logs = rng.normal(0, noise, (EACH, cycles, arms)) + rng.normal(0, OF_CYCLE, (EACH, cycles, 1))
        logs += np.log1p(drift * design.when)
        means, errors, degrees_of_freedom = effects(ANALYSES[structure], logs, design.positions)
        half = t_quantile(0.975, degrees_of_freedom) * errors[:, 0]
        covered.append(np.abs(means[:, 0]) <= half)
        widths.append(half)
        each = 1 - 0.05 / (arms - 1)
        alarms.append((np.abs(means) > t_quantile(0.5 + each / 2, degrees_of_freedom) * errors).any(1))
    return Found(float(np.mean(covered)), float(np.mean(alarms)), float(np.mean(widths)))


def fixed_designs() -> bool:
    """Print the coverage of campaigns with a fixed number of cycles; return whether all are within their limits."""
    good = True
    for noise in NOISES:
        print(f"campaigns without a difference, {ORDERS * EACH} each: noise {noise:.0%}, between cycles {OF_CYCLE:.0%}")
        heads = ("arms", "cycles", "drift", "coverage", "false alarms", "half-width")
        print(f"{'structure':<12}" + "".join(f"{head:>13}" for head in heads))
        for structure in ("shuffled", "latin", "interleaved", "grouped"):
            for arms in (2, 4):
                for cycles in (3, 5, 10):
                    for drift in (0.0, DRIFT):
                        found = simulate(structure, arms, cycles, drift, noise)
                        bad = _is_out_of_range(found, structure, cycles, drift, noise)
                        good &= not bad
                        print(
                            f"{structure:<12}{arms:13}{cycles:13}{drift:13.0%}{found.coverage:13.1%}"
                            f"{found.false_alarms:13.1%}{found.half_width:13.1%}{OUT if bad else ''}",
                            flush=True,
                        )
        print()
    return good


def _is_out_of_range(found: Found, structure: Structure, cycles: int, drift: float, noise: float) -> bool:
    """Return whether a row of the first two tables is outside its limits.

    In a shuffled campaign that is too short to fit a line to the positions, a drift counts as noise. If the drift is
    much larger than the noise, the intervals are too wide, and coverage may be above 96%.
    """
    if structure not in ("shuffled", "latin"):
        return False
    is_wide = structure == "shuffled" and cycles < POSITION_PAIRS and drift > 0 and noise < max(NOISES)
    lowest, highest = COVERAGE
    return not lowest <= found.coverage <= (1.0 if is_wide else highest) or found.false_alarms > FALSE_ALARMS


def until_narrow() -> bool:
    """Print the coverage of adaptive campaigns of two arms; return whether it is within its limits.

    Each row is for the noise with the lowest coverage. For comparison, the table also shows campaigns that stop as soon
    as an ordinary 95% interval is narrow enough, and the number of cycles after which the ordinary 95% intervals of a
    fixed design are narrow enough on average.
    """
    print(f"adaptive campaigns of two arms, {ORDERS * EACH} each, at the noise with the lowest coverage")
    heads = ("cycles", "level", "noise", "coverage", "mean cycles", "95% level", "mean cycles", "fixed design")
    print(f"{'structure':<12}" + "".join(f"{head:>13}" for head in heads))
    good = True
    everything = {
        analysis: looks(analysis, FEWEST_ADAPTIVE_CYCLES, max(each.most for each in levels()), ORDERS * EACH, SEED)
        for analysis in ("position", "paired")
    }
    for each in levels():
        if each.least < FEWEST_ADAPTIVE_CYCLES:
            continue
        found = everything[each.analysis].within(each.least, each.most)
        covers, cycles = stopped(found, each.level, each.worst_noise)
        plain, plain_cycles = stopped(found, 0.95, each.worst_noise)
        bad = not COVERAGE[0] <= covers.mean() <= COVERAGE[1]
        good &= not bad
        print(
            f"{'shuffled' if each.analysis == 'position' else 'interleaved':<12}{f'{each.least}–{each.most}':>13}"
            f"{each.level:13.2%}{each.worst_noise:13.2f}{covers.mean():13.1%}{cycles.mean():13.1f}{plain.mean():13.1%}"
            f"{plain_cycles.mean():13.1f}{_fixed(everything[each.analysis], each.worst_noise):>13}{OUT if bad else ''}",
            flush=True,
        )
    # A typical case: ratios that vary by 3% from cycle to cycle, and ±2% as the target.
    found, noise = everything["position"].within(5, 30), 0.03 / math.asinh(0.02)
    covers, cycles = stopped(found, level_for("position", 5, 30), noise)
    plain, plain_cycles = stopped(found, 0.95, noise)
    print(
        f"ratios that vary by 3%, until ±2%, 5 to 30 cycles, shuffled: {covers.mean():.1%} after "
        f"{cycles.mean():.1f} cycles on average (95% level: {plain.mean():.1%} after "
        f"{plain_cycles.mean():.1f}; fixed design: {_fixed(everything['position'], noise)})"
    )
    return good


def _fixed(found: Looks, noise: float) -> int | str:
    """Return the smallest number of cycles after which 95% intervals are narrow enough on average."""
    narrow = found.halves(0.95).mean(0) * noise <= 1
    return found.cycles[int(narrow.argmax())] if narrow.any() else f">{found.cycles[-1]}"


def several_arms() -> bool:
    """Print the false alarms of adaptive campaigns of several arms; return whether they are within their limit.

    The level is calibrated for one pair; with m pairs, each interval is computed at the level 1 - (1 - level) / m. This
    method is sound if false alarms stay below the limit at every noise, even if one arm is noisier than the others.
    """
    print(
        f"\nadaptive campaigns with a joint level, {ORDERS * EACH} each, 5 to 30 cycles, at the noise with the most "
        "false alarms"
    )
    heads = ("arms", "noisy arm", "noise", "coverage", "false alarms", "mean cycles")
    print(f"{'structure':<12}" + "".join(f"{head:>13}" for head in heads))
    good = True
    for structure, numbers in JOINT.items():
        for arms in numbers:
            # A latin design assumes that all arms are equally noisy.
            for noisier in (1.0,) if structure == "latin" else (1.0, NOISIER):
                noise, found, cycles = _worst(structure, arms, noisier)
                bad = found.coverage < COVERAGE[0] or found.false_alarms > FALSE_ALARMS
                good &= not bad
                print(
                    f"{structure:<12}{arms:13}{'yes' if noisier > 1 else 'no':>13}{noise:13.1f}{found.coverage:13.1%}"
                    f"{found.false_alarms:13.1%}{cycles:13.1f}{OUT if bad else ''}",
                    flush=True,
                )
    return good


def _worst(structure: Structure, arms: int, noisier: float) -> tuple[float, Found, float]:
    """Return the noise with the most false alarms, the results at that noise, and the mean number of cycles.

    The coverage in the results is the lowest of any pair.
    """
    rng = np.random.default_rng(SEED)
    rule = rule_of(Campaign(cycles=5, until_ci=0.02, max_cycles=30, structure=structure), arms)
    assert rule is not None
    means, errors = [], []
    degrees: list[int] = []
    scale = np.ones(arms)
    scale[-1] = noisier
    for seed in range(ORDERS):
        design = Design.drawn(structure, arms, rule.most, seed)
        logs = rng.normal(0, 1, (EACH, rule.most, arms)) * scale
        found = [effects(ANALYSES[structure], logs[:, :n], design.positions[:n]) for n in rule.looks]
        means.append(np.stack([mean for mean, _, _ in found], 1))
        errors.append(np.stack([error for _, error, _ in found], 1))
        degrees = [freedom for _, _, freedom in found]
    each = 1 - (1 - rule.level) / (arms - 1)
    halves = np.concatenate(errors) * np.array([[t_quantile(0.5 + each / 2, d)] for d in degrees])
    results = []
    for noise in CELL_NOISES:
        narrow = (halves * noise <= 1).all(2)
        narrow[:, -1] = True
        ends = narrow.argmax(1)
        rows = np.arange(len(ends))
        covers = np.abs(np.concatenate(means)[rows, ends]) <= halves[rows, ends]
        found_here = Found(float(covers.mean(0).min()), float(1 - covers.all(1).mean()), float(halves.mean()))
        results.append((noise, found_here, float(np.array(rule.looks)[ends].mean())))
    return max(results, key=lambda result: result[1].false_alarms)


def main() -> int:
    """Simulate and print all campaigns; return 1 if a limit is exceeded."""
    results = [check() for check in (fixed_designs, until_narrow, several_arms)]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
