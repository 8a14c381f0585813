"""Checks of all cells of a sweep before the first one runs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from lem.errors import BadInput, ConfigError
from lem.results import show
from lem.results.codec import to_json
from lem.results.directory import ExperimentDir
from lem.results.store import Store
from lem.runner.job import fingerprint
from lem.runner.preflight import Ready
from lem.spec.experiment import Dataset
from lem.workload.datasets import load_prompts
from lem.workload.prompts import Prompts


class RecentPrompts:
    """Loads prompts and remembers the last two sets: neighbouring cells mostly share theirs."""

    def __init__(self, size: int = 2) -> None:
        self._kept: OrderedDict[tuple[str, int], Prompts] = OrderedDict()
        self._size = size

    def __call__(self, dataset: Dataset, seed: int) -> Prompts:
        """Return the prompts; raises `DatasetError` when they cannot be had."""
        key = (to_json(dataset), seed)
        if key not in self._kept:
            self._kept[key] = load_prompts(dataset, seed)
        self._kept.move_to_end(key)
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)
        return self._kept[key]


class Unfinished:
    """Finds where the same experiment was left unfinished; gives each such to one cell only."""

    def __init__(self, *, fresh: bool) -> None:
        self._fresh = fresh
        self._given: set[Path] = set()

    def __call__(self, ready: Ready) -> ExperimentDir | None:
        """Return the newest one, or None where there is none, or all are to start anew."""
        if self._fresh:
            return None
        store = Store(Path(ready.experiment.io.results_dir))
        left_behind = [each for each in store.unfinished(fingerprint(ready)) if each.path not in self._given]
        if not left_behind:
            return None
        self._given.add(left_behind[-1].path)
        return left_behind[-1]


class Checks:
    """Checks the cells of a sweep and keeps what is wrong, so that all of it is told in one go."""

    def __init__(self) -> None:
        self._problems: list[tuple[str, str]] = []
        self._warnings: list[tuple[str, str]] = []

    def cell(self, label: str, check: Callable[[], Ready]) -> Ready | None:
        """Return the checked cell, or None after keeping its problems."""
        try:
            ready = check()
        except BadInput as error:
            self._problems += [(problem, label) for problem in str(error).splitlines()]
            return None
        self._warnings += [(f"Warning: {warning}", label) for warning in ready.warnings]
        return ready

    def conclude(self) -> None:
        """Raise all problems, or else show all warnings, each once with the cells that it is about."""
        if self._problems:
            raise ConfigError(*_each_once(self._problems))
        for warning in _each_once(self._warnings):
            show.console(stderr=True).print(warning, markup=False, style="yellow")


def _each_once(found: Iterable[tuple[str, str]]) -> list[str]:
    labels: dict[str, list[str]] = {}
    for text, label in found:
        labels.setdefault(text, []).append(label)
    # A problem of a file begins with the file's name.
    return [
        text if len(those) == 1 and those[0] in text else f"{text} [in {_first_of(those)}]"
        for text, those in labels.items()
    ]


def _first_of(labels: Sequence[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{labels[0]} and {len(labels) - 1} more"
