"""Finds the experiments to which a command applies, by id, study or status; they may lack rows or raw files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from lem.errors import ResultsError, did_you_mean
from lem.results.jobs import queued_in
from lem.results.plan import FINISHED
from lem.results.store import Store, age, one_of
from lem.results.tables import Tables

if TYPE_CHECKING:
    from lem.results.codec import PlanExcerpt
    from lem.results.schema import ExperimentRow

STATUSES = ("completed", "failed", "interrupted", "running", "pending", "planned")


def check_status(status: str | None) -> None:
    """Raise `ResultsError` if the given text is not a status."""
    if status is not None and status not in STATUSES:
        known = ", ".join(STATUSES)
        raise ResultsError(f"--status: '{status}' is not one of {known}.{did_you_mean(status, STATUSES)}")


class Known:
    """The experiments of a results directory; their statuses and studies are known from their rows or raw files.

    Raises:
        ResultsError: a file of the tables is damaged.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.raw = set(store.ids())
        rows, damaged = Tables(store).rows(["experiment_id", "status", "campaign", "schedule"])
        if damaged:
            raise ResultsError(*damaged)
        self.rows: dict[str, ExperimentRow] = {row.experiment_id: row for row in rows}

    @cached_property
    def ids(self) -> list[str]:
        """All experiments, oldest first."""
        return sorted(self.raw | self.rows.keys(), key=age)

    def named(self, texts: Sequence[str]) -> list[str]:
        """Return the ids that the given texts match, oldest first; each text is an id or the beginning of one.

        Raises:
            ResultsError: a text matches no experiment or several.
        """
        return sorted({one_of(text, self.ids, self.store.root) for text in texts}, key=age)

    def status(self, experiment_id: str) -> str:
        """Return an experiment's status as `lem results list --all` shows it, except that Slurm jobs are ignored."""
        row = self.rows.get(experiment_id)
        if row is not None and (row.status == "completed" or experiment_id not in self.raw):
            return row.status
        state = self.store.directory(experiment_id).state()
        if row is not None and state.status != "running":
            return row.status
        return "completed" if state.status in FINISHED else state.status

    def is_running(self, experiment_id: str) -> bool:
        """Return whether an experiment is in use: it is running, has live processes, or waits for a Slurm job."""
        directory = self.store.directory(experiment_id)
        if experiment_id not in self.raw:
            return False
        return experiment_id in self._in_jobs or directory.state().status == "running" or directory.is_held()

    @cached_property
    def _in_jobs(self) -> Mapping[str, str]:
        return queued_in(self.store)

    def campaign(self, experiment_id: str) -> str | None:
        """Return the name of the campaign that an experiment belongs to, or None."""
        if (row := self.rows.get(experiment_id)) is not None:
            return row.campaign
        plan = self._plan(experiment_id)
        return plan.campaign.name if plan and plan.campaign else None

    def schedule(self, experiment_id: str) -> str | None:
        """Return the name of the schedule that an experiment belongs to, or None."""
        if (row := self.rows.get(experiment_id)) is not None:
            return row.schedule
        plan = self._plan(experiment_id)
        return plan.schedule.schedule if plan and plan.schedule else None

    def _plan(self, experiment_id: str) -> PlanExcerpt | None:
        """Return the plan of an experiment; None if it is missing or damaged, so that its study is unknown."""
        try:
            return self.store.directory(experiment_id).plan_excerpt()
        except ResultsError:
            return None

    def of_campaign(self, name: str) -> list[str]:
        """Return the experiments of a campaign, oldest first."""
        return [each for each in self.ids if self.campaign(each) == name]

    def of_schedule(self, name: str) -> list[str]:
        """Return the experiments of a schedule, oldest first."""
        return [each for each in self.ids if self.schedule(each) == name]
