"""One run of a schedule: `python -m lem.studies.scheduled_run <the schedule's directory> <number>`.

The daemon (`lem.studies.daemon`) starts this process and redirects its output to a log. The process measures the
experiment or campaign in `what.json`, or resumes the one that an earlier attempt began. It records in
`runs/<number>.json` how the experiment or campaign ended, and which one it is. It knows nothing about Hydra or other
runs.
"""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal
from zoneinfo import ZoneInfo

from lem.errors import ConfigError, Interrupted, LemError
from lem.machine import host
from lem.results.aggregate import aggregate, read
from lem.results.campaign import Arm
from lem.results.codec import from_json
from lem.results.directory import ExperimentDir
from lem.results.plan import FINISHED
from lem.results.schedule import (
    WHAT,
    RunOutcome,
    ScheduleManifest,
    Start,
    held,
    read_manifest,
    read_outcome,
    run_log,
    write_outcome,
)
from lem.results.store import Store
from lem.runner import job
from lem.runner.early import early_worker
from lem.runner.preflight import preflight
from lem.runner.stopping import raise_stopped
from lem.spec.campaign import Campaign
from lem.spec.experiment import Experiment
from lem.studies.ask import RunOptions, catch_up_rows, print_warnings, show_outcome
from lem.studies.child import end_with_parent
from lem.studies.display import display

RUN_LOCK = ".run.lock"


@dataclass(frozen=True)
class What:
    """What each run of a schedule measures: an experiment, or a campaign with its arms."""

    experiment: Experiment | None = None
    campaign: Campaign | None = None
    arms: tuple[Arm, ...] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure a run of a schedule; return 0 if it completed, and another exit code if it did not."""
    folder, number = sys.argv[1:] if argv is None else argv
    # The daemon blocks the signals that it fetches while it sleeps, and this process has inherited the block.
    signal.signal(signal.SIGTERM, raise_stopped)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    threading.Thread(target=end_with_parent, daemon=True).start()
    return ScheduledRun(Path(folder), int(number)).main()


class ScheduledRun:
    """A run of a schedule, and the record of its outcome."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder, self._number = folder, number
        self._outcome = RunOutcome()

    def main(self) -> int:
        """Measure, record the outcome, and return the exit code."""
        try:
            # If an earlier daemon was killed, its run may still be ending.
            with held(self._folder, RUN_LOCK, wait=True):
                manifest = read_manifest(self._folder)
                try:
                    error = self._measure(manifest)
                    self._end(manifest, "failed" if error else "done", error)
                except (Interrupted, KeyboardInterrupt):
                    # The error's own message would name a command that knows nothing about the schedule.
                    self._end(manifest, "interrupted", "finished requests are kept")
                    raise
                except LemError as error:
                    self._end(manifest, "failed", str(error))
                    raise
                except Exception as error:
                    self._end(manifest, "failed", f"{type(error).__name__}: {error}")
                    raise
        except KeyboardInterrupt as stop:
            print(stop, file=sys.stderr)
            return Interrupted.exit_code
        except LemError as error:
            print(f"Error: {error}", file=sys.stderr)
            return error.exit_code
        except Exception:  # a bug in lem, reported in the run's log
            traceback.print_exc()
            return 1
        return int(self._outcome.status != "done")

    def _measure(self, manifest: ScheduleManifest) -> str | None:
        """Measure the run; return None if it completed, else the reason."""
        start = manifest.starts[self._number - 1]
        what = from_json(What, (self._folder / WHAT).read_bytes())
        options = RunOptions(yes=True, force=manifest.config.forced)
        earlier = read_outcome(self._folder, self._number)
        self._outcome.experiment_id = earlier.experiment_id if earlier else None
        if what.experiment is None:
            return self._measure_campaign(what, manifest, start, options)
        store = Store(what.experiment.io.results_dir)
        catch_up_rows(store.root, options)
        begun = store.directory(earlier.experiment_id) if earlier and earlier.experiment_id else None
        if begun is not None and (begun.path / "spec.json").is_file():
            self._claim(begun)
            return self._go_on(store, begun)
        return self._begin(what.experiment, manifest, start)

    def _begin(self, experiment: Experiment, manifest: ScheduleManifest, start: Start) -> str | None:
        config, machine = manifest.config, host.look()
        with early_worker(experiment, machine) as early:
            ready = preflight(experiment, machine, force=config.forced)
            print_warnings(*ready.warnings)
            check_prompts(manifest, ready.prompts.sha256)
            with display() as report:
                outcome = job.run_ready(
                    ready,
                    overrides=config.overrides,
                    config_file=Path(config.config_file) if config.config_file else None,
                    schedule=manifest.place(start),
                    claimed=self._claim,
                    early=early,
                    report=report,
                )
        return self._reason(outcome)

    def _go_on(self, store: Store, directory: ExperimentDir) -> str | None:
        """Resume the experiment of an earlier attempt, or write its row if only that is missing."""
        if directory.state().status in FINISHED:
            aggregate(store, directory)
            row = read(directory, strict=False).row
            return self._reason(job.Outcome(row, directory, store))
        with display() as report:
            return self._reason(job.resume(store, directory, report=report))

    def _reason(self, outcome: job.Outcome) -> str | None:
        if show_outcome(outcome) == 0:
            return None
        return outcome.problem or outcome.row.error or f"the experiment is {outcome.row.status}"

    def _measure_campaign(
        self, what: What, manifest: ScheduleManifest, start: Start, options: RunOptions
    ) -> str | None:
        """Measure a separate campaign for this run, or resume the one that an earlier attempt began."""
        from lem.studies import campaign as study
        from lem.studies.checks import RecentPrompts

        assert what.campaign is not None
        name = f"{manifest.name}_run{start.number}"
        self._outcome.campaign = name
        self._record()
        prompts = RecentPrompts()
        own = replace(what.campaign, name=name)
        planned = study.plan(own, what.arms, manifest.config.overrides, options, prompts)
        check_prompts(manifest, digest_of(planned.definition.prompts_sha256))
        code = study.measure_planned(replace(planned, schedule=manifest.place(start)), options, prompts)
        log = run_log(self._folder, self._number)
        return f"the campaign is not complete; its output is in {log}" if code else None

    def _claim(self, directory: ExperimentDir) -> None:
        self._outcome.experiment_id = directory.id
        self._record()

    def _end(
        self, manifest: ScheduleManifest, status: Literal["done", "failed", "interrupted"], error: str | None
    ) -> None:
        self._outcome.status = status
        self._outcome.error = " ".join(error.split()) if error else None
        self._outcome.ended_at = datetime.now(ZoneInfo(manifest.time_zone)).isoformat(timespec="milliseconds")
        self._record()

    def _record(self) -> None:
        write_outcome(self._folder, self._number, self._outcome)


def digest_of(prompts_sha256: Sequence[str]) -> str:
    """Join the digests of the prompts of a campaign's cycles into one string."""
    return "+".join(prompts_sha256)


def check_prompts(manifest: ScheduleManifest, sha256: str) -> None:
    """Raise `ConfigError` if the prompts are not those with which the schedule began."""
    if sha256 != manifest.config.prompts_sha256:
        raise ConfigError(
            f"The prompts have changed since schedule '{manifest.name}' began, so its runs would not be comparable. "
            "Restore the dataset, or start a new schedule with another --name."
        )


if __name__ == "__main__":
    sys.exit(main())
