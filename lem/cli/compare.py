"""The `lem results compare` command, which compares results that were measured at different times."""

from __future__ import annotations

from typing import Annotated

import typer

from lem.cli import complete
from lem.cli.base import ResultsDir
from lem.cli.results import results_app


@results_app.command("compare")
def results_compare(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="BASELINE OTHER…",
            help="Experiments (by id), campaigns (by name or directory) or results directories; the first is the "
            "baseline.",
            autocompletion=complete.experiment_ids,
        ),
    ],
    results_dir: ResultsDir = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metric", help="Also compare this column, such as ttft_p95_s (repeatable)."),
    ] = None,
    limits: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-if",
            metavar="METRIC>CHANGE%",
            help="Exit with code 1 if the whole interval of the change is beyond this limit, such as "
            "'energy_per_output_token_j>+3%' or 'output_tokens_per_s<-5%' (repeatable).",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="With --fail-if: exit with code 2 if an outcome is 'cannot tell'.")
    ] = False,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow",
            metavar="REASON",
            help="Accept a difference of this kind: board, driver, engine, prompts, lengths, window, throttled, "
            "shared, meter or estimate (repeatable).",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Compare experiments, campaigns or results directories.

    The output gives ratios with their intervals, and the differences in configuration, machine and software.
    """
    from lem.errors import ResultsError
    from lem.results import browse, show
    from lem.results.comparison import check_allowed, comparisons, metric_named, parse_limit, unmatched
    from lem.results.comparison_show import as_plain, markdown, show_comparisons
    from lem.results.sides import side

    if len(names) < 2:
        raise ResultsError("A comparison needs at least two results; give a baseline and another result.")
    if as_json and as_markdown:
        raise ResultsError("--json and --markdown are alternatives; use one of them.")
    if strict and not limits:
        raise ResultsError("--strict has an effect only with --fail-if; leave it out, or add a limit with --fail-if.")
    allowed = allow or []
    check_allowed(allowed)
    wanted = [parse_limit(text) for text in limits or []]
    extra = [metric_named(name, "--metric") for name in metrics or []]
    store = browse.store_at(results_dir)
    sides = [side(store, name) for name in names]
    found = comparisons(sides, [*(limit.metric for limit in wanted), *extra])
    judged = [(each, limit, *limit.judge(each, allowed)) for limit in wanted for each in found]
    if as_json:
        print(show.as_json(as_plain(found, judged, allowed)))
    elif as_markdown:
        print(markdown(found, judged, allowed), end="")
    else:
        show_comparisons(found, judged, allowed)
    for each in sides:
        if each.left_out:
            _warn(f"{each.name}: number of incomplete runs left out: {each.left_out}.")
    for text in unmatched(sides):
        _warn(text)
    outcomes = {outcome for _, _, outcome, _ in judged}
    raise typer.Exit(1 if "failed" in outcomes else 2 if strict and "cannot tell" in outcomes else 0)


def _warn(text: str) -> None:
    from lem.quantities import one_line
    from lem.results import show

    show.console(stderr=True).print(f"Warning: {one_line(text)}", markup=False, style="yellow")
