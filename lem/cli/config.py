"""`lem config`: checking, showing and making configurations."""

from __future__ import annotations

import typer

from lem.cli.base import app

config_app = typer.Typer(help="Check, show and make configurations.", no_args_is_help=True)
app.add_typer(config_app, name="config")
