"""The `lem results` commands that copy or delete results: export, delete, archive and merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lem.cli import complete
from lem.cli.base import ResultsDir
from lem.cli.results import (
    Last,
    OfBackend,
    OfCampaign,
    OfDataset,
    OfModel,
    OfSchedule,
    Reverse,
    Since,
    Sort,
    results_app,
)
from lem.errors import ResultsError
from lem.spec.paths import literal

Ids = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="ID",
        help="Experiment ids, or the beginnings of ids.",
        show_default=False,
        autocompletion=complete.experiment_ids,
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Skip confirmation.")]


@results_app.command("export")
def results_export(
    ids: Ids = None,
    results_dir: ResultsDir = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="csv, json, parquet, or the format of another project: aienergyscore (CSV) or mlenergy (Parquet). "
            "Default: the format that the file's name suggests, or else csv.",
            show_default=False,
        ),
    ] = None,
    table: Annotated[
        str, typer.Option("--table", help="The table to export: experiments, cycles or requests.")
    ] = "experiments",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            parser=literal,
            metavar="FILE",
            help="File to write (default: standard output); required for parquet and mlenergy.",
        ),
    ] = None,
    status: Annotated[
        str | None,
        typer.Option("--status", help="Only experiments with this status: completed, failed or interrupted."),
    ] = None,
    model: OfModel = None,
    backend: OfBackend = None,
    dataset: OfDataset = None,
    campaign: OfCampaign = None,
    schedule: OfSchedule = None,
    since: Since = None,
    last: Last = None,
    sort: Sort = None,
    reverse: Reverse = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Write a table as CSV, JSON or Parquet, or in the format of another project."""
    from lem.results import browse
    from lem.results.export import export

    suffix = output.suffix.lower().removeprefix(".") if output else ""
    chosen = kind or (suffix if suffix in ("json", "parquet") else "csv")
    selection = browse.Selection(status, model, backend, dataset, campaign, schedule, since, last, sort, reverse)
    store = browse.store_at(results_dir)
    raise typer.Exit(export(store, selection, ids or [], kind=chosen, table=table, output=output, force=force))


@results_app.command("delete")
def results_delete(
    ids: Ids = None,
    results_dir: ResultsDir = None,
    campaign: Annotated[
        str | None,
        typer.Option(
            "--campaign",
            help="Delete the campaign with this name: all its cells, and its files. With ids or --status, delete only "
            "the cells that match.",
        ),
    ] = None,
    status: Annotated[
        str | None,
        typer.Option("--status", help="Only experiments with this status: completed, failed, interrupted or planned."),
    ] = None,
    yes: Yes = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be deleted, and delete nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also delete single cells of a campaign.")] = False,
) -> None:
    """Delete experiments: their raw files and their rows."""
    from lem.results import browse
    from lem.results.delete import delete, planned

    deletion = planned(browse.store_at(results_dir), ids or [], campaign, status, force=force)
    raise typer.Exit(delete(deletion, yes=yes, dry_run=dry_run))


@results_app.command("archive")
def results_archive(
    ids: Ids = None,
    results_dir: ResultsDir = None,
    campaign: Annotated[
        str | None, typer.Option("--campaign", help="Archive the campaign with this name, with all its cells.")
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            "--schedule",
            help="Archive the schedule with this name or id, with all its experiments and campaigns.",
            autocompletion=complete.schedules,
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Archive all experiments, campaigns and schedules.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", parser=literal, metavar="FILE", help="The zip file to write.")
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            "--check",
            parser=literal,
            metavar="FILE",
            help="Instead of writing an archive, check this one against its checksums.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Pack experiments, campaigns and schedules into a zip file with checksums; lem results merge reads it back."""
    from lem.results import archive, browse
    from lem.results.export import check_output

    if check is not None:
        if ids or campaign is not None or schedule is not None or everything or output is not None:
            message = "--check only reads an archive; leave out ids, --campaign, --schedule, --all and --output."
            raise ResultsError(message)
        raise typer.Exit(archive.report_check(check))
    if output is None:
        raise ResultsError("Give the file to write: --output FILE.zip.")
    check_output(output, force=force)
    store = browse.store_at(results_dir)
    chosen = archive.content(store, ids or [], campaign, schedule, everything=everything)
    raise typer.Exit(archive.archive(store, chosen, output))


@results_app.command("merge")
def results_merge(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR|FILE.zip", parser=literal, help="Results directories and archives.", show_default=False
        ),
    ],
    results_dir: Annotated[
        Path | None,
        typer.Option(
            "--results-dir",
            "-o",
            parser=literal,
            metavar="PATH",
            help="Results directory to merge into (default: LLM_ENERGY_RESULTS_DIR, else results/).",
        ),
    ] = None,
) -> None:
    """Copy the experiments, campaigns and schedules of other results directories and archives into one directory."""
    from lem.results import browse
    from lem.results.combine import report

    raise typer.Exit(report(browse.store_at(results_dir), sources))
