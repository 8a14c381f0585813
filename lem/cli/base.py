"""What the commands share: the app they belong to, options that several have, and how errors are printed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from lem.errors import Interrupted, LemError

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


def exit_code_of(run: Callable[[], int]) -> int:
    """Run a command and return its exit code; print an error that lem raises on purpose."""
    try:
        return run()
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        return Interrupted.exit_code
    except LemError as error:
        for line in str(error).splitlines():
            print(f"Error: {line}", file=sys.stderr)
        return error.exit_code
