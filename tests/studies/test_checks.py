"""What studies of thousands of cells do only once or now and then, and must do as thoroughly."""

from __future__ import annotations

import json

import pytest

from lem.results.directory import ExperimentDir
from lem.spec.experiment import Dataset, Experiment
from lem.studies.checks import RecentPrompts
from lem.studies.manifest import FILE, Cell, Manifest
from lem.workload.datasets import load_prompts

CELLS = 300


@pytest.mark.parametrize("size", [None, 1, 7, 100_000])
def test_prompts_drawn_from_a_kept_dataset_are_those_that_are_loaded(size):
    recent = RecentPrompts()
    for seed in (0, 1, 2):
        dataset = Dataset(name="sample", path="builtin:sample", sample_size=size)
        assert recent(dataset, seed) == load_prompts(dataset, seed)


@pytest.fixture
def manifest(tmp_path):
    cells = [Cell(f"cell {i}", Experiment(), (), None, "") for i in range(CELLS)]
    made = Manifest(tmp_path / "study", cells, "label")
    made.open()
    return made


def statuses(manifest):
    return [cell["status"] for cell in json.loads((manifest.directory / FILE).read_text())]


def test_many_changes_are_saved_together(manifest, tmp_path, monkeypatch):
    written = []
    write = Manifest._write
    monkeypatch.setattr(Manifest, "_write", lambda self: (written.append(0), write(self)))
    with manifest.together():
        for number in range(CELLS):
            manifest.claim(number, ExperimentDir(tmp_path / str(number)))
            with manifest.together():
                manifest.change(number, status="queued")
    assert statuses(manifest) == ["queued"] * CELLS
    assert len(written) < CELLS / 5
    with manifest.together():
        written.clear()
    assert not written
    manifest.change(0, status="failed")
    assert statuses(manifest)[:2] == ["failed", "queued"]


def test_changes_made_together_are_saved_after_an_error_too(manifest):
    def interrupted() -> None:
        with manifest.together():
            for number in range(CELLS):
                manifest.change(number, status="queued")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert statuses(manifest) == ["queued"] * CELLS
