"""lem as a library: what it exports, that imports are lazy, and that the examples run."""

from __future__ import annotations

import doctest
import subprocess
import sys

import pandas as pd
import pytest

import lem
from lem import errors
from lem.results.parquet import names
from lem.results.schema import CycleRow, ExperimentRow
from lem.results.store import Store
from tests.records import finished, power

ERRORS = [
    "BadInput", "ConfigError", "DatasetError", "Interrupted", "LemError", "ModelError", "ResultsError", "RunError",
]  # fmt: skip
NAMES = [
    "CampaignOutcome", "Experiment", "Outcome", "__version__", "campaign", "compare", "load", "run", "units",
]  # fmt: skip


def test_the_public_names():
    assert sorted(lem.__all__) == sorted([*ERRORS, *NAMES])
    for name in lem.__all__:
        assert getattr(lem, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lem.nothing  # noqa: B018 - the access is the test


def test_every_error_is_exported():
    kinds = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, Exception)]
    assert sorted(each.__name__ for each in kinds) == ERRORS
    assert all(getattr(lem, each.__name__) is each for each in kinds)


def test_the_import_is_light():
    code = "import sys, lem; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"pydantic", "pandas", "pyarrow", "msgspec", "numpy", "torch", "hydra"} & set(loaded)
    assert [name for name in loaded if name.startswith("lem.")] == []


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    shared: dict[str, object] = {}  # the examples of `load` and `units` go on from those before them
    for function in (lem.run, lem.load, lem.units, lem.compare, lem.campaign):
        example = parser.get_doctest(function.__doc__ or "", shared, function.__name__, None, None)
        assert example.examples
        assert runner.run(example, clear_globs=False).failed == 0
        shared |= example.globs  # the parser has copied the names


# ------------------------------------------------------------------ load
@pytest.fixture
def results(lem, tmp_path):
    """A results directory with two aggregated experiments, one of them with a power trace."""
    store = Store(tmp_path / "results")
    power(finished(store))
    finished(store)
    assert lem("aggregate", "--all").code == 0
    return store.root


def test_tables_are_loaded_as_they_are(results):
    frames = lem.load(results)
    assert list(frames.experiments.columns) == names(ExperimentRow)
    assert list(frames.cycles.columns) == names(CycleRow)
    assert list(frames.experiments["energy_j"]) == [100.0, 100.0]
    assert (len(frames.cycles), len(frames.requests)) == (2, 6)
    assert list(frames.power["power_w"]) == [50.0, 60.0]
    pd.testing.assert_frame_equal(frames.requests, pd.read_parquet(results / "requests"), check_like=True)


def test_units_come_along(results):
    frames = lem.load(str(results))
    assert frames.experiments.attrs["units"]["energy_j"] == "J"
    assert frames.power.attrs["units"] == {"t_s": "s", "power_w": "W", "temperature_c": "°C"}
    assert "model" not in frames.experiments.attrs["units"]


def test_where_there_is_nothing_a_sentence_says_so(tmp_path):
    with pytest.raises(
        lem.ResultsError, match=r"nowhere has no tables; run lem aggregate --all -o .*nowhere to build them"
    ):
        lem.load(tmp_path / "nowhere")


def test_a_damaged_table_is_named_when_it_is_used(results):
    frames = lem.load(results)
    (file,) = (results / "cycles").iterdir()
    file.write_bytes(b"damaged")
    assert len(frames.experiments) == 2
    with pytest.raises(lem.ResultsError, match="cannot be read"):
        frames.cycles  # noqa: B018 - the access is the test
