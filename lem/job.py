"""One experiment from a checked configuration to its row: preflight, claim an id, launch, aggregate.

The same job for the command line, for a sweep's cell and for a library user; knows nothing of Hydra or of how
results are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lem import host
from lem.aggregate import aggregate, read_row
from lem.errors import Interrupted
from lem.launch import launch
from lem.plan import Plan, PromptsInfo, timestamp
from lem.preflight import Ready, preflight
from lem.progress import Report, silent
from lem.record import ExperimentRow
from lem.spec import Experiment
from lem.store import ExperimentDir, Store

__all__ = ["Outcome", "run", "run_ready"]


@dataclass(frozen=True)
class Outcome:
    """How an experiment ended and where its files are."""

    row: ExperimentRow
    directory: ExperimentDir
    store: Store


def run(experiment: Experiment, *, force: bool = False, report: Report = silent) -> Outcome:
    """Check and run one experiment; raises `ConfigError` when it cannot run."""
    return run_ready(preflight(experiment, host.look(), force=force), report=report)


def run_ready(
    ready: Ready,
    *,
    overrides: Sequence[str] = (),
    config_file: Path | None = None,
    write_tables: bool = True,
    report: Report = silent,
) -> Outcome:
    """Run one experiment that has passed preflight.

    A failure of the model or the engine is not an exception: the row's status and error say it.

    Raises:
        Interrupted: stopped from outside; what was measured is kept, and its row written.
    """
    store = Store(Path(ready.experiment.io.results_dir))
    directory = store.claim()
    directory.write_plan(_plan(directory.id, ready, overrides, config_file), ready.prompts.texts)
    try:
        launch(directory, report)
    except Interrupted as stop:
        _row(store, directory, write_tables)
        raise Interrupted(f"{stop} It is experiment {directory.id}, {directory.path}.") from None
    return Outcome(_row(store, directory, write_tables), directory, store)


def _row(store: Store, directory: ExperimentDir, write_tables: bool) -> ExperimentRow:
    return aggregate(store, directory) if write_tables else read_row(directory)[0]


def _plan(experiment_id: str, ready: Ready, overrides: Sequence[str], config_file: Path | None) -> Plan:
    prompts = ready.prompts
    return Plan(
        experiment_id=experiment_id,
        created_at=timestamp(),
        experiment=ready.experiment,
        prompts=PromptsInfo(
            count=len(prompts.texts),
            sha256=prompts.sha256,
            source=prompts.source,
            split=prompts.split,
            column=prompts.column,
            available=prompts.available,
            dropped_empty=prompts.dropped_empty,
        ),
        overrides=tuple(overrides),
        config_file=str(config_file) if config_file else None,
    )
