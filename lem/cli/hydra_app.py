"""lem as a plain Hydra app: `python -m lem.cli.hydra_app key=value …`, with all of Hydra's own flags.

Overrides are translated for Hydra as in `lem experiment`, and `--multirun` without other flags runs the same sweep as
`lem experiment --multirun`. Everything else is left to Hydra.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lem.cli.base import exit_code_of
from lem.cli.flags import launcher_of
from lem.cli.streams import forgiving_streams
from lem.config.compose import CONFIG_NAME, prepare, to_experiment
from lem.config.options import CONFIG_MODULE
from lem.config.trust import all_asked
from lem.errors import ConfigError, Interrupted
from lem.machine import host
from lem.runner.early import early_worker
from lem.runner.preflight import preflight
from lem.studies import sweep
from lem.studies.ask import RunOptions, print_warnings
from lem.studies.consent import Consents
from lem.studies.experiment import run

# lem's own flags, which Hydra would reject.
ALLOW = ("--allow-command", "--allow-code", "--allow-key")


def hydra_app(argv: Sequence[str] | None = None) -> int:
    """Run the app; return its exit code."""
    forgiving_streams()
    return exit_code_of(lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def _run(arguments: list[str]) -> int:
    import hydra

    # Move overrides to the front, because --info would take an override that follows it as its own value.
    given = [text for text in arguments if "=" in text and not text.startswith("-")]
    allow_command, allow_code, allow_key = (flag in arguments for flag in ALLOW)
    options = RunOptions(yes=True, allow_command=allow_command, allow_code=allow_code, allow_key=allow_key)
    flags = [text for text in arguments if text not in given and text not in ALLOW]
    parsed, _ = _parser().parse_known_args([*given, *flags])
    codes: list[int] = []

    def task(composed: Any) -> None:
        # Errors are printed here because Hydra would print a traceback.
        code = exit_code_of(lambda: _run_composed(composed, options))
        if code == Interrupted.exit_code:
            sys.exit(code)
        codes.append(code)

    if sum(map(bool, (parsed.run, parsed.multirun, parsed.cfg, parsed.info, parsed.shell_completion))) > 1:
        raise ConfigError("--run, --multirun, --cfg, --info and --shell-completion are mutually exclusive.")
    launcher, own = launcher_of(None, parsed.overrides, None if parsed.config_dir is None else Path(parsed.config_dir))
    if parsed.multirun and len(flags) == 1:
        return sweep.main(None, own, replace(options, launcher=launcher))
    if launcher is not None:
        raise ConfigError(
            "hydra/launcher: this app submits jobs only for --multirun without other flags. Use lem experiment or "
            "lem batch with --launcher."
        )
    if parsed.shell_completion:
        overrides = parsed.overrides  # the argument is a Hydra subcommand, not configuration
    elif parsed.hydra_help:
        overrides = []  # --hydra-help takes no overrides
    else:
        groups_in = None if parsed.config_dir is None else Path(parsed.config_dir)
        overrides = prepare(None, parsed.overrides, groups_in=groups_in).overrides
    sys.argv[1:] = [*overrides, *flags]
    hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME)(task)()
    return max(codes, default=0)


def _parser() -> argparse.ArgumentParser:
    """Return a parser for the Hydra flags that matter here and for all Hydra flags that take a value."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("overrides", nargs="*")
    for names in (("--run", "-r"), ("--multirun", "-m"), ("--shell-completion", "-sc"), ("--hydra-help",)):
        parser.add_argument(*names, action="store_true")
    for names in (("--cfg", "-c"), ("--config-dir", "-cd"), ("--config-path", "-cp"), ("--config-name", "-cn")):
        parser.add_argument(*names)
    parser.add_argument("--package", "-p")
    parser.add_argument("--experimental-rerun")
    parser.add_argument("--info", "-i", nargs="?", const="all")
    return parser


def _run_composed(composed: Any, options: RunOptions) -> int:
    from hydra.core.hydra_config import HydraConfig

    overrides = list(HydraConfig.get().overrides.task)
    experiment = to_experiment(composed)
    own = {text.partition("=")[0].lstrip("+") for text in overrides if "${" not in text}
    asked = [replace(each, is_own=each.path in own) for each in all_asked(experiment)]
    Consents(options).require(asked)
    with early_worker(experiment, host.look()) as early:
        ready = preflight(experiment, host.look())
        print_warnings(*ready.warnings)
        return run(ready, options, overrides, early=early)


if __name__ == "__main__":
    sys.exit(hydra_app())
