"""The ledger of a study's Slurm jobs; tests/slurm/test_leaving.py uses it with jobs on a real cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from lem.errors import ResultsError
from lem.results import jobs
from lem.results.jobs import Ledger, Terms, attending, awaited
from lem.results.store import Store
from lem.spec.slurm import SlurmOptions


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    options = SlurmOptions(partition="gpu", additional_parameters={"mail-type": "FAIL"})
    terms = Terms(
        slurm=options,
        cells_sha256="",
        head="config",
        fail_fast=True,
        write_tables=True,
        force=False,
        one_job=False,
        per_job=2,
        results_dirs=(str(tmp_path / "results"),),
        working_dir=str(tmp_path),
    )
    return Ledger.begin(tmp_path / "study", terms)


def test_a_ledger_is_read_as_it_was_recorded(ledger):
    ledger.submitting("array0000.json", [[0, 1], [2]])
    ledger.submitted(["7_0", "7_1"])
    ledger.submitting("array0001.json", [[3]])
    ledger.submitted([])
    ledger.submitting("array0002.json", [[3]])
    read = Ledger.read(ledger.directory)
    assert read == ledger
    assert read.terms.slurm.additional_parameters == {"mail-type": "FAIL"}
    assert list(read.accepted) == [("7_0", [0, 1]), ("7_1", [2])]
    assert read.unknown.file == "array0002.json"
    assert dict(read.tries()) == {0: 1, 1: 1, 2: 1}
    ledger.submitted([])
    ledger.refused()
    assert Ledger.read(ledger.directory).tries()[3] == 1


def test_a_line_that_was_not_written_to_its_end_is_ignored(ledger):
    ledger.submitting("array0000.json", [[0]])
    with (ledger.directory / jobs.FILE).open("a") as file:
        file.write('{"submitted": ["7')
    read = Ledger.read(ledger.directory)
    assert read.unknown is not None
    read.adopted(["7"])
    again = Ledger.read(ledger.directory)
    assert (again, again.adopted_ids) == (read, {"7"})


def test_a_study_is_awaited_until_its_outcome_has_been_shown(ledger, tmp_path):
    store = Store(tmp_path / "results")
    assert [each.directory for each in awaited(store)] == [ledger.directory]
    ledger.end()
    assert [each.is_over for each in awaited(store)] == [True]
    ledger.forget()
    assert awaited(store) == []
    assert list((store.root / jobs.FOLDER).iterdir()) == []


def test_marks_of_lost_or_damaged_studies_are_skipped(ledger, tmp_path):
    (ledger.directory / jobs.FILE).write_text("nonsense\n")
    folder = tmp_path / "results" / jobs.FOLDER
    (folder / "gone").write_text(f"{tmp_path / 'gone'}\n")
    (folder / "relative").write_text("study\n")
    (folder / "folder").mkdir()
    assert awaited(Store(tmp_path / "results")) == []
    with pytest.raises(ResultsError, match="cannot be read"):
        Ledger.read(ledger.directory)


def test_only_one_command_attends_to_a_study(tmp_path):
    with attending(tmp_path / "new" / "study") as first:
        assert first
        with attending(tmp_path / "new" / "study") as second:
            assert not second
    with attending(tmp_path / "new" / "study") as again:
        assert again
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="cannot be used: Not a directory"), attending(tmp_path / "file" / "study"):
        pass
