"""A results directory: claims ids, finds experiments, and tracks unfinished ones.

    <results>/raw/<id>/           spec.json: the plan; prompts.jsonl; arrivals.json: the arrivals of a trace
                                  state.json; aggregated.json: exists once the experiment has its rows
                                  journal_<rank>_a<attempt>.jsonl: request rows, appended after each batch
                                  process_<rank>_c<cycle>_a<attempt>.json: a process's record of a cycle
                                  power_<rank>_c<cycle>_a<attempt>.parquet, worker_0.log (the output of all workers)
    <results>/jobs/               a mark for each study with jobs on a Slurm cluster; see lem.results.jobs
    <results>/unfinished/<id>     the fingerprint of an experiment that is not completed, or still lacks its rows
    <results>/experiments/        a table with a row for each experiment
    <results>/cycles/             a row for each cycle
    <results>/requests/           a row for each request

This module knows the files and their names, not the meaning of the numbers.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from lem.errors import ResultsError, nearest
from lem.results.codec import config_sha256
from lem.results.directory import ExperimentDir
from lem.results.files import FULL, DiskFull, write_atomically
from lem.results.plan import FINISHED
from lem.spec.paths import expanded

RESULTS_DIR_VARIABLE = "LLM_ENERGY_RESULTS_DIR"
DEFAULT_RESULTS_DIR = "results"
ID = re.compile(r"exp_\d{8}_\d{6}(_\d+)?")
# The last id that this process claimed in each folder: the id without its suffix, and the number of the suffix. A study
# of thousands of cells claims hundreds of ids a second; without this, each claim would try all of these ids again.
_last_claims: dict[Path, tuple[str, int]] = {}


def default_root() -> Path:
    """Return the default results directory: the environment variable's value or, if that is unset, results/."""
    return Path(os.environ.get(RESULTS_DIR_VARIABLE) or DEFAULT_RESULTS_DIR)


class Store:
    """One results directory.

    Raises:
        BadInput: its path begins with `~` or `~user`, and this home directory is unknown.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = expanded(root)
        self.raw = self.root / "raw"
        self.experiments_table = self.root / "experiments"
        self.cycles_table = self.root / "cycles"
        self.requests_table = self.root / "requests"

    def claim(self, now: datetime | None = None) -> ExperimentDir:
        """Create a directory with a new id, `exp_YYYYMMDD_HHMMSS`, with a suffix only if that id is taken.

        Raises:
            ResultsError: the results directory is not writable.
            DiskFull: there is no space left in it.
        """
        base = f"exp_{now or datetime.now():%Y%m%d_%H%M%S}"
        try:
            self.raw.mkdir(parents=True, exist_ok=True)
            last, taken = _last_claims.get(self.raw, ("", 0))
            for number in range(taken + 1 if last == base else 1, 100_000):
                path = self.raw / (base if number == 1 else f"{base}_{number}")
                try:
                    path.mkdir()  # atomic, so only one of several processes gets the name
                except FileExistsError:
                    continue
                _last_claims[self.raw] = base, number
                return ExperimentDir(path)
        except OSError as error:
            if error.errno in FULL:
                raise DiskFull(self.root) from None
            raise ResultsError(f"The results directory {self.root} cannot be used: {error.strerror}.") from None
        raise ResultsError(f"All ids that begin with {base} are taken in {self.raw}.")

    def ids(self) -> list[str]:
        """Return the ids of all experiments, oldest first."""
        if not self.raw.is_dir():
            return []
        # The name is checked first, because is_dir raises an error for a link to itself.
        return sorted((e.name for e in os.scandir(self.raw) if ID.fullmatch(e.name) and e.is_dir()), key=age)

    def directory(self, experiment_id: str) -> ExperimentDir:
        """Return the directory of an experiment by its full id, whether or not it exists."""
        return ExperimentDir(f"{self.raw}/{experiment_id}")

    def find(self, text: str) -> ExperimentDir:
        """Return the experiment whose id is, or begins with, `text`; raises `ResultsError` if none or several match."""
        if not text:  # for example from an unset shell variable; every id would match
            raise ResultsError("The experiment id is empty; lem results list shows the ids.")
        return ExperimentDir(self.raw / one_of(text, self.ids(), self.root))

    # -------------------------------------------------------------- unfinished experiments
    def mark_unfinished(self, experiment_id: str, fingerprint: str) -> None:
        """Mark an experiment as unfinished, so that it can be found by its fingerprint."""
        write_atomically(self.root / "unfinished" / experiment_id, fingerprint)

    def mark_finished(self, experiment_id: str) -> None:
        """Remove the mark that `mark_unfinished` made."""
        (self.root / "unfinished" / experiment_id).unlink(missing_ok=True)

    def marked(self) -> list[str]:
        """Return the ids of the experiments that are marked as unfinished, whatever their state, oldest first."""
        folder = self.root / "unfinished"
        names = os.listdir(folder) if folder.is_dir() else []
        return sorted(filter(ID.fullmatch, names), key=age)

    def marked_by_fingerprint(self) -> dict[str, list[str]]:
        """Return the ids of the experiments that are marked as unfinished, grouped by fingerprint, oldest first."""
        found: dict[str, list[str]] = {}
        for name in self.marked():
            if (fingerprint := _text(self.root / "unfinished" / name)) is not None:
                found.setdefault(fingerprint, []).append(name)
        return found

    def unfinished(self, fingerprint: str, marked: Mapping[str, Sequence[str]] | None = None) -> list[ExperimentDir]:
        """Return the experiments that have this fingerprint and are neither completed nor running, oldest first.

        Args:
            fingerprint: the fingerprint, see `lem.results.plan.Plan`.
            marked: the result of `marked_by_fingerprint`, if the caller already has it.
        """
        marked = self.marked_by_fingerprint() if marked is None else marked
        found = [ExperimentDir(self.raw / name) for name in marked.get(fingerprint, ())]
        left = [each for each in found if each.state().status not in (*FINISHED, "running") and each.path.is_dir()]
        return [each for each in left if _says_the_same(each, fingerprint)]


def age(experiment_id: str) -> tuple[str, int]:
    """Return a sort key by which exp_20260102_030405_10 comes after exp_20260102_030405_9."""
    date, time, *suffix = [*experiment_id.removeprefix("exp_").split("_"), ""]
    return date + time, int(suffix[0]) if suffix[0].isdecimal() else 1


def _says_the_same(directory: ExperimentDir, fingerprint: str) -> bool:
    """Return whether a stored fingerprint, which may be wrong, matches the plan; True if the plan cannot be read."""
    try:
        plan = directory.plan()
    except ResultsError:
        return True  # resuming it reports the problem
    return fingerprint.startswith(config_sha256(plan.experiment)[:16])


def _text(file: Path) -> str | None:
    """Return a small file's content, or None if another process has just removed the file."""
    try:
        return file.read_text()
    except FileNotFoundError:
        return None


def resume_command(store: Store, directory: ExperimentDir) -> str:
    """Return the command that resumes an experiment."""
    return f"lem experiment --resume {directory.id}{results_flag(store)}"


def results_flag(store: Store) -> str:
    """Return ` -o …`, the option that names the results directory in a command; empty for the default directory."""
    return "" if store.root.resolve() == default_root().resolve() else f" -o {shlex.quote(str(store.root))}"


def one_of(text: str, ids: Iterable[str], root: Path) -> str:
    """Return the id that is `text` or begins with it; raises `ResultsError` if none or several do."""
    listed = list(ids)
    matches = [text] if text in listed else [name for name in listed if text and name.startswith(text)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ResultsError(
            f"'{text}' matches {len(matches)} experiments, for example {matches[0]} and {matches[1]}; "
            "give more of the id."
        )
    close = nearest(text, listed)
    hint = f" Nearest: {', '.join(close)}." if close else " lem results list --all shows the ids."
    raise ResultsError(f"There is no experiment '{text}' in {root}.{hint}")
