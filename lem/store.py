"""A results directory: claiming ids, writing files whole or not at all, reading them back.

    <results>/raw/<id>/           spec.json, prompts.jsonl, process_<rank>.json, requests_<rank>.parquet, logs
    <results>/experiments/<id>.parquet   a row: the aggregated table, readable as one dataset
    <results>/requests/<id>.parquet      a row for each request, likewise

Knows the files and their names; what the numbers mean is for others.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from lem.errors import ResultsError, nearest
from lem.plan import Plan
from lem.record import ProcessRecord

T = TypeVar("T")
RESULTS_DIR_VARIABLE = "LLM_ENERGY_RESULTS_DIR"
DEFAULT_RESULTS_DIR = "results"
ID = re.compile(r"exp_\d{8}_\d{6}(_\d+)?")
# Building one takes milliseconds; they are kept for the types that are read and written.
_ADAPTERS: dict[Any, Any] = {}


def default_root() -> Path:
    """Return the results directory of commands that compose no experiment: the environment's, else results/."""
    return Path(os.environ.get(RESULTS_DIR_VARIABLE) or DEFAULT_RESULTS_DIR)


def _adapter(cls: Any) -> Any:
    from pydantic import TypeAdapter

    if cls not in _ADAPTERS:
        _ADAPTERS[cls] = TypeAdapter(cls)
    return _ADAPTERS[cls]


def to_json(value: Any) -> str:
    """Write a plan, a record or a configuration as JSON."""
    return str(_adapter(type(value)).dump_json(value, indent=2).decode())


def from_json(cls: type[T], text: str | bytes) -> T:
    """Read what `to_json` wrote; raises ValueError when it is something else."""
    result: T = _adapter(cls).validate_json(text)
    return result


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that it exists whole or not at all, even if the machine stops."""
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as scratch:
        scratch.write_bytes(data)


class replacing:  # noqa: N801 - reads as a statement
    """Give a scratch path beside `path`; rename it into place at the end, or remove it on an error."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Path:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{self._path.name}-", dir=self._path.parent)
        os.close(handle)
        self._scratch = Path(name)
        return self._scratch

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is not None:
            self._scratch.unlink(missing_ok=True)
            return
        self._scratch.chmod(0o644)
        with self._scratch.open("rb") as file:
            os.fsync(file.fileno())
        self._scratch.replace(self._path)


class ExperimentDir:
    """The raw files of one experiment."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def id(self) -> str:
        """The experiment's id, which is the directory's name."""
        return self.path.name

    def process_file(self, rank: int) -> Path:
        """Return where a rank's record lies."""
        return self.path / f"process_{rank}.json"

    def requests_file(self, rank: int) -> Path:
        """Return where a rank's request rows lie."""
        return self.path / f"requests_{rank}.parquet"

    def power_file(self, rank: int) -> Path:
        """Return where a rank's power trace lies."""
        return self.path / f"power_{rank}.parquet"

    def log_file(self, rank: int) -> Path:
        """Return where a rank's output goes."""
        return self.path / f"worker_{rank}.log"

    def write_plan(self, plan: Plan, texts: Sequence[str]) -> None:
        """Write the prompts, then the plan: a directory with a plan is complete."""
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        write_atomically(self.path / "prompts.jsonl", lines)
        write_atomically(self.path / "spec.json", to_json(plan))

    def plan(self) -> Plan:
        """Read the plan; raises `ResultsError` when there is none or it is damaged."""
        file = self.path / "spec.json"
        try:
            return from_json(Plan, file.read_bytes())
        except (OSError, ValueError) as error:
            raise ResultsError(f"{file} cannot be read: {_brief(error)}.") from None

    def prompts(self) -> list[str]:
        """Read the prompts' texts in order."""
        with (self.path / "prompts.jsonl").open(encoding="utf-8") as file:
            return [json.loads(line)["text"] for line in file]

    def write_record(self, record: ProcessRecord) -> None:
        """Write a rank's record."""
        write_atomically(self.process_file(record.rank), to_json(record))

    def records(self) -> list[ProcessRecord]:
        """Read the records of all ranks that wrote one, by rank; raises `ResultsError` for a damaged one."""
        return [self._record(file) for file in sorted(self.path.glob("process_*.json"))]

    def _record(self, file: Path) -> ProcessRecord:
        try:
            return from_json(ProcessRecord, file.read_bytes())
        except (OSError, ValueError) as error:
            raise ResultsError(f"{file} cannot be read: {_brief(error)}.") from None


class Store:
    """One results directory."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser()

    @property
    def experiments_table(self) -> Path:
        """The folder of the aggregated table."""
        return self.root / "experiments"

    @property
    def requests_table(self) -> Path:
        """The folder of the table of requests."""
        return self.root / "requests"

    def claim(self, now: datetime | None = None) -> ExperimentDir:
        """Make a directory with a new id, `exp_YYYYMMDD_HHMMSS`, with a suffix only where that is taken.

        Raises:
            ResultsError: the results directory cannot be written to.
        """
        base = f"exp_{now or datetime.now():%Y%m%d_%H%M%S}"
        raw = self.root / "raw"
        try:
            raw.mkdir(parents=True, exist_ok=True)
            for number in range(1, 100_000):
                path = raw / (base if number == 1 else f"{base}_{number}")
                try:
                    path.mkdir()  # atomic: of many processes, one gets the name
                except FileExistsError:
                    continue
                return ExperimentDir(path)
        except OSError as error:
            raise ResultsError(f"The results directory {self.root} cannot be used: {error.strerror}.") from None
        raise ResultsError(f"No free id is left under {raw}/{base}.")

    def ids(self) -> list[str]:
        """Return the ids of all experiments, oldest first."""
        raw = self.root / "raw"
        if not raw.is_dir():
            return []
        return sorted((e.name for e in os.scandir(raw) if e.is_dir() and ID.fullmatch(e.name)), key=_age)

    def find(self, text: str) -> ExperimentDir:
        """Return the experiment with an id or the beginning of one; raises `ResultsError` if not unique."""
        ids = self.ids()
        matches = [text] if text in ids else [name for name in ids if name.startswith(text)]
        if len(matches) == 1:
            return ExperimentDir(self.root / "raw" / matches[0])
        if matches:
            raise ResultsError(f"'{text}' fits {len(matches)} experiments, {matches[0]} and {matches[1]} among them.")
        close = nearest(text, ids) or ids[-1:]
        hint = f" Nearest: {', '.join(close)}." if close else ""
        raise ResultsError(f"There is no experiment '{text}' in {self.root}.{hint}")

    def is_aggregated(self, experiment_id: str) -> bool:
        """Tell whether the experiment has its row."""
        return (self.experiments_table / f"{experiment_id}.parquet").is_file()


def _age(experiment_id: str) -> tuple[str, int]:
    """Sort key: exp_20260102_030405_10 comes after exp_20260102_030405_9."""
    date, time, *suffix = [*experiment_id.removeprefix("exp_").split("_"), ""]
    return date + time, int(suffix[0]) if suffix[0].isdecimal() else 1


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
