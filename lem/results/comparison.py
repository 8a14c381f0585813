"""Compares measurements made at different times: those of experiments, campaigns or whole results directories.

    sides ─> cases that match ─> objections, ratios with intervals, what differs ─> limits (`--fail-if`)

The arms of one campaign are compared by `lem.results.campaign`, which pairs them cycle by cycle. Measurements made at
different times cannot be paired, so this module uses Welch's t-test. It does not know how results are stored or shown;
`lem.results.sides` reads the results.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from lem.errors import ResultsError, did_you_mean
from lem.quantities import percent
from lem.record import CodedWarning, Environment
from lem.results.campaign import LENGTHS_DIFFER, MEASURES
from lem.results.merging import is_estimated
from lem.results.schema import CycleRow, ExperimentRow
from lem.results.statistics import CONFIDENCE, t_quantile
from lem.warning_codes import warning

# What an interval is computed from: one value for each experiment, or one for each cycle of a single experiment.
Basis = Literal["experiments", "cycles"]
Outcome = Literal["passed", "failed", "cannot tell"]
PREFIX = "compare_"
# Parts of a configuration that do not change what is measured.
NOT_COMPARED = ("io",)
# Reasons against comparing two cases, as --allow names them. The last two concern only metrics of energy.
REASONS = (
    "board", "driver", "engine", "prompts", "lengths", "window", "throttled", "shared", "meter", "estimate",
)  # fmt: skip
OF_ENERGY = ("meter", "estimate")
# The beginnings of the names of metrics that are computed from energy.
ENERGY_METRICS = (
    "energy", "average_power", "gpu_energy", "cpu_energy", "dram_energy", "steady_energy", "steady_average_power",
)  # fmt: skip
SHARED_CODES = ("shared_hardware", "foreign_process", "server_shared", "energy_shared", "busy_host")
CUT_CODES = ("window_cut", "work_repeated", "queue_lost", "energy_partial", "machine_changed")
_LIMIT = re.compile(r"\s*([a-z][a-z0-9_]*)\s*([<>])\s*([+-]?)\s*(\d+(?:\.\d+)?)\s*%\s*")


@dataclass(frozen=True)
class Measured:
    """A completed experiment: its row, the rows of its cycles, and its environment if its records still exist."""

    row: ExperimentRow
    cycles: Sequence[CycleRow] = ()
    environment: Environment | None = None


@dataclass(frozen=True)
class Case:
    """Experiments with the same configuration; `key` identifies the case on every side, and `label` describes it."""

    key: str
    label: str
    experiments: Sequence[Measured]

    def rows(self) -> list[ExperimentRow]:
        """Return the experiments' rows."""
        return [each.row for each in self.experiments]


@dataclass(frozen=True)
class Side:
    """One side of a comparison, with its name as the user gave it; `left_out` counts incomplete runs."""

    name: str
    cases: Sequence[Case]
    left_out: int = 0


@dataclass(frozen=True)
class Ratio:
    """A side's value of a metric divided by the baseline's (geometric means), with an interval if there is one.

    If there is no interval, for example because a side has a single value, `basis` is None and `reason` says why.
    `is_estimate` means that the metric is computed from energy that, in at least one experiment, is estimated or
    simulated.
    """

    metric: str
    baseline_value: float | None
    value: float | None
    ratio: float | None
    ci_low: float | None
    ci_high: float | None
    confidence: float
    basis: Basis | None
    baseline_count: int
    count: int
    is_estimate: bool = False
    reason: str | None = None


@dataclass(frozen=True)
class Difference:
    """A value in which two cases differ; `where` says whether it belongs to the `config` or the `environment`.

    Only the first experiment of each case is examined.
    """

    where: str
    key: str
    baseline: str
    value: str


@dataclass(frozen=True)
class Comparison:
    """A case of one side, compared with its counterpart on the baseline's side."""

    side: str
    case: str
    baseline: str
    ratios: Sequence[Ratio]
    objections: Sequence[CodedWarning]
    notes: Sequence[CodedWarning]
    differences: Sequence[Difference]

    def ratio(self, metric: str) -> Ratio | None:
        """Return the ratio of a metric; None if it was not compared, or if neither side has a value for it."""
        return next((ratio for ratio in self.ratios if ratio.metric == metric), None)

    def against(self, metric: str, allowed: Iterable[str] = ()) -> list[CodedWarning]:
        """Return the objections to comparing a metric, except those that the user allows."""
        skipped = {*allowed, *(() if is_of_energy(metric) else OF_ENERGY)}
        return [each for each in self.objections if each.code.removeprefix(PREFIX) not in skipped]


@dataclass(frozen=True)
class Limit:
    """A limit on the change of a metric: `energy_per_output_token_j>+3%` fails if the metric rises by more than 3%."""

    text: str
    metric: str
    is_upper: bool
    ratio: float

    def judge(self, comparison: Comparison, allowed: Iterable[str] = ()) -> tuple[Outcome, str]:
        """Return whether a comparison passes this limit, and the reason in words.

        The outcome is `failed` if the whole interval is beyond the limit, and `passed` if none of it is. If the
        interval contains the limit, if there is no interval, or if the two cases cannot be compared, the outcome is
        `cannot tell`.
        """
        against = comparison.against(self.metric, allowed)
        if against:
            codes = ", ".join(dict.fromkeys(each.code.removeprefix(PREFIX) for each in against))
            return "cannot tell", f"not comparable ({codes})"
        found = comparison.ratio(self.metric)
        if found is None:
            return "cannot tell", f"neither side has a value for {self.metric}"
        if found.ci_low is None or found.ci_high is None:
            return "cannot tell", found.reason or "there is no interval"
        interval = f"{change(found.ci_low)} to {change(found.ci_high)}"
        words = f"the {percent(found.confidence)} interval of the change is {interval}"
        low, high = (found.ci_low, found.ci_high) if self.is_upper else (-found.ci_high, -found.ci_low)
        limit = self.ratio if self.is_upper else -self.ratio
        if low > limit:
            return "failed", words
        return ("passed" if high <= limit else "cannot tell"), words


def change(ratio: float) -> str:
    """Return a ratio as a change in percent: +3.1% for 1.031."""
    return f"{100 * (ratio - 1):+.3g}%"


def is_of_energy(metric: str) -> bool:
    """Return whether a metric is computed from energy, and therefore depends on the meter."""
    return metric.startswith(ENERGY_METRICS)


# ------------------------------------------------------------------ the request
def parse_limit(text: str) -> Limit:
    """Parse a limit, such as `energy_per_output_token_j>+3%` or `output_tokens_per_s<-5%`.

    Raises:
        ResultsError: the text has a different form, or there is no such metric.
    """
    match = _LIMIT.fullmatch(text)
    if match is None:
        raise ResultsError(
            f"--fail-if: '{text}' is not a limit; write a metric, > or <, and a change in percent, such as "
            "'energy_per_output_token_j>+3%'."
        )
    name, sign, direction, share = match.groups()
    ratio = 1 + float(f"{direction}{share}") / 100
    if ratio <= 0:
        raise ResultsError(f"--fail-if: '{text}': a value cannot fall by 100% or more.")
    return Limit(text.strip(), metric_named(name, "--fail-if"), sign == ">", ratio)


def metric_named(name: str, flag: str) -> str:
    """Return the column with the given name, whose parts may be in any order, such as energy_j_per_output_token.

    Raises:
        ResultsError: no column that can be compared has this name.
    """
    known = comparable_columns()
    parts = Counter(name.split("_"))
    found = [name] if name in known else [column for column in known if Counter(column.split("_")) == parts]
    if len(found) != 1:
        raise ResultsError(
            f"{flag}: '{name}' is not a metric that can be compared.{did_you_mean(name, known)} "
            "docs/reference/results.md lists the columns."
        )
    return found[0]


def comparable_columns() -> list[str]:
    """Return the columns that can be compared: those of `CycleRow` with a unit, except ratios such as `idle_share`."""
    from lem.results.parquet import schema

    skipped = ("_share", "_rate", "mfu")
    return [
        field.name
        for field in schema(CycleRow)
        if (field.metadata or {}).get(b"unit") is not None and not field.name.endswith(skipped)
    ]


def check_allowed(allowed: Iterable[str]) -> None:
    """Raise `ResultsError` if --allow names a reason that does not exist."""
    for reason in allowed:
        if reason not in REASONS:
            raise ResultsError(
                f"--allow: '{reason}' is not one of {', '.join(REASONS)}.{did_you_mean(reason, REASONS)}"
            )


# ------------------------------------------------------------------ the comparison
def comparisons(sides: Sequence[Side], metrics: Sequence[str] = ()) -> list[Comparison]:
    """Compare every side with the first one, case by case.

    If the first side and another one have a single case each, these are compared even if their keys differ. Otherwise,
    cases with the same key are compared.

    Args:
        sides: at least two sides.
        metrics: metrics to compare in addition to those that a campaign reports.

    Raises:
        ResultsError: no case of the first side has a counterpart.
    """
    first = sides[0]
    pairs = [(side, base, other) for side in sides[1:] for base, other in _matched(first, side)]
    if not pairs:
        raise ResultsError(
            f"{first.name} and {', '.join(side.name for side in sides[1:])} have no configuration in common. To "
            "compare different configurations, name one experiment on each side."
        )
    # The intervals are widened so that all intervals of a metric hold jointly.
    each = 1 - (1 - CONFIDENCE) / len(pairs)
    wanted = list(dict.fromkeys([*MEASURES, *metrics]))
    return [
        Comparison(
            side=side.name,
            case=other.label,
            baseline=first.name,
            ratios=[found for metric in wanted if (found := _ratio(metric, base, other, each)) is not None],
            objections=list(objections(base, other)),
            notes=list(_notes(base, other)),
            differences=list(differences(base, other)),
        )
        for side, base, other in pairs
    ]


def unmatched(sides: Sequence[Side]) -> Iterator[str]:
    """Yield a sentence for each side with cases that have no counterpart."""
    first = sides[0]
    for side in sides[1:]:
        pairs = list(_matched(first, side))
        for one, other, used in ((first, side, [b for b, _ in pairs]), (side, first, [o for _, o in pairs])):
            lacking = [case.label for case in one.cases if case not in used]
            if lacking:
                yield f"Only in {one.name}, not in {other.name}: {', '.join(lacking)}."


def _matched(first: Side, side: Side) -> Iterator[tuple[Case, Case]]:
    if len(first.cases) == 1 and len(side.cases) == 1:
        yield first.cases[0], side.cases[0]
        return
    others = {case.key: case for case in side.cases}
    for base in first.cases:
        if base.key in others:
            yield base, others[base.key]


def _ratio(metric: str, base: Case, other: Case, confidence: float) -> Ratio | None:
    """Return the ratio of a metric, or None if neither case has a value for it."""
    values = [[getattr(row, metric) for row in case.rows()] for case in (base, other)]
    if not any(value is not None for side in values for value in side):
        return None
    basis, repeated = _repeated(metric, base, other, values)
    before, after = (_geometric_mean(side) for side in values)
    center = low = high = None
    reason = None
    if before is not None and after is not None:
        center = after / before
    if lacking := sum(not _is_positive(value) for side in repeated for value in side):
        verb = "has" if lacking == 1 else "have"
        reason = f"{lacking} of the {basis} {verb} no positive value for {metric}"
    elif center is None:
        reason = f"one side has no value for {metric}"
    elif (half := _half_width([[math.log(v) for v in side if v] for side in repeated], confidence)) is None:
        reason = "an interval needs at least two experiments, or one with several cycles, on each side"
    else:
        low, high = center * math.exp(-half), center * math.exp(half)
    return Ratio(
        metric=metric,
        baseline_value=before,
        value=after,
        ratio=center,
        ci_low=low,
        ci_high=high,
        confidence=confidence,
        basis=None if low is None else basis,
        baseline_count=len(repeated[0]),
        count=len(repeated[1]),
        is_estimate=is_of_energy(metric) and (_has_estimates(base) or _has_estimates(other)),
        reason=reason,
    )


def _has_estimates(case: Case) -> bool:
    return any(is_estimated(row.energy_source) for row in case.rows())


def _repeated(
    metric: str, base: Case, other: Case, values: Sequence[Sequence[float | None]]
) -> tuple[Basis, Sequence[Sequence[float | None]]]:
    """Return what the interval is based on, and each side's values.

    There is one value for each experiment or, if each side is a single experiment with several cycles, for each cycle.
    """
    if len(base.experiments) == len(other.experiments) == 1:
        cycles = [case.experiments[0].cycles for case in (base, other)]
        if all(len(side) > 1 for side in cycles):
            return "cycles", [[getattr(cycle, metric) for cycle in side] for side in cycles]
    return "experiments", values


def _geometric_mean(values: Sequence[float | None]) -> float | None:
    if not all(map(_is_positive, values)):
        return None
    return math.exp(math.fsum(math.log(value) for value in values if value) / len(values))


def _is_positive(value: float | None) -> bool:
    """Return whether a value is known and greater than 0, so that it has a logarithm."""
    return value is not None and value > 0


def _half_width(sides: Sequence[Sequence[float]], confidence: float) -> float | None:
    """Return half the width of the interval for a difference between two means; None if a side has a single value.

    The variances of the two sides may differ. Source: B. L. Welch, The generalization of "Student's" problem when
    several different population variances are involved, Biometrika 34 (1947).
    """
    if any(len(side) < 2 for side in sides):
        return None
    squares = []
    for side in sides:
        mean = math.fsum(side) / len(side)
        squares.append(math.fsum((value - mean) ** 2 for value in side) / (len(side) - 1) / len(side))
    total = sum(squares)
    if total == 0:
        return 0.0
    degrees = total**2 / sum(s**2 / (len(side) - 1) for s, side in zip(squares, sides, strict=True))
    return t_quantile(0.5 + confidence / 2, degrees) * math.sqrt(total)


# ------------------------------------------------------------------ objections
def objections(base: Case, other: Case) -> Iterator[CodedWarning]:
    """Yield the reasons against comparing two cases; each reason says what was found on each side."""
    yield from _places_differ(base, other)
    yield from _work_differs(base, other)
    yield from _conditions_differ(base, other)
    yield from _meters_differ(base, other)


def _places_differ(base: Case, other: Case) -> Iterator[CodedWarning]:
    boards = [_values(case, lambda row: (row.hostname, row.device)) for case in (base, other)]
    if boards[0] != boards[1]:
        words = [", ".join(f"{d or 'no device'} in {h or 'an unknown machine'}" for h, d in side) for side in boards]
        yield warning("compare_board", _apart("the machine or the device differs", words))
    elif all(uuids := [_gpus(case) for case in (base, other)]) and uuids[0] != uuids[1]:
        # Two GPUs of the same type, whose sensors may differ.
        yield warning("compare_board", _apart("the GPU differs", [", ".join(side) for side in uuids]))
    drivers = [
        list(dict.fromkeys(e.environment.driver_version for e in case.experiments if e.environment))
        for case in (base, other)
    ]
    if all(drivers) and set(drivers[0]) != set(drivers[1]):
        words = [", ".join(driver or "none" for driver in side) for side in drivers]
        yield warning("compare_driver", _apart("the GPU driver differs", words))
    engines = [_values(case, lambda row: f"{row.backend} ({row.engine_version or '–'})") for case in (base, other)]
    if engines[0] != engines[1]:
        yield warning(
            "compare_engine", _apart("the engine or its version differs", [", ".join(side) for side in engines])
        )


def _gpus(case: Case) -> list[str]:
    """Return the UUIDs of the GPUs that were used, as far as the environments are known."""
    states = [state for each in case.experiments if each.environment for state in each.environment.devices_before]
    return sorted({state.uuid for state in states})


def _work_differs(base: Case, other: Case) -> Iterator[CodedWarning]:
    prompts = [_values(case, lambda row: row.prompts_sha256) for case in (base, other)]
    if prompts[0] != prompts[1]:
        words = [", ".join(digest[:12] for digest in side) for side in prompts]
        yield warning("compare_prompts", _apart("the prompts differ (digests)", words))
    lengths = [_mean_length(case) for case in (base, other)]
    known = [length for length in lengths if length is not None]
    if len(known) == 2 and max(known) > (1 + LENGTHS_DIFFER) * min(known):
        words = [f"{length:.4g}" for length in known]
        yield warning("compare_lengths", _apart("the mean number of output tokens per request differs", words))
    traffic = [_values(case, lambda row: row.arrival_rate_per_s is not None) for case in (base, other)]
    if traffic[0] != traffic[1]:
        words = [" and ".join("with arrivals" if has else "all requests at once" for has in side) for side in traffic]
        yield warning("compare_window", _apart("the windows differ", words))


def _conditions_differ(base: Case, other: Case) -> Iterator[CodedWarning]:
    if text := _on_one_side(base, other, CUT_CODES, "only one side has windows that were cut or repeated"):
        yield warning("compare_window", text)
    if text := _on_one_side(base, other, ("throttled",), "only one side was throttled"):
        yield warning("compare_throttled", text)
    if text := _on_one_side(base, other, SHARED_CODES, "only one side shared its hardware"):
        yield warning("compare_shared", text)


def _on_one_side(base: Case, other: Case, codes: Sequence[str], what: str) -> str | None:
    """Return an objection's text if only one side has warnings with these codes, else None."""
    found = [_with_codes(case, codes) for case in (base, other)]
    if bool(found[0]) == bool(found[1]):
        return None
    return _apart(what, [", ".join(side) or "none" for side in found])


def _meters_differ(base: Case, other: Case) -> Iterator[CodedWarning]:
    estimated = [_has_estimates(case) for case in (base, other)]
    if estimated[0] != estimated[1]:
        words = ["an estimate" if each else "a measurement" for each in estimated]
        yield warning("compare_estimate", _apart("the energy is an estimate on one side only", words))
    meters = [
        _values(case, lambda row: (row.energy_source, row.energy_scope, row.energy_components))
        for case in (base, other)
    ]
    if meters[0] != meters[1]:
        words = [", ".join("/".join(part or "none" for part in meter) for meter in side) for side in meters]
        yield warning("compare_meter", _apart("the source, scope or components of the energy differ", words))


def _apart(what: str, sides: Sequence[str]) -> str:
    return f"{what}: {sides[0]} on the baseline's side, {sides[1]} on the other."


def _notes(base: Case, other: Case) -> Iterator[CodedWarning]:
    """Yield warnings that readers of a comparison need to know, but that do not rule out the comparison."""
    if len(base.experiments) == len(other.experiments) == 1 and len(base.experiments[0].cycles) > 1:
        yield warning(
            "compare_within_run",
            "each side is a single experiment, so the intervals cover the variation between its cycles only, not the "
            "variation from run to run.",
        )
    if _has_estimates(base) and _has_estimates(other):
        yield warning(
            "compare_estimated", "the energy of both sides is an estimate, so the ratios of energy are estimates too."
        )
    codes = Counter(text.partition(":")[0] for case in (base, other) for row in case.rows() for text in row.warnings)
    if codes:
        words = ", ".join(f"{code} ({count})" for code, count in codes.most_common())
        yield warning("compare_warned", f"the experiments have warnings: {words}.")


def _values(case: Case, of: Any) -> list[Any]:
    """Return the distinct values of a case's rows, in a fixed order."""
    return sorted({of(row) for row in case.rows()}, key=repr)


def _mean_length(case: Case) -> float | None:
    requests = sum(row.requests_completed for row in case.rows())
    return sum(row.output_tokens for row in case.rows()) / requests if requests else None


def _with_codes(case: Case, codes: Sequence[str]) -> list[str]:
    found = (text.partition(":")[0] for row in case.rows() for text in row.warnings)
    return sorted({code for code in found if code in codes})


# ------------------------------------------------------------------ differences
def differences(base: Case, other: Case) -> Iterator[Difference]:
    """Yield the values of configuration, machine and software in which the first experiments of two cases differ."""
    for where, of in (("config", _config), ("environment", _surroundings)):
        sides = [of(case.experiments[0]) for case in (base, other)]
        for key in dict.fromkeys([*sides[0], *sides[1]]):
            before, after = (side.get(key, "–") for side in sides)
            if before != after:
                yield Difference(where, key, before, after)


def config_of(row: ExperimentRow) -> dict[str, Any]:
    """Return an experiment's configuration as nested data, without the parts that do not change what is measured."""
    return dict(_parsed(row.config_json))


@lru_cache(maxsize=256)  # thousands of experiments share a few configurations, or each has its own and no cache helps
def _parsed(text: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(text) if text else {}
    return {key: value for key, value in values.items() if key not in NOT_COMPARED}


def _config(measured: Measured) -> dict[str, str]:
    return dict(_flat(config_of(measured.row)))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "null" if value is None else str(value)


def _surroundings(measured: Measured) -> dict[str, str]:
    row, around = measured.row, measured.environment
    known: dict[str, Any] = {
        name: getattr(row, name)
        for name in ("hostname", "device", "engine_version", "lem_version", "dtype", "slurm_node", "energy_source")
    }
    if around is not None:
        known |= {
            "os": around.os,
            "cpu_model": around.cpu_model,
            "cpu_governor": around.cpu_governor,
            "driver_version": around.driver_version,
            "cuda_version": around.cuda_version,
            "git_commit": around.git_commit,
            "gpus": ", ".join(around.gpus),
            **{f"versions.{name}": version for name, version in around.versions.items()},
        }
    return {name: str(value) for name, value in known.items() if value not in (None, "")}
