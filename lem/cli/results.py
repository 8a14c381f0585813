"""`lem aggregate`, `lem results list` and `lem results show`; other modules add the other `lem results` commands."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lem.cli import complete
from lem.cli.base import ResultsDir, app
from lem.machine.collector import paused_collector

if TYPE_CHECKING:
    from lem.results.jobs import InJob
    from lem.results.store import Store

results_app = typer.Typer(help="Show, compare, report, export and manage results.", no_args_is_help=True)
app.add_typer(results_app, name="results")


# Flags that select experiments; `lem results export` has them too.
OfModel = Annotated[str | None, typer.Option("--model", help="Only experiments whose model name contains this text.")]
OfBackend = Annotated[
    str | None, typer.Option("--backend", help="Only experiments whose backend name contains this text.")
]
OfDataset = Annotated[
    str | None, typer.Option("--dataset", help="Only experiments whose dataset name contains this text.")
]
OfCampaign = Annotated[str | None, typer.Option("--campaign", help="Only cells of the campaign with this name.")]
OfSchedule = Annotated[str | None, typer.Option("--schedule", help="Only runs of the schedule with this name.")]
Since = Annotated[
    str | None,
    typer.Option(
        "--since",
        metavar="TIME",
        help="Only experiments started at this time (2026-01-31 or 2026-01-31T10:00) or later.",
    ),
]
Last = Annotated[
    int | None, typer.Option("--last", min=1, metavar="N", help="Only the newest N of the selected experiments.")
]
Sort = Annotated[
    str | None,
    typer.Option("--sort", help="Column to sort by, such as energy_per_output_token_j (default: start)."),
]
Reverse = Annotated[bool, typer.Option("--reverse", help="Largest or newest first.")]


@app.command()
def aggregate(
    experiment_id: Annotated[
        str | None,
        typer.Argument(
            metavar="ID",
            help="Experiment id, or the beginning of one.",
            show_default=False,
            autocompletion=complete.experiment_ids,
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Aggregate all experiments with missing or outdated rows.")
    ] = False,
    results_dir: ResultsDir = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Rebuild rows even if they are up to date.")] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict/--no-strict",
            help="If a record is missing, fail (the default) or use the remaining ones (--no-strict).",
        ),
    ] = True,
    allow_mixed_backends: Annotated[
        bool, typer.Option("--allow-mixed-backends", help="Combine records from different backends (not recommended).")
    ] = False,
) -> None:
    """Build table rows from raw records; lem experiment does this automatically at the end of a run."""
    from lem.results import browse

    store = browse.store_at(results_dir)
    raise typer.Exit(
        browse.aggregate_experiments(
            store, experiment_id, everything=everything, force=force, strict=strict, mixed=allow_mixed_backends
        )
    )


@results_app.command("list")
@paused_collector()
def results_list(
    results_dir: ResultsDir = None,
    everything: Annotated[
        bool,
        typer.Option(
            "--all",
            "-a",
            help="Also list experiments without a row. Otherwise, they are listed only with --status or if they are in "
            "a Slurm job.",
        ),
    ] = False,
    status: Annotated[
        str | None,
        typer.Option(
            "--status",
            help="Only experiments with this status: completed, failed, interrupted, running, pending or planned.",
        ),
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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all columns.")] = False,
) -> None:
    """List experiments, oldest first."""
    from lem.results import browse

    selection = browse.Selection(status, model, backend, dataset, campaign, schedule, since, last, sort, reverse)
    store = browse.store_at(results_dir)
    raise typer.Exit(
        browse.list_experiments(store, selection, everything=everything, in_jobs=_in_jobs(store), as_json=as_json)
    )


def _in_jobs(store: Store) -> Mapping[Path, InJob]:
    """Collect the results of Slurm jobs that have ended.

    Return what Slurm reports about the experiments that have not ended, by their directories.
    """
    from lem.results.jobs import awaited

    if not awaited(store):
        return {}
    from lem.studies.jobs import look_at_all  # takes a second to import

    return look_at_all(store)


@results_app.command("show")
@paused_collector()
def results_show(
    experiment_id: Annotated[
        str,
        typer.Argument(
            metavar="ID|CAMPAIGN|SCHEDULE",
            help="An experiment id (or its beginning), or the name or directory of a campaign or a schedule.",
            autocompletion=complete.experiment_ids,
        ),
    ],
    results_dir: ResultsDir = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Show all records of an experiment, with their phases and readings.")
    ] = False,
    environment: Annotated[
        bool, typer.Option("--environment", "-e", help="Also show the machine and software that an experiment ran on.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the measurements, cycles and state of an experiment, or the results of a campaign or a schedule."""
    from lem.results import browse

    store = browse.store_at(results_dir)
    if folder := browse.schedule_folder(store, experiment_id):
        code = browse.show_schedule(folder, raw=raw, environment=environment, as_json=as_json)
        raise typer.Exit(code)
    if folder := browse.campaign_folder(store, experiment_id):
        code = browse.show_campaign(folder, raw=raw, environment=environment, as_json=as_json)
        raise typer.Exit(code)
    raise typer.Exit(browse.show_experiment(store, experiment_id, raw=raw, environment=environment, as_json=as_json))
