"""lem as a plain Hydra app: `python -m lem.cli.hydra_app key=value …`, Hydra's own flags included."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lem.config.compose import CONFIG_NAME, prepare, to_experiment
from lem.config.options import CONFIG_MODULE
from lem.errors import ConfigError, Interrupted, LemError
from lem.machine import host
from lem.runner.preflight import preflight
from lem.spec.experiment import Experiment
from lem.studies.ask import Options
from lem.studies.experiment import _run, _show, _warn


def hydra_app(argv: Sequence[str] | None = None) -> int:
    """Run as `python -m lem.cli.hydra_app`: overrides and Hydra's own flags, nothing else."""
    import hydra
    from hydra._internal.utils import get_args_parser

    arguments = list(sys.argv[1:] if argv is None else argv)
    # Overrides first, wherever they stood: --info would take one that follows it as its own value.
    given = [text for text in arguments if "=" in text and not text.startswith("-")]
    flags = [text for text in arguments if text not in given]
    asked = get_args_parser().parse_args([*given, *flags])
    codes: list[int] = []

    def task(composed: Any) -> None:
        codes.append(_run_composed(to_experiment, composed))

    try:
        if sum(map(bool, (asked.run, asked.multirun, asked.cfg, asked.info, asked.shell_completion))) > 1:
            raise ConfigError("--run, --multirun, --cfg, --info and --shell-completion exclude each other.")
        if asked.multirun and len(flags) == 1:
            from lem.studies import sweep

            return sweep.main(None, asked.overrides, Options(yes=True))
        sys.argv[1:] = [*_for_hydra(asked), *flags]
        hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME)(task)()
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except LemError as error:
        return _failed(error)
    return max(codes, default=0)


def _for_hydra(asked: Any) -> Sequence[str]:
    """Return the overrides in Hydra's form; its help takes none, and its completion a word of its own."""
    if asked.hydra_help:
        return []
    if asked.shell_completion:
        return list(asked.overrides)
    given = None if asked.config_dir is None else Path(asked.config_dir)
    return prepare(None, asked.overrides, groups_in=given).overrides


def _run_composed(convert: Any, composed: Any) -> int:
    """Run one composed config; errors are told here, since Hydra would show them as its own."""
    from hydra.core.hydra_config import HydraConfig

    options = Options(yes=True)
    try:
        experiment: Experiment = convert(composed)
        ready = preflight(experiment, host.look())
        _warn(ready)
        outcome = _run(ready, list(HydraConfig.get().overrides.task), None, options)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    except LemError as error:
        return _failed(error)
    _show(outcome, options)
    return 0 if outcome.row.status == "completed" else 1


def _failed(error: LemError) -> int:
    print(f"Error: {error}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(hydra_app())
