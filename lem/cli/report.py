"""The `lem results report` command, which writes a self-contained HTML page about results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lem.cli import complete
from lem.cli.results import results_app
from lem.spec.paths import literal


@results_app.command("report")
def results_report(
    ids: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ID…]",
            help="Experiment ids, or the beginnings of ids. Default: all experiments in the results directory.",
            show_default=False,
            autocompletion=complete.experiment_ids,
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", parser=literal, metavar="FILE", help="The page to write.")
    ] = Path("report.html"),
    campaign: Annotated[
        str | None, typer.Option("--campaign", help="Report on the campaign with this name or directory.")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option("--schedule", help="Report on the schedule with this name, id or directory.")
    ] = None,
    grid: Annotated[
        Path | None,
        typer.Option(
            "--grid",
            parser=literal,
            metavar="DIR",
            help="Report on the experiments of the sweep or batch in this folder.",
        ),
    ] = None,
    results_dir: Annotated[
        Path | None,
        typer.Option(
            "--results-dir",
            parser=literal,
            metavar="PATH",
            help="Results directory (default: LLM_ENERGY_RESULTS_DIR, else results/).",
        ),
    ] = None,
    plots_dir: Annotated[
        Path | None,
        typer.Option(
            "--plots",
            parser=literal,
            metavar="DIR",
            help="Also write each plot to this directory as SVG and PNG, sized for a column of a paper; needs pip "
            "install 'lem[plots]'.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="With --plots: replace existing plots.")] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Write an HTML page, with warnings, numbers and charts, that any browser can open offline."""
    from lem.errors import ResultsError
    from lem.quantities import one_line, timestamp
    from lem.reports import plots
    from lem.reports.content import of_campaign, of_experiments, of_grid, of_schedule
    from lem.reports.page import page
    from lem.results import browse
    from lem.results.files import write_atomically

    if sum((bool(ids), campaign is not None, schedule is not None, grid is not None)) > 1:
        raise ResultsError("Experiment ids, --campaign, --schedule and --grid are alternatives; use one of them.")
    if force and plots_dir is None:
        raise ResultsError(
            "--force has an effect only with --plots; give a directory with --plots, or leave --force out."
        )
    if plots_dir is not None:
        plots.check(plots_dir)
    store = browse.store_at(results_dir)
    if campaign is not None:
        content = of_campaign(store, campaign)
    elif schedule is not None:
        content = of_schedule(store, schedule)
    elif grid is not None:
        content = of_grid(grid)
    else:
        content = of_experiments(store, ids or ())
    stems = [] if plots_dir is None else plots.files(content.charts, plots_dir, force=force)
    text = page(content, timestamp())
    try:
        write_atomically(output, text)
    except OSError as error:
        raise ResultsError(f"--output: {output} cannot be written: {error.strerror}.") from None
    count = f"{len(content.rows)} experiment{'' if len(content.rows) == 1 else 's'}"
    print(one_line(f"Report: {output} ({len(text.encode()) / 1e6:.1f} MB, {count})"))
    if plots_dir is not None:
        plots.write(content.charts, stems)
        print(one_line(f"Plots: {plots_dir} ({len(stems)} plot{'' if len(stems) == 1 else 's'}, each as SVG and PNG)"))
    if open_page:
        import webbrowser

        webbrowser.open(output.resolve().as_uri())
