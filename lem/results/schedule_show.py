"""Shows a schedule's results as text: its runs, the means by time of day and weekday, the verdicts, and warnings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from lem.quantities import percent, plain, quantity
from lem.results import show
from lem.results.campaign_show import HEADS as OF_CAMPAIGNS
from lem.results.merging import is_estimated
from lem.results.schedule import Start
from lem.results.schedule_answer import ENERGIES, MEASURES, PRIMARY, Answer, Found, Run
from lem.results.variation import LEVEL, POWER, Level, Variation

# If there are more runs than this, only the last ones are shown.
MOST_RUNS = 100
# Each metric's header and unit, as in a campaign's table of arms.
HEADS = {**OF_CAMPAIGNS, "co2e_g": ("CO2e", "gCO2e")}
# The metrics that the tables of means show besides the primary metric. Only the primary metric has its interval shown.
ALSO_SHOWN = ("output_tokens_per_s", "co2e_g")
# The first column of the two tables of means.
FACTORS = {"time of day": "time", "weekday": "weekday"}


def show_answer(answer: Answer) -> None:
    """Print the results of a schedule."""
    manifest = answer.manifest
    show.say(f"Schedule {manifest.name}: {len(manifest.starts)} runs planned, {manifest.counts()}")
    show.say(f"{manifest.config.words}; times in {manifest.time_zone}, until {_clock(manifest.ends_at)}")
    print()
    _show_runs(answer)
    for arm in answer.arms:
        for factor in FACTORS:
            _show_means(answer, arm, factor)
    print()
    for sentence in sentences(answer):
        show.say(sentence)
    if answer.warnings:
        print()
        show.print_pairs(("Warning", f"{note.code}: {note.text}") for note in answer.warnings)


# ------------------------------------------------------------------ sentences
def sentences(answer: Answer) -> Iterator[str]:
    """Yield each arm's verdicts on the primary metric, by time of day and by weekday, then a sentence on the tests."""
    primary = [each for each in answer.found if each.is_primary]
    for found in primary:
        for variation in (found.by_time, found.by_weekday):
            yield sentence(found, variation)
    tests = sum(one.result is not None for found in primary for one in (found.by_time, found.by_weekday))
    if tests:
        adjusted = f"adjusted for {tests} tests by Holm's method and " if tests > 1 else ""
        counted = "means are geometric, and the runs of a slot on one day count as one value"
        yield f"The p-values are {adjusted}compared with {percent(LEVEL)}; {counted}."


def sentence(found: Found, variation: Variation) -> str:
    """Describe how a metric varies, with its verdict."""
    words = MEASURES[found.measure][1] + (f" of {found.arm}" if found.arm else "")
    what = f"{words[0].upper()}{words[1:]}"
    if variation.result is None:
        return f"{what} by {variation.factor}: cannot tell ({variation.reason})."
    test = variation.result
    shown = f"{variation.test}, F({test.numerator}, {test.denominator}) = {test.statistic:.3g}"
    p_value = f"p = {variation.p_adjusted:.2g}"
    repeats = f"repeats differ by {percent(_rounded(variation.error_share))} (standard deviation)"
    if variation.verdict == "varies":
        by_mean = sorted(variation.levels, key=lambda level: level.mean)
        extremes = f"{by_mean[-1].name} has {variation.ratio:.3f} times the value of {by_mean[0].name}"
        return f"{what} varies with the {variation.factor}: {extremes}, and {repeats} ({p_value}; {shown})."
    text = f"{what} varies with the {variation.factor} no more than repeats do: {repeats} ({p_value}; {shown})."
    detectable = variation.detectable
    if detectable is None:
        return text
    levels = "times of day" if variation.factor == "time of day" else "weekdays"
    difference = percent(_rounded(detectable - 1))
    return (
        f"{text} A difference of {difference} between one half of the {levels} and the other would "
        f"have been found with a probability of {percent(POWER)}."
    )


def _rounded(share: float | None) -> float:
    return float(f"{share or 0.0:.2g}")


# ------------------------------------------------------------------ tables
def _show_runs(answer: Answer) -> None:
    from rich.table import Table

    arms = answer.arms or [""]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for head in ("run", "planned", "started", "late", "status"):
        table.add_column(head, justify="right" if head in ("run", "late") else "left", no_wrap=True)
    for arm in arms:
        table.add_column(show.cell(arm) or HEADS[PRIMARY][0], justify="right")
    table.add_column("reason", overflow="fold")
    shown = answer.runs[-MOST_RUNS:]
    for run in shown:
        values = [_value(run, arm) for arm in arms]
        table.add_row(*_cells(run.start), *values, show.cell(run.start.error or ""))
    show.print_table(table)
    if len(shown) < len(answer.runs):
        print(f"Only the last {len(shown)} of {len(answer.runs)} runs are listed; --json lists all.")


def _cells(start: Start) -> tuple[str, ...]:
    style = show.STATUS_STYLE.get({"done": "completed"}.get(start.status, start.status))
    status = f"[{style}]{start.status}[/]" if style else start.status
    started = _started(start) if start.started_at else show.NOT_MEASURED
    return str(start.number), _clock(start.planned_at), started, quantity(start.late_s, "s", 3), status


def _clock(text: str) -> str:
    """Return a time as text, without seconds if they are 0.

    The UTC offset distinguishes the two times of 02:30 on a day on which the clocks are set back.
    """
    at = datetime.fromisoformat(text)
    seconds = f":{at:%S}" if at.second else ""
    return f"{at:%a %Y-%m-%d %H:%M}{seconds} {at:%z}"


def _started(start: Start) -> str:
    """Return when a run started: only the time of day if it was on the planned day."""
    at = datetime.fromisoformat(start.started_at or "")
    is_same_day = at.date() == datetime.fromisoformat(start.planned_at).date()
    return f"{at:%H:%M:%S}" if is_same_day else _clock(at.isoformat())


def _value(run: Run, arm: str) -> str:
    sources = "+".join(row.energy_source for row in run.rows.get(arm, ()) if row.energy_source)
    return _written(PRIMARY, run.value(arm, PRIMARY), sources or None)


def _show_means(answer: Answer, arm: str, factor: str) -> None:
    from rich.table import Table

    own = {each.measure: each for each in answer.found if each.arm == arm}
    primary = _variation(own[PRIMARY], factor)
    measures = [measure for measure in ALSO_SHOWN if measure in own and _variation(own[measure], factor).levels]
    levels = primary.levels or (_variation(own[measures[0]], factor).levels if measures else ())
    if not levels or (factor == "weekday" and len(levels) < 2):
        return
    print()
    if arm:
        print(f"{arm}:")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    heads = (FACTORS[factor], "runs", "days", HEADS[PRIMARY][0], "95% interval", *(HEADS[m][0] for m in measures))
    for head in heads:
        table.add_column(head, justify="left" if head == FACTORS[factor] else "right", no_wrap=True)
    by_name = {measure: {level.name: level for level in _variation(own[measure], factor).levels} for measure in own}
    for level in levels:
        of_primary = by_name[PRIMARY].get(level.name)
        means = [_mean(own[measure], by_name[measure].get(level.name)) for measure in measures]
        table.add_row(
            level.name, str(level.runs), str(level.days), _mean(own[PRIMARY], of_primary),
            _interval(of_primary), *means,
        )  # fmt: skip
    show.print_table(table)


def _variation(found: Found, factor: str) -> Variation:
    return found.by_time if factor == "time of day" else found.by_weekday


def _mean(found: Found, level: Level | None) -> str:
    return _written(found.measure, level.mean if level else None, found.source)


def _interval(level: Level | None) -> str:
    if level is None or level.ci95_low is None or level.ci95_high is None:
        return show.NOT_MEASURED
    return f"{quantity(level.ci95_low, 'J', 4)} – {quantity(level.ci95_high, 'J', 4)}".replace(" ", show.NO_BREAK)


def _written(measure: str, value: float | None, source: str | None) -> str:
    if value is None:
        return show.NOT_MEASURED
    unit = HEADS[measure][1]
    text = quantity(value, unit, 4) if unit else plain(value)
    mark = show.ESTIMATE if measure in ENERGIES and is_estimated(source) else ""
    return f"{mark}{text}".replace(" ", show.NO_BREAK)


# ------------------------------------------------------------------ JSON
def as_plain(answer: Answer) -> dict[str, Any]:
    """Return a schedule's results as plain data, for programs."""
    manifest = answer.manifest
    return {
        "schedule": manifest.name,
        "id": manifest.id,
        "created_at": manifest.created_at,
        "ends_at": manifest.ends_at,
        "time_zone": manifest.time_zone,
        "primary": PRIMARY,
        "level": LEVEL,
        "runs": [_run(run) for run in answer.runs],
        "measures": [_found(each) for each in answer.found],
        "sentences": list(sentences(answer)),
        "warnings": [{"code": note.code, "text": note.text} for note in answer.warnings],
    }


def _run(run: Run) -> dict[str, Any]:
    fields: Sequence[str] = run.start.__struct_fields__
    own = {name: getattr(run.start, name) for name in fields}
    values = [
        {"experiment_id": row.experiment_id, "arm": arm or None} | {name: getattr(row, name) for name in MEASURES}
        for arm, rows in run.rows.items()
        for row in rows
    ]
    return own | {"experiments": values}


def _found(found: Found) -> dict[str, Any]:
    return {
        "measure": found.measure,
        "unit": MEASURES[found.measure][0],
        "arm": found.arm or None,
        "is_primary": found.is_primary,
        "source": found.source,
        "mean": "geometric",
        "variations": [asdict(one) | {"detectable": one.detectable} for one in (found.by_time, found.by_weekday)],
    }
