"""Shows a campaign's results as text: a table of arms, a sentence for each pair, a forest plot, and its warnings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lem.quantities import percent, plain, quantity
from lem.record import CodedWarning
from lem.results import show
from lem.results.campaign import MEASURES, SUSPICIOUS, Answer, ArmRow, PairRow
from lem.results.merging import is_estimated
from lem.results.parquet import names

# The width of the interval plot if there is no terminal, and the least and greatest width on a terminal.
PLOT_WIDTH, LEAST_PLOT_WIDTH, MOST_PLOT_WIDTH = 41, 21, 81
# The space between names, plot and ratios.
GAP = 2
# Each metric's header in the table of arms, and the unit of its values; values under "per token" in J mean J/token.
HEADS = {
    "energy_per_output_token_j": ("per token", "J"),
    "energy_per_request_j": ("per request", "J"),
    "output_tokens_per_s": ("tokens/s", ""),
    "latency_mean_s": ("latency", "s"),
    "ttft_mean_s": ("TTFT", "s"),
    "average_power_w": ("power", "W"),
}


def show_answer(answer: Answer) -> None:
    """Print the results of a campaign."""
    campaign = answer.definition.campaign
    done = sum(cell.row is not None for cell in answer.cells)
    show.say(f"Campaign {answer.definition.name}: {done} of {len(answer.cells)} cells completed, {campaign.structure}")
    print()
    _show_arms(answer)
    for row in answer.arms:
        if row.is_primary and row.reason:
            show.say(f"{row.arm}: {row.reason}.")
    primary = [pair for pair in answer.pairs if pair.is_primary]
    print()
    for sentence in sentences(answer):
        show.say(sentence)
    if any(pair.ci_low is not None for pair in primary):
        print()
        for line in forest(primary, show.terminal_width()):
            print(line)
    if answer.spread is not None:
        print()
        for sentence in on_nodes(answer):
            show.say(sentence)
    if answer.warnings:
        print()
        show.print_pairs(("Warning", f"{note.code}: {note.text}") for note in answer.warnings)


def sentences(answer: Answer) -> Iterator[str]:
    """Yield a sentence on each pair's primary metric or on why there are no pairs, and on how the campaign ended."""
    campaign = answer.definition.campaign
    words = MEASURES[campaign.primary][1]
    primary = [pair for pair in answer.pairs if pair.is_primary]
    if not primary:
        yield f"No cell has a value for {words} ({campaign.primary}), so the arms cannot be compared by it."
    for pair in primary:
        yield _why_no_ratio(answer, pair) or sentence(pair, campaign.structure, campaign.margin)
    known = sum(pair.ci_low is not None for pair in primary)
    if known > 1:
        which = "Both" if known == 2 else f"All {known}"
        yield f"{which} intervals hold jointly with a confidence of 95% (Bonferroni)."
    yield from _how_it_ended(answer)


def _why_no_ratio(answer: Answer, pair: PairRow) -> str | None:
    """If a pair has no ratio because one of its arms has no mean, return a sentence that says so; otherwise None."""
    if pair.ratio is not None:
        return None
    reasons = {row.arm: row.reason for row in answer.arms if row.is_primary}
    lacking = [arm for arm in (pair.arm, pair.baseline) if reasons.get(arm)]
    if not lacking:
        return None
    return (
        f"{pair.arm} cannot be compared with {pair.baseline}, because {lacking[0]} has no {MEASURES[pair.measure][1]} "
        f"({reasons[lacking[0]]})."
    )


def on_nodes(answer: Answer) -> Iterator[str]:
    """Yield sentences on how much the primary metric differs between the nodes and boards of a cluster."""
    found, definition = answer.spread, answer.definition
    if found is None:
        return
    words, names = MEASURES[definition.campaign.primary][1], [arm.name for arm in definition.arms]
    yield f"The cycles ran on the nodes {', '.join(found.nodes)} ({', '.join(found.boards)})."
    for by, sd_log in (("node", found.node_sd_log), ("board", found.board_sd_log)):
        if sd_log is not None:
            yield f"From {by} to {by}, {words} varies by a factor of {math.exp(sd_log):.3f} (standard deviation)."
    for each in found.ratios if len(found.boards) > 1 else ():
        where = f"{each.board} ({', '.join(each.nodes)}; {each.cycles} cycle{'s' if each.cycles != 1 else ''})"
        interval = "no interval"
        if each.ci_low is not None and each.ci_high is not None:
            interval = f"95% interval {each.ci_low:.4g}–{each.ci_high:.4g}"
        yield f"The ratio of {names[each.arm]} to {definition.baseline} on {where} is {each.ratio:.4g} ({interval})."
    for test in found.interactions:
        differs = "differs" if test.p_adjusted < SUSPICIOUS else "does not differ noticeably"
        yield (
            f"The ratio of {names[test.arm]} to {definition.baseline} {differs} between {test.by}s "
            f"(p = {test.p_adjusted:.2g})."
        )


def _how_it_ended(answer: Answer) -> Iterator[str]:
    """Yield sentences that say how an adaptive campaign ended and what its nominal level is."""
    rule = answer.definition.rule
    if rule is None:
        return
    target = f"the half-width of each interval{{}} is at most {percent(rule.half_width)} of its ratio"
    if not answer.ended:
        begun = "1 cycle has" if answer.cycles_begun == 1 else f"{answer.cycles_begun} cycles have"
        yield (
            f"The campaign is adaptive and not over: {begun} begun (minimum {rule.least}, maximum {rule.most}). It "
            f"stops as soon as {target.format('')}."
        )
    elif any(note.code == "campaign_limit_reached" for note in answer.warnings):
        yield (
            f"The campaign is adaptive and reached its limit of {rule.most} cycles before "
            f"{target.format('').replace(' is ', ' was ')}."
        )
    elif any(cell.given_up and cell.arm == answer.definition.baseline for cell in answer.cells):
        yield (
            f"The campaign is adaptive and stopped after {answer.cycles} cycles, because the baseline was given up: no "
            "interval could become narrower."
        )
    else:
        arms = " of the arms that were not given up" if any(cell.given_up for cell in answer.cells) else ""
        yield (
            f"The campaign is adaptive and stopped after {answer.cycles} cycles ({rule.least} to {rule.most} were "
            f"allowed), because {target.format(arms)}."
        )
    jointly = " jointly" if len(answer.definition.arms) > 2 else ""
    yield (
        f"Its intervals{jointly} have a nominal level of {percent(rule.level)}, so that they contain the true ratio in "
        "95% of campaigns, although the data decide when to stop. There are no p-values."
    )


def sentence(pair: PairRow, structure: str, margin: float | None = None) -> str:
    """Describe a pair's ratio, with its interval and verdict; ratios within 1 ± `margin` count as the same."""
    words = MEASURES[pair.measure][1]
    if pair.ratio is None:
        return f"{pair.arm} and {pair.baseline} have no cycle in common, so they cannot be compared."
    verb = "needs" if pair.measure.startswith("energy") else "has"
    claim = f"{pair.arm} {verb} {pair.ratio:.3g} times the {words} of {pair.baseline}"
    cycles = f"{pair.cycles} cycle{'s' if pair.cycles != 1 else ''}"
    if pair.ci_low is None or pair.ci_high is None:
        return f"{claim} ({cycles}, {structure}): cannot tell, because an interval needs at least two cycles."
    digits = _digits(pair.ci_low, pair.ci_high)
    level = percent(pair.confidence)
    claim = f"{pair.arm} {verb} {pair.ratio:.{digits}f} times the {words} of {pair.baseline}"
    interval = f"{level} interval {pair.ci_low:.{digits}f}–{pair.ci_high:.{digits}f}"
    return f"{claim} ({interval}, {cycles}, {structure}): {_verdict(pair, margin)}."


def _verdict(pair: PairRow, margin: float | None) -> str:
    p_value = "" if pair.p_adjusted is None else f" (p = {pair.p_adjusted:.2g})"
    if pair.verdict == "cannot tell":
        if pair.cycles_needed is None:
            return f"cannot tell{p_value}; more cycles would hardly help"
        return f"cannot tell{p_value}; about {pair.cycles_needed} cycles would be needed"
    if pair.verdict == "the same":  # no p-value, because it is for a ratio of 1, not for equivalence
        return f"the same within ±{percent(margin)}" if margin else "the same"
    return f"{pair.verdict}{p_value}"


def _digits(low: float, high: float) -> int:
    """Return the number of decimal places, at least 2 and at most 6, needed to show a tenth of an interval's width."""
    width = high - low
    return min(6, max(2, 1 - math.floor(math.log10(width)))) if width > 0 else 2


def forest(pairs: Sequence[PairRow], width: int | None = None) -> Iterator[str]:
    """Yield a line for each pair's interval on a logarithmic scale, then a line with labels for 1 and the scale's ends.

    Args:
        pairs: the pairs to draw.
        width: the width of the terminal; None if there is none. If names and plot do not fit side by side, each name
            stands above its interval.
    """
    from rich.cells import cell_len

    known = [(pair.arm, pair.ratio, pair.ci_low, pair.ci_high) for pair in pairs]
    drawn = [(arm, ratio, one, other) for arm, ratio, one, other in known if ratio and one and other]
    ends = [math.log(value) for _, _, *both in drawn for value in both]
    low, high = min(0.0, *ends), max(0.0, *ends)
    if low == high:
        return
    names, ratios = max(cell_len(arm) for arm, *_ in drawn), max(len(f"{ratio:.3f}") for _, ratio, *_ in drawn)
    plot = PLOT_WIDTH if width is None else min(MOST_PLOT_WIDTH, width - names - ratios - 2 * GAP)
    is_stacked = plot < LEAST_PLOT_WIDTH
    if is_stacked and width is not None:
        plot = max(LEAST_PLOT_WIDTH, min(MOST_PLOT_WIDTH, width - GAP))
    indent = " " * (GAP if is_stacked else names + GAP)

    def place(ratio: float) -> int:
        return round((math.log(ratio) - low) / (high - low) * (plot - 1))

    for arm, ratio, one, other in drawn:
        line = [" "] * plot
        line[place(1.0)] = "│"
        for at in range(place(one), place(other) + 1):
            line[at] = "─"
        line[place(one)], line[place(other)], line[place(ratio)] = "├", "┤", "●"
        if is_stacked:
            yield f"{arm}  {ratio:.3f}"
            yield f"{indent}{''.join(line).rstrip()}"
        else:
            yield f"{arm}{' ' * (names - cell_len(arm))}  {''.join(line)}  {ratio:.3f}"
    labels = {place(1.0): "1"} | _ends(math.exp(low), math.exp(high), place)
    yield indent + _scale(labels, plot if is_stacked else plot + GAP + ratios)


def _ends(low: float, high: float, place: Callable[[float], int]) -> dict[int, str]:
    """Return the labels at the two ends of a scale, keyed by column; the ratio 1 is labeled separately."""
    digits = _digits(low, high)
    return {place(end): f"{end:.{digits}f}" for end in (low, high) if end != 1}


def _scale(labels: Mapping[int, str], width: int) -> str:
    """Return a line of labels, each centered on its column, or shifted if it would not fit or would touch another."""
    line = ""
    left = sum(len(text) + 1 for text in labels.values())
    for column, text in sorted(labels.items()):
        begin = min(column - len(text) // 2, width + 1 - left)
        line = line.ljust(max(begin, len(line) + 1 if line else 0)) + text
        left -= len(text) + 1
    return line


def _show_arms(answer: Answer) -> None:
    from rich.markup import escape
    from rich.table import Table

    measures = [measure for measure in MEASURES if any(row.measure == measure for row in answer.arms)]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for head in ("arm", "cells", *(HEADS[measure][0] for measure in measures)):
        table.add_column(head, justify="left" if head == "arm" else "right")
    for arm in answer.definition.arms:
        own = {row.measure: row for row in answer.arms if row.arm == arm.name}
        cells = [cell for cell in answer.cells if cell.arm == arm.name]
        done = f"{sum(cell.row is not None for cell in cells)}/{len(cells)}"
        mark = " (baseline)" if arm.name == answer.definition.baseline else ""
        table.add_row(f"{escape(arm.name)}{mark}", done, *(_mean(own.get(measure)) for measure in measures))
    show.print_table(table)


def _mean(row: ArmRow | None) -> str:
    if row is None or row.mean is None:
        return show.NOT_MEASURED
    is_estimate = row.measure.startswith(("energy", "average_power")) and is_estimated(row.source)
    unit = HEADS[row.measure][1]
    value = quantity(row.mean, unit, 3) if unit else plain(row.mean, digits=4)
    # Value and interval stay on one line, because a mean without its interval can mislead.
    text = f"{show.ESTIMATE if is_estimate else ''}{value}".replace(" ", show.NO_BREAK)
    if row.ci95_low is None or row.ci95_high is None:
        return text
    return f"{text}{show.NO_BREAK}±{(row.ci95_high - row.ci95_low) / 2 / abs(row.mean):.1%}" if row.mean else text


def as_plain(answer: Answer) -> dict[str, Any]:
    """Return a campaign's results as plain data, for programs."""
    campaign = answer.definition.campaign
    return {
        "campaign": answer.definition.name,
        "structure": campaign.structure,
        "seed": campaign.seed,
        "cycles": campaign.cycles,
        "cycles_reached": answer.cycles_begun,
        "until_ci": campaign.until_ci,
        "max_cycles": campaign.max_cycles,
        "nominal_level": None if answer.definition.rule is None else answer.definition.rule.level,
        "has_ended": answer.ended,
        "baseline": answer.definition.baseline,
        "primary": campaign.primary,
        "cells": [
            {
                "arm": cell.arm,
                "cycle": cell.cycle,
                "position": cell.position,
                "experiment_id": cell.experiment_id,
                "status": cell.status,
            }
            for cell in answer.cells
        ],
        "arms": [_plain(row) for row in answer.arms],
        "pairs": [_plain(row) for row in answer.pairs],
        "carry_over": _carry_over(answer),
        "nodes": _nodes(answer),
        "sentences": list(sentences(answer)),
        "warnings": [_warning(note) for note in answer.warnings],
    }


def _carry_over(answer: Answer) -> dict[str, Any] | None:
    """Return the carry-over as plain data; None if it could not be estimated."""
    found = answer.carry_over
    if found is None:
        return None
    names = [arm.name for arm in answer.definition.arms]
    after = [
        {"arm": names[each.arm], "ratio": each.ratio, "ci_low": each.ci_low, "ci_high": each.ci_high}
        for each in found.after
    ]
    return {"after": after, "p_value": found.p_value, "degrees_of_freedom": found.degrees_of_freedom}


def _nodes(answer: Answer) -> dict[str, Any] | None:
    """Return how much nodes and boards differ, as plain data; None unless cycles ran on several nodes of a cluster."""
    if answer.spread is None:
        return None
    names = [arm.name for arm in answer.definition.arms]
    plain = asdict(answer.spread)
    for each in (*plain["ratios"], *plain["interactions"]):
        each["arm"] = names[each["arm"]]
    return plain


def _plain(row: ArmRow | PairRow) -> dict[str, Any]:
    return {name: getattr(row, name) for name in names(type(row))}


def _warning(note: CodedWarning) -> dict[str, str]:
    return {"code": note.code, "text": note.text}
