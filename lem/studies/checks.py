"""Checks all cells of a study before the first one runs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lem.errors import BadInput, ConfigError
from lem.results.codec import to_json
from lem.results.directory import ExperimentDir
from lem.results.jobs import queued_in
from lem.results.store import Store
from lem.runner.job import fingerprint
from lem.runner.preflight import Ready
from lem.spec.experiment import Dataset
from lem.studies.ask import print_warnings, summary_of
from lem.studies.manifest import Cell
from lem.workload.datasets import load_prompts
from lem.workload.prompts import Prompts, draw


class RecentPrompts:
    """Loads prompts and keeps the last two datasets, because neighboring cells usually use the same one.

    A dataset is kept whole, so that cells with other seeds or sample sizes need only draw from it.
    """

    def __init__(self, size: int = 2) -> None:
        self._kept: OrderedDict[str, Prompts] = OrderedDict()
        self._size = size

    def __call__(self, dataset: Dataset, seed: int) -> Prompts:
        """Return the prompts; raises `DatasetError` if they cannot be loaded."""
        all_of_it = replace(dataset, sample_size=None)
        key = to_json(all_of_it)
        if key not in self._kept:
            self._kept[key] = load_prompts(all_of_it, seed)
        self._kept.move_to_end(key)
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)
        whole = self._kept[key]
        return replace(whole, texts=tuple(draw(whole.texts, dataset.sample_size, seed)))


@dataclass(frozen=True)
class Candidate:
    """A cell to be checked: `check` composes it and runs preflight, or raises `BadInput` if the cell cannot run."""

    label: str
    overrides: tuple[str, ...]
    config_file: Path | None
    check: Callable[[], Ready]


def checked(candidates: Iterable[Candidate], *, fresh: bool) -> list[Cell]:
    """Check all cells, and print each distinct warning once with the cells that it concerns.

    Args:
        candidates: the cells to check.
        fresh: do not resume unfinished experiments.

    Raises:
        ConfigError: some cells cannot run; the error lists all problems of all cells.
    """
    cells: list[Cell] = []
    problems: list[tuple[str, str]] = []
    warnings: list[tuple[str, str]] = []
    resumed: set[Path] = set()
    marked: dict[str, Mapping[str, Sequence[str]]] = {}
    for each in candidates:
        try:
            ready = each.check()
        except BadInput as error:
            problems += [(problem, each.label) for problem in error.problems]
            continue
        warnings += [(str(warning), each.label) for warning in ready.warnings]
        digest = fingerprint(ready)
        unfinished = None if fresh else _unfinished(ready.experiment.io.results_dir, digest, resumed, marked)
        # Only the description is kept, because the prompts of a hundred cells could fill the memory.
        words = summary_of(ready)
        cells.append(
            Cell(each.label, ready.experiment, each.overrides, each.config_file, words, unfinished, fingerprint=digest)
        )
    if problems:
        raise ConfigError(*_each_once(problems))
    print_warnings(*_each_once(warnings))
    return cells


def _unfinished(
    results_dir: str, digest: str, resumed: set[Path], marked: dict[str, Mapping[str, Sequence[str]]]
) -> ExperimentDir | None:
    """Return the newest unfinished run of the same experiment that no other cell and no job is resuming.

    `marked` caches the marks of unfinished experiments in each results directory, so that they are read only once.
    """
    store = Store(results_dir)
    if results_dir not in marked:
        queued = queued_in(store)
        found = store.marked_by_fingerprint().items()
        marked[results_dir] = {digest: [name for name in names if name not in queued] for digest, names in found}
    unfinished = store.unfinished(digest, marked[results_dir])
    left = [each for each in unfinished if each.path not in resumed]
    if not left:
        return None
    resumed.add(left[-1].path)
    return left[-1]


def _each_once(found: Iterable[tuple[str, str]]) -> list[str]:
    labels: dict[str, list[str]] = {}
    for text, label in found:
        labels.setdefault(text, []).append(label)
    result = []
    for text, (first, *others) in labels.items():
        more = f" and {len(others)} more" if others else ""
        # A problem in a file already begins with the file's name.
        result.append(text if first in text and not others else f"{text} [in {first}{more}]")
    return result
