"""What the commands share: the app they belong to, and the options that several of them have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Measure what running a language model costs: joules, seconds, tokens, FLOPs and CO2e.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ResultsDir = Annotated[
    Path | None,
    typer.Option("--results-dir", "-o", help="Results directory (default: LLM_ENERGY_RESULTS_DIR, else results/)."),
]

ConfigDir = Annotated[
    Path | None,
    typer.Option(
        "--config-dir", help="Directory of your own presets, datasets, … (default: conf/ beside the config file)."
    ),
]
