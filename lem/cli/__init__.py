"""The `lem` command: flags become overrides, and each command calls its app.

Nothing heavy is imported here: torch, transformers, hydra, pyarrow and codecarbon come with the command that
needs them.
"""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from lem._version import VERSION
from lem.cli.base import app
from lem.errors import BadInput, Interrupted, LemError

# Each registers its commands; the order is that of lem --help.
# isort: off
from lem.cli import experiment, batch, config, results, inventory  # noqa: F401
# isort: on

# The values that have a flag of their own.
FLAGS = {
    "model": "--model",
    "dataset.split": "--split",
    "dataset.column": "--column",
    "dataset.sample_size": "--sample-size",
    "max_output_tokens": "--max-tokens",
    "seed": "--seed",
    "io.results_dir": "--results-dir",
}


def _version(asked: bool) -> None:
    if asked:
        print(f"lem {VERSION}")
        raise typer.Exit


@app.callback()
def _lem(
    version: Annotated[  # noqa: ARG001 - its callback does the work
        bool, typer.Option("--version", "-v", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Read .env before any command looks at the environment; what is set already wins."""
    import dotenv

    dotenv.load_dotenv(dotenv.find_dotenv(usecwd=True))


def main() -> NoReturn:
    """Run the command line; an error that lem raises on purpose is one sentence and an exit code."""
    try:
        app(prog_name="lem")
    except BadInput as error:
        sys.exit(_tell(error))
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        sys.exit(stop.exit_code)
    except LemError as error:
        sys.exit(_tell(error))
    except KeyboardInterrupt:
        sys.exit(Interrupted.exit_code)
    except BrokenPipeError:
        _quit_quietly()
    sys.exit(0)


def _tell(error: LemError) -> int:
    for line in str(error).splitlines():
        path = line.partition(":")[0]
        print(
            f"Error: {line.replace(path, f'{path} ({FLAGS[path]})', 1) if path in FLAGS else line}",
            file=sys.stderr,
        )
    return error.exit_code


def _quit_quietly() -> NoReturn:
    """Leave when the reader of a pipe has gone (lem … | head); Python must not flush into it once more."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)
