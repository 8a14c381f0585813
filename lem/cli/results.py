"""`lem aggregate` and `lem results`: reading a results directory back."""

from __future__ import annotations

from typing import Annotated

import typer

from lem.cli.base import ResultsDir, app

results_app = typer.Typer(help="Look at results.", no_args_is_help=True)
app.add_typer(results_app, name="results")


@app.command()
def aggregate(
    experiment_id: Annotated[
        str | None, typer.Argument(help="Experiment id, or the beginning of one.", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All experiments that have no row yet.")] = False,
    results_dir: ResultsDir = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Anew, also where a row exists.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict/--no-strict", help="Fail when records of some processes are missing.")
    ] = True,
) -> None:
    """Turn raw records into rows of the tables; lem experiment does it by itself."""
    from lem.apps import results

    store = results.store_at(results_dir)
    raise typer.Exit(
        results.aggregate_experiments(store, experiment_id, everything=everything, force=force, strict=strict)
    )


@results_app.command("list")
def results_list(
    results_dir: ResultsDir = None,
    everything: Annotated[bool, typer.Option("--all", "-a", help="Also those that have no row yet.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List experiments, oldest first."""
    from lem.apps import results

    raise typer.Exit(results.list_experiments(results.store_at(results_dir), everything=everything, as_json=as_json))


@results_app.command("show")
def results_show(
    experiment_id: Annotated[str, typer.Argument(help="Experiment id, or the beginning of one.")],
    results_dir: ResultsDir = None,
    raw: Annotated[bool, typer.Option("--raw", help="The records of the processes: phases, readings.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show one experiment."""
    from lem.apps import results

    raise typer.Exit(results.show(results.store_at(results_dir), experiment_id, raw=raw, as_json=as_json))
