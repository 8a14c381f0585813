"""`lem experiment`: compose, check, ask, run, show; one experiment or a Hydra multirun of many.

`python -m lem.apps.experiment key=value …` is the same job as a plain Hydra app.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lem import host, report
from lem.apps.compose import CONFIG_MODULE, CONFIG_NAME, FILE_GROUP, Request, prepare, to_experiment
from lem.errors import BadInput, ConfigError, Interrupted, LemError
from lem.job import Outcome, run_ready
from lem.preflight import Ready, preflight
from lem.progress import display
from lem.spec import Experiment
from lem.store import to_json

SWEEP_DIR = "hydra.sweep.dir="
SWEEP_FILE = "experiments.json"


@dataclass(frozen=True)
class Options:
    """How to go about it, apart from what is measured."""

    yes: bool = False
    dry_run: bool = False
    force: bool = False
    write_tables: bool = True


def main(config_file: Path | None, overrides: Sequence[str], options: Options, *, multirun: bool = False) -> int:
    """Run what the command line asks for; return the exit code: 0, or 1 when an experiment did not complete.

    Raises:
        BadInput: before anything has run.
        Interrupted: what was measured is kept.
    """
    request = prepare(config_file, overrides)
    if multirun:
        return _sweep(request, config_file, options)
    ready = preflight(request.experiment(), host.look(), force=options.force)
    _warn(ready)
    if options.dry_run:
        _show_plan(ready)
        return 0
    if not (options.yes or _confirmed(f"Run {_words(ready)}?")):
        return 0
    outcome = _run(ready, overrides, config_file, options)
    _show(outcome, options)
    return 0 if outcome.row.status == "completed" else 1


def _run(ready: Ready, overrides: Sequence[str], config_file: Path | None, options: Options) -> Outcome:
    with display() as progress:
        return run_ready(
            ready,
            overrides=overrides,
            config_file=config_file,
            write_tables=options.write_tables,
            report=progress,
        )


# ------------------------------------------------------------------ what the user sees
def _warn(ready: Ready) -> None:
    for warning in ready.warnings:
        report.console(stderr=True).print(f"Warning: {warning}", markup=False, style="yellow")


def _words(ready: Ready) -> str:
    wanted = ready.experiment
    return f"{len(ready.prompts.texts)} prompts of {wanted.dataset.name} through {wanted.model} ({wanted.backend.name})"


def _confirmed(question: str) -> bool:
    """Ask on a terminal; without one there is nobody to ask, and the answer is yes."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    import typer

    return typer.confirm(question, default=True, err=True)


def _show_plan(ready: Ready) -> None:
    import yaml

    config = yaml.safe_dump(json.loads(to_json(ready.experiment)), sort_keys=False, allow_unicode=True)
    print(config, end="")
    model = f"found at {ready.model.path}" if ready.model else "none is loaded"
    prompts = ready.prompts
    print(f"# model: {model}")
    print(
        f"# prompts: {len(prompts.texts)} of {prompts.available} in {prompts.source}, "
        f"column {prompts.column}; {prompts.dropped_empty} empty ones left out"
    )
    print("# dry run: nothing was measured")


def _show(outcome: Outcome, options: Options) -> None:
    report.show_row(outcome.row)
    print(f"\nRaw records: {outcome.directory.path}")
    if options.write_tables:
        print(f"Table:       {outcome.store.experiments_table}")
    else:
        print(f"Not aggregated; lem aggregate {outcome.directory.id} does it.")


# ------------------------------------------------------------------ many
def _sweep(request: Request, config_file: Path | None, options: Options) -> int:
    cells = _cells(request)
    # Only the words are kept: the prompts of a hundred cells would fill the memory.
    checked = [_words(_checked_cell(cell, options)) for cell in cells]
    labels = [" ".join(_varied(cell, cells)) or "nothing varied" for cell in cells]
    if options.dry_run:
        for number, (label, words) in enumerate(zip(labels, checked, strict=True), start=1):
            print(f"[{number}/{len(cells)}] {label}: {words}")
        return 0
    if not (options.yes or _confirmed(f"Run {len(cells)} experiments?")):
        return 0
    outcomes: dict[int, Outcome] = {}

    def task(composed: Any) -> None:
        from hydra.core.hydra_config import HydraConfig

        number = int(HydraConfig.get().job.num)
        print(f"[{number + 1}/{len(cells)}] {labels[number]}", file=sys.stderr)
        ready = preflight(to_experiment(composed), host.look(), force=options.force)
        _warn(ready)
        try:
            outcomes[number] = _run(ready, _visible(cells[number]), config_file, options)
        except Interrupted as stop:
            # Hydra goes on after an Exception; only this ends the sweep.
            raise KeyboardInterrupt(str(stop)) from None

    sweep_dir = _sweep_dir(request)
    try:
        _hydra_multirun(request, sweep_dir, task)
    except KeyboardInterrupt as stop:
        raise Interrupted(str(stop) or "The sweep was interrupted.") from None
    finally:
        made = [(labels[number], outcome) for number, outcome in sorted(outcomes.items())]
        _write_sweep(sweep_dir, made)
        report.show_rows([outcome.row for _, outcome in made], labels=[label for label, _ in made])
    return 0 if all(outcome.row.status == "completed" for outcome in outcomes.values()) else 1


def _cells(request: Request) -> list[tuple[str, ...]]:
    """Expand the overrides of a sweep into those of its experiments, in the order in which Hydra runs them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(list(request.overrides))
        return [tuple(cell) for cell in BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]]
    except HydraException as error:
        raise ConfigError(" ".join(str(error).split())) from None


def _checked_cell(cell: tuple[str, ...], options: Options) -> Ready:
    """Check a cell before the first one runs; a sweep that would fail half-way is worth a sentence now."""
    try:
        return preflight(Request(cell).experiment(), host.look(), force=options.force)
    except BadInput as error:
        raise ConfigError(
            *(f"{problem} [in {' '.join(_visible(cell))}]" for problem in str(error).splitlines())
        ) from None


def _visible(cell: Sequence[str]) -> list[str]:
    """Return a cell's overrides without the one that stands for the user's file."""
    return [part for part in cell if not part.startswith(f"+{FILE_GROUP}@")]


def _varied(cell: tuple[str, ...], cells: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the overrides in which a cell differs from others."""
    return [part for i, part in enumerate(cell) if any(other[i] != part for other in cells)]


def _sweep_dir(request: Request) -> Path:
    given = [text.removeprefix(SWEEP_DIR) for text in request.overrides if text.startswith(SWEEP_DIR)]
    return Path(given[-1].strip("'\"")) if given else Path("multirun") / f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"


def _hydra_multirun(request: Request, sweep_dir: Path, task: Any) -> None:
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.global_hydra import GlobalHydra

    search_path = create_config_search_path(f"pkg://{CONFIG_MODULE}")
    hydra = Hydra.create_main_hydra2(task_name="experiment", config_search_path=search_path)
    try:
        hydra.multirun(CONFIG_NAME, task, [*request.overrides, f"{SWEEP_DIR}{sweep_dir}"])
    finally:
        GlobalHydra.instance().clear()


def _write_sweep(sweep_dir: Path, outcomes: Sequence[tuple[str, Outcome]]) -> None:
    made = [
        {
            "experiment_id": outcome.row.experiment_id,
            "overrides": label,
            "status": outcome.row.status,
            "directory": str(outcome.directory.path.resolve()),
        }
        for label, outcome in outcomes
    ]
    if sweep_dir.is_dir():
        (sweep_dir / SWEEP_FILE).write_text(report.as_json(made) + "\n", encoding="utf-8")


# ------------------------------------------------------------------ as a plain Hydra app
def hydra_app(argv: Sequence[str] | None = None) -> int:
    """Run as `python -m lem.apps.experiment`: overrides and Hydra's own flags, nothing else."""
    import hydra

    arguments = list(sys.argv[1:] if argv is None else argv)
    codes: list[int] = []

    def task(composed: Any) -> None:
        codes.append(_run_composed(to_experiment, composed))

    try:
        given = [text for text in arguments if "=" in text and not text.startswith("-")]
        request = prepare(None, given)
        sys.argv[1:] = [*(text for text in arguments if text not in given), *request.overrides]
        hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME)(task)()
    except LemError as error:
        return _failed(error)
    return max(codes, default=0)


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
