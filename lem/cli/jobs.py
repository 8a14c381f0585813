"""The `lem jobs` command, which lists, follows or cancels the Slurm jobs that earlier commands submitted."""

from __future__ import annotations

from typing import Annotated

import typer

from lem.cli.base import ResultsDir, app
from lem.errors import ConfigError

CANCEL = "cancel"


@app.command()
def jobs(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[STUDY] | cancel STUDY",
            help="A sweep, batch or campaign: its name, the beginning of its name, or its directory.",
            show_default=False,
        ),
    ] = None,
    results_dir: ResultsDir = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="With cancel: skip confirmation.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the state of each experiment as JSON, without waiting.")
    ] = False,
) -> None:
    """List the studies with jobs on a Slurm cluster, follow the jobs of one study until they end, or cancel them."""
    from lem.results.store import Store, default_root
    from lem.studies import jobs as study

    store = Store(results_dir or default_root())
    words = arguments or []
    is_cancelling = words[:1] == [CANCEL]
    names = words[1:] if is_cancelling else words
    if len(names) > 1:
        raise ConfigError(f"lem jobs takes one study, not {len(names)}: {', '.join(names)}.")
    name = names[0] if names else None
    if is_cancelling:
        if name is None:
            raise ConfigError("lem jobs cancel needs the name of a study; lem jobs lists them.")
        if as_json:
            raise ConfigError("--json shows the states of experiments; leave it out with cancel.")
        raise typer.Exit(study.cancel(store, name, yes=yes))
    if yes:
        raise ConfigError("--yes has an effect only with lem jobs cancel; leave it out.")
    if name is None or as_json:
        raise typer.Exit(study.list_jobs(store, name, as_json=as_json))
    raise typer.Exit(study.follow(store, name))
