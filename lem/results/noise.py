"""The noise of a machine, from a campaign that measures one configuration as two arms: any difference is noise.

This module works on the cells of an ordinary campaign. A value that the data cannot support is None, with a reason.
Ratios are compared as logarithms, as in a campaign's results. The module knows nothing about how a cell is run or
shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lem.results.campaign import MEASURES, SUSPICIOUS, Answer, CellEntry, PairRow, detectable_ratio
from lem.results.compare import expected_degrees_of_freedom, holm
from lem.results.merging import is_estimated
from lem.results.statistics import CONFIDENCE, Line, line_through, sd_limit, summarize, t_quantile
from lem.results.stopping import ANALYSES
from lem.warning_codes import WARNINGS

# With two pairs, there is a single degree of freedom, and the ends of the standard deviation's 95% interval differ by
# a factor of 70.
LEAST_PAIRS = 3
# With six cells, a line through them leaves four degrees of freedom, and a line through all but the first cell leaves
# three.
LEAST_CELLS = 6
# With fewer cells, a correlation between neighboring cells is not significant unless it exceeds 0.6.
LEAST_NEIGHBORS = 10
PERMUTATIONS = 2000
# The numbers of cycles for which the detectable difference is shown.
EXAMPLES = (3, 5, 10, 20)
# If more cycles than this are needed, the advice is to reduce the machine's noise.
MOST_CYCLES = 100
# The noise measured in a few cycles may be too low by chance. Campaigns are therefore planned with the noise's upper
# limit at this confidence, so that the same share of them have at least the planned power: R. H. Browne, On the use of
# a pilot sample for sample size determination, Statistics in Medicine 14 (1995).
PLANNING_CONFIDENCE = 0.8
# The cells' warnings that a longer warm-up can prevent.
OF_WARM_UP = ("warmup_not_steady", "compiled_in_window", "high_variation", "temperature_drift")
# The cells' warnings about other causes of noise, keyed by the name of the advice that they lead to.
OTHER_CAUSES = {
    "window": ("short_window", "few_ticks", "short_steady_state"),
    "machine": ("foreign_process", "shared_hardware", "throttled", "busy_host"),
}
# A percentage below this is shown only as "under" this value.
LEAST_PERCENT = 0.01
# The smallest gap to recommend, in seconds.
LEAST_GAP_S = 10.0


@dataclass(frozen=True)
class Floor:
    """The noise of one metric: the standard deviation of the log ratio of two cells in the same cycle.

    If `sd` is small, it is almost equal to the relative standard deviation of the ratio. `low` and `high` are the ends
    of the 95% interval of `sd`, and `planning` is the upper confidence limit of `sd` that is used to plan campaigns.
    Each item of `finds` is a number of cycles and the smallest difference (as a ratio minus 1) that this many cycles
    detect with a probability of 80%. If there are too few pairs, or if all of them have the same ratio, these values
    are missing, and `reason` says why.
    """

    measure: str
    pairs: int
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    planning: float | None = None
    finds: tuple[tuple[int, float], ...] = ()
    reason: str | None = None


class Tested:
    """An effect that may be due to chance alone; its p-value is None if the effect could not be tested."""

    p_value: float | None

    @property
    def is_seen(self) -> bool:
        """Whether the effect is significant, so that chance alone would rarely produce it."""
        return self.p_value is not None and self.p_value < SUSPICIOUS


@dataclass(frozen=True)
class Change(Tested):
    """A change in the primary metric, as a ratio minus 1, with its 95% interval, or the reason why it is unknown.

    `p_value` is for the hypothesis of no change, and is adjusted for the number of tests (Holm).
    """

    n: int
    change: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Correlation(Tested):
    """The correlation `r` of successive cells, after removing any trend, or the reason why it is unknown."""

    n: int
    r: float | None = None
    p_value: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Advice:
    """A recommendation: its subject, the setting to use, and the reason."""

    about: str
    setting: str
    why: str


@dataclass(frozen=True)
class Noise:
    """The noise of a machine, found in a campaign that compares one configuration with itself.

    `drift` is the change over the whole campaign, and `drift_per_cycle` is the same change per cycle. `first` compares
    the first cell with a line through all other cells. `position` compares the second cell of a cycle with the first,
    after removing the drift between them.
    """

    answer: Answer
    difference: float
    floors: tuple[Floor, ...]
    pair: PairRow | None
    drift: Change
    drift_per_cycle: Change
    first: Change
    position: Change
    neighbors: Correlation
    advice: tuple[Advice, ...]
    is_estimate: bool

    @property
    def floor(self) -> Floor:
        """The noise of the primary metric."""
        primary = self.answer.definition.campaign.primary
        return next(floor for floor in self.floors if floor.measure == primary)

    @property
    def is_false_alarm(self) -> bool:
        """Whether the campaign's verdict is that its two arms differ, although both are the same configuration."""
        return self.pair is not None and self.pair.verdict in ("less", "more")


def _too_few(n: int, noun: str, purpose: str, least: int) -> str:
    counted = f"{n} {noun}{'s' * (n != 1)}{' of cells' * (noun == 'pair')}"
    return f"{counted} {'is' if n == 1 else 'are'} too few for {purpose}; at least {least} are needed"


def percent(share: float, sign: str = "") -> str:
    """Return a share as a percentage, to two significant digits or, from 10% up, as a whole number.

    `sign="+"` gives positive values a plus sign. A value closer to 0 than 0.01%, but not 0, becomes "under 0.01%".
    """
    value = 100 * share
    if abs(value) < LEAST_PERCENT:
        return f"{'0' if value == 0 else f'under {LEAST_PERCENT:g}'}%"
    return f"{value:{sign}.0f}%" if abs(value) >= 10 else f"{value:{sign}.2g}%"


def noise_of(answer: Answer, difference: float) -> Noise:
    """Return the noise found in the completed cells of a campaign whose two arms are the same configuration.

    Args:
        answer: the campaign's results.
        difference: the smallest difference, as a ratio minus 1, that later campaigns should detect.
    """
    primary = answer.definition.campaign.primary
    cells = [(cell, math.log(value)) for cell in _by_time(answer.cells) if (value := _value(cell, primary))]
    drift, per_cycle = _drift(cells)
    neighbors = _neighbors([value for _, value in cells])
    drift, first, position, neighbors = _adjusted(drift, _first(cells), _position(answer.cells, primary), neighbors)
    noise = Noise(
        answer=answer,
        difference=difference,
        floors=tuple(_floor(answer, measure) for measure in MEASURES if measure == primary or _has(answer, measure)),
        pair=next((pair for pair in answer.pairs if pair.is_primary), None),
        drift=drift,
        drift_per_cycle=replace(per_cycle, p_value=drift.p_value),
        first=first,
        position=position,
        neighbors=neighbors,
        advice=(),
        is_estimate=_is_estimate(answer, primary),
    )
    return replace(noise, advice=tuple(_advice(noise)))


def _by_time(cells: Sequence[CellEntry]) -> list[CellEntry]:
    """Return the completed cells in the order in which they ran; a retried cell ran later than planned."""
    ran = [(cell.row.started_at, number, cell) for number, cell in enumerate(cells) if cell.row is not None]
    return [cell for *_, cell in sorted(ran)]


def _value(cell: CellEntry, measure: str) -> float | None:
    return None if cell.row is None else getattr(cell.row, measure)


def _has(answer: Answer, measure: str) -> bool:
    return any(_value(cell, measure) for cell in answer.cells)


def _is_estimate(answer: Answer, measure: str) -> bool:
    rests_on_energy = measure.startswith(("energy", "average_power"))
    return rests_on_energy and any(is_estimated(c.row.energy_source) for c in answer.cells if c.row is not None)


def _pairs(cells: Sequence[CellEntry], measure: str) -> dict[int, tuple[float, float]]:
    """Return the logarithms of the first and second cells' values, for each cycle in which both cells have a value."""
    values = {(cell.cycle, cell.position): value for cell in cells if (value := _value(cell, measure))}
    cycles = sorted({cycle for cycle, _ in values})
    both = {c: (values[c, 1], values[c, 2]) for c in cycles if (c, 1) in values and (c, 2) in values}
    return {cycle: (math.log(first), math.log(second)) for cycle, (first, second) in both.items()}


# ------------------------------------------------------------------ the floor
def _floor(answer: Answer, measure: str) -> Floor:
    ratios = [second - first for first, second in _pairs(answer.cells, measure).values()]
    n = len(ratios)
    if n == 0:
        return Floor(measure, 0, reason=f"no cycle has a value for {measure} in both cells")
    if n < LEAST_PAIRS:
        return Floor(measure, n, reason=_too_few(n, "pair", "a standard deviation", LEAST_PAIRS))
    sd = summarize(ratios).sd
    if not sd:
        return Floor(measure, n, reason="all pairs of cells have the same ratio, so no noise is visible")
    return Floor(
        measure=measure,
        pairs=n,
        sd=sd,
        low=sd_limit(sd, n - 1, (1 - CONFIDENCE) / 2),
        high=sd_limit(sd, n - 1, 0.5 + CONFIDENCE / 2),
        planning=sd_limit(sd, n - 1, PLANNING_CONFIDENCE),
        finds=tuple((cycles, finds(sd, cycles)) for cycles in EXAMPLES),
    )


def finds(sd: float, cycles: int) -> float:
    """Return the smallest difference, as a ratio minus 1, that this many cycles detect with a probability of 80%.

    Args:
        sd: the standard deviation of the log ratio of two cells in a cycle.
        cycles: the number of cycles, at least two, with their cells in the default order.
    """
    degrees_of_freedom = expected_degrees_of_freedom(ANALYSES["shuffled"], cycles, arms=2)
    return detectable_ratio(sd / math.sqrt(2), cycles, degrees_of_freedom) - 1


def cycles_for(sd: float, difference: float) -> int | None:
    """Return how many cycles, at least `LEAST_PAIRS`, are needed to detect a difference; None if over `MOST_CYCLES`."""
    enough = (n for n in range(LEAST_PAIRS, MOST_CYCLES + 1) if finds(sd, n) <= difference)
    return next(enough, None)


# ------------------------------------------------------------------ what changes
def _drift(cells: Sequence[tuple[CellEntry, float]]) -> tuple[Change, Change]:
    """Return the change over the campaign and per cycle, from a straight line through the cells in order of time."""
    n = len(cells)
    line = line_through([float(i) for i in range(n)], [value for _, value in cells]) if n >= LEAST_CELLS else None
    if line is None:
        too_few = Change(n, reason=_too_few(n, "cell", "a trend", LEAST_CELLS))
        return too_few, too_few
    of_cycle = len(cells) / len({cell.cycle for cell, _ in cells})
    return _of_line(line, n - 1, n), _of_line(line, of_cycle, n)


def _of_line(line: Line, over: float, n: int) -> Change:
    low, high = (line.slope - line.half_width) * over, (line.slope + line.half_width) * over
    return Change(n, math.expm1(line.slope * over), math.expm1(low), math.expm1(high), line.p_value)


def _first(cells: Sequence[tuple[CellEntry, float]]) -> Change:
    """Compare the first cell with the prediction of a line through all other cells, using a prediction interval."""
    n = len(cells)
    if n < LEAST_CELLS:
        return Change(n, reason=_too_few(n, "cell", "comparing the first with the others", LEAST_CELLS))
    places, others = [float(i) for i in range(1, n)], [value for _, value in cells[1:]]
    line = line_through(places, others)
    assert line is not None
    middle, spread = (
        n / 2,
        (n - 2) * (n - 1) * n / 12,
    )  # the mean and the sum of squared deviations of the places 1 to n - 1
    predicted = math.fsum(others) / (n - 1) - line.slope * middle
    error = line.error * math.sqrt(spread + spread / (n - 1) + middle**2)
    return _tested(cells[0][1] - predicted, error, line.degrees_of_freedom, n)


def _position(cells: Sequence[CellEntry], measure: str) -> Change:
    """Compare the second cell of a cycle with the first, after removing the drift between them.

    The drift from one cell to the next is half the drift from cycle to cycle, which is estimated from the means of the
    cycles. A cycle's mean is independent of the difference between its two cells. The variance of the drift is
    therefore added to the variance of the mean difference (Welch and Satterthwaite).
    """
    pairs = _pairs(cells, measure)
    if len(pairs) < LEAST_PAIRS:
        return Change(len(pairs), reason=_too_few(len(pairs), "pair", "comparing positions", LEAST_PAIRS))
    found = summarize([second - first for first, second in pairs.values()])
    of_cycles = line_through([float(cycle) for cycle in pairs], [math.fsum(both) / 2 for both in pairs.values()])
    assert found.mean is not None
    assert of_cycles is not None
    variances = [(found.sd or 0.0) ** 2 / found.n, (of_cycles.error / 2) ** 2]
    freedom = [found.n - 1, of_cycles.degrees_of_freedom]
    error = math.sqrt(sum(variances))
    parts = sum(variance**2 / n for variance, n in zip(variances, freedom, strict=True))
    degrees_of_freedom = math.floor(error**4 / parts) if parts else found.n - 1
    return _tested(found.mean - of_cycles.slope / 2, error, max(1, degrees_of_freedom), found.n)


def _tested(mean: float, error: float, degrees_of_freedom: int, n: int) -> Change:
    from scipy.special import stdtr

    half = t_quantile(0.5 + CONFIDENCE / 2, degrees_of_freedom) * error
    p_value = float(2 * stdtr(degrees_of_freedom, -abs(mean) / error)) if error else 1.0
    return Change(n, math.expm1(mean), math.expm1(mean - half), math.expm1(mean + half), p_value)


def _neighbors(values: Sequence[float]) -> Correlation:
    """Return the correlation between successive cells, after removing any trend, tested by permuting the residuals."""
    import numpy as np

    n = len(values)
    if n < LEAST_NEIGHBORS:
        return Correlation(n, reason=_too_few(n, "cell", "correlating neighbors", LEAST_NEIGHBORS))
    places = np.arange(n, dtype=float)
    left = np.array(values) - np.polyval(np.polyfit(places, np.array(values), 1), places)
    squares = float(left @ left)
    if squares == 0:
        return Correlation(n, reason="all cells have the same value")
    shuffled = np.random.default_rng(0).permuted(np.tile(left, (PERMUTATIONS, 1)), axis=1)
    by_chance = (shuffled[:, :-1] * shuffled[:, 1:]).sum(axis=1) / squares
    r = float(left[:-1] @ left[1:]) / squares
    further = int((abs(by_chance - by_chance.mean()) >= abs(r - by_chance.mean())).sum())
    return Correlation(n, r, (1 + further) / (1 + PERMUTATIONS))


def _adjusted(
    drift: Change, first: Change, position: Change, neighbors: Correlation
) -> tuple[Change, Change, Change, Correlation]:
    """Return the changes and the correlation with p-values adjusted for testing several effects (Holm)."""
    known = [each.p_value for each in (drift, first, position, neighbors) if each.p_value is not None]
    adjusted = iter(holm(known))
    changes = [
        each if each.p_value is None else replace(each, p_value=next(adjusted)) for each in (drift, first, position)
    ]
    if neighbors.p_value is not None:
        neighbors = replace(neighbors, p_value=next(adjusted))
    return changes[0], changes[1], changes[2], neighbors


# ------------------------------------------------------------------ what to do
def _advice(noise: Noise) -> Iterator[Advice]:
    yield _cycles(noise)
    yield _gap(noise)
    yield _warm_up(noise)
    yield from filter(None, (_of_warnings(noise, about, codes) for about, codes in OTHER_CAUSES.items()))


def _cycles(noise: Noise) -> Advice:
    floor, wanted = noise.floor, f"{percent(noise.difference)}"
    if floor.sd is None or floor.planning is None:
        return Advice("cycles", "not known", f"{floor.reason}.")
    cycles = cycles_for(floor.planning, noise.difference)
    planned = f"up to {percent(floor.planning)} (its upper limit, at {percent(PLANNING_CONFIDENCE)} confidence)"
    if cycles is None:
        why = (
            f"with noise of {planned}, even {MOST_CYCLES} cycles would not detect a difference of {wanted}; reduce the "
            "machine's noise first."
        )
        return Advice("cycles", f"more than {MOST_CYCLES}", why)
    why = f"with noise of {planned}, this detects a difference of {wanted} with a probability of at least 80%."
    return Advice("cycles", f"--cycles {cycles}", why)


def _gap(noise: Noise) -> Advice:
    gap_s = noise.answer.definition.campaign.config_gap_s
    longer = f"--config-gap {max(2 * gap_s, LEAST_GAP_S):g}"
    again = "measure again to see whether this gap is long enough"
    if noise.position.is_seen:
        assert noise.position.change is not None
        return Advice(
            "gap",
            longer,
            f"the second cell of a cycle differs from the first by {percent(noise.position.change, '+')}; {again}.",
        )
    if noise.neighbors.is_seen:
        return Advice("gap", longer, f"successive cells are correlated (r = {noise.neighbors.r:.2f}); {again}.")
    unknown = noise.position.reason or noise.neighbors.reason
    keep = f"--config-gap {gap_s:g}, unchanged"
    if unknown is not None:
        return Advice("gap", keep, f"nothing suggests a longer gap, but {unknown}.")
    return Advice("gap", keep, "the preceding cell has no visible effect.")


def _warm_up(noise: Noise) -> Advice:
    if noise.first.is_seen:
        assert noise.first.change is not None
        why = f"the first cell differs from the others by {percent(noise.first.change, '+')}, as on a cold machine."
        return Advice("warm-up", "a longer warm-up (--warmup-prompts), or an extra first cell that is not counted", why)
    if noise.drift.is_seen:
        assert noise.drift.change is not None
        why = f"the metric changes by {percent(noise.drift.change, '+')} over the campaign."
        return Advice("warm-up", WARNINGS["campaign_trend"].remedy.rstrip("."), why)
    if warned := _of_warnings(noise, "warm-up", OF_WARM_UP):
        return warned
    unknown = noise.first.reason or noise.drift.reason
    if unknown is not None:
        return Advice("warm-up", "unchanged", f"nothing suggests a longer warm-up, but {unknown}.")
    return Advice("warm-up", "unchanged", "neither a trend nor an unusual first cell is visible.")


def _of_warnings(noise: Noise, about: str, codes: Sequence[str]) -> Advice | None:
    """Return advice on the first of the given warnings that most cells have; None if most cells have none of them."""
    rows = [cell.row for cell in noise.answer.cells if cell.row is not None]
    for code in codes:
        count = sum(any(text.startswith(f"{code}:") for text in row.warnings) for row in rows)
        if 2 * count > len(rows):
            why = f"{count} of {len(rows)} cells have the warning {code}."
            return Advice(about, WARNINGS[code].remedy.rstrip("."), why)
    return None
