"""`lem.units`: the units of a table's columns survive what pandas does with the table, and no wrong unit appears."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pandas as pd
import pytest

import lem as library
from lem.record import PowerRecord, RequestRecord
from lem.results import parquet
from lem.results.schema import CycleRow, ExperimentRow
from lem.results.store import Store
from tests.records import finished, power


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """A results directory with two aggregated experiments, one of them with a power trace."""
    from lem.results.aggregate import aggregate

    store = Store(tmp_path_factory.mktemp("frames") / "results")
    power(finished(store))
    finished(store)
    for name in store.ids():
        aggregate(store, store.directory(name))
    return library.load(store.root)


def test_all_tables_have_the_units_of_the_schema(frames):
    for kind, frame in (
        (ExperimentRow, frames.experiments), (CycleRow, frames.cycles), (RequestRecord, frames.requests),
        (PowerRecord, frames.power),
    ):  # fmt: skip
        declared = {column.name: column.unit for column in parquet.columns(kind) if column.unit}
        assert declared
        assert library.units(frame) == declared == frame.attrs["units"]


def test_no_name_stands_for_two_units():
    """The units are found by the names alone."""
    found: dict[str, set[str | None]] = {}
    for kind in (ExperimentRow, CycleRow, RequestRecord, PowerRecord):
        for column in parquet.columns(kind):
            found.setdefault(column.name, set()).add(column.unit)
    assert [name for name, both in found.items() if len(both) > 1] == []


TIMES = ["experiment_id", "request", "finish_reason", "latency_s", "input_tokens"]
KEPT = {"latency_s": "s", "input_tokens": "token"}
OPERATIONS: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "selected": lambda of: of[TIMES],
    "filtered": lambda of: of[of["latency_s"] > 0],
    "located": lambda of: of.loc[of.index[1:], TIMES],
    "query": lambda of: of.query("latency_s > 0"),
    "sorted": lambda of: of.sort_values("latency_s").reset_index(drop=True),
    "copied": lambda of: of.copy(),
    "assigned": lambda of: of.assign(twice=2.0 * of["latency_s"]),
    "pickled": lambda of: pickle.loads(pickle.dumps(of)),
    "another renamed": lambda of: of.rename(columns={"experiment_id": "run"}),
    "concatenated": lambda of: pd.concat([of, of], ignore_index=True),
    "concatenated with others": lambda of: pd.concat([of, pd.DataFrame({"other": [1]})]),
    "merged": lambda of: of.merge(pd.DataFrame({"request": [0, 1], "label": ["a", "b"]}), on="request"),
    "on the right": lambda of: pd.DataFrame({"request": [0, 1]}).merge(of, on="request"),
    "joined": lambda of: of.join(pd.DataFrame({"label": ["a"] * len(of)})),
    "means": lambda of: of.groupby("request").mean(numeric_only=True),
    "named": lambda of: of.groupby("request").agg(
        latency_s=("latency_s", "max"), input_tokens=("input_tokens", "sum")
    ),
    "filled": lambda of: of[TIMES].fillna(0),
    "without names": lambda of: pd.DataFrame({name: list(of[name]) for name in TIMES}),
}  # fmt: skip


@pytest.mark.parametrize("how", OPERATIONS)
def test_units_survive(how, frames):
    found = library.units(OPERATIONS[how](frames.requests))
    assert {name: found.get(name) for name in KEPT} == KEPT
    assert set(found) <= set(frames.requests.columns)


@pytest.mark.parametrize("kind", ["parquet", "csv", "json", "pickle"])
def test_units_survive_a_file(kind, frames, tmp_path):
    file = tmp_path / f"runs.{kind}"
    getattr(frames.requests, f"to_{kind}")(file)
    found = library.units(getattr(pd, f"read_{kind}")(file))
    assert KEPT.items() <= found.items()


def test_the_tables_have_units_if_pandas_alone_reads_them(frames):
    found = pd.read_parquet(frames.root / "experiments")
    assert library.units(found) == library.units(frames.experiments)


def test_both_sides_of_a_merge_keep_their_units(frames):
    wanted = frames.requests[["request", "latency_s"]]
    both = wanted.merge(frames.cycles[["cycle", "duration_s"]], how="cross").merge(wanted, on="request")
    assert library.units(both) == {"latency_s_x": "s", "duration_s": "s", "latency_s_y": "s"}


def test_columns_with_levels(frames):
    requests = frames.requests
    several = requests.groupby("experiment_id")[["latency_s", "input_tokens"]].agg(["mean", "var", "count", "max"])
    assert library.units(several) == {
        ("latency_s", "mean"): "s", ("latency_s", "max"): "s",
        ("input_tokens", "mean"): "token", ("input_tokens", "max"): "token",
    }  # fmt: skip
    described = library.units(requests.groupby("experiment_id")[["latency_s"]].describe())
    assert [label[1] for label in described] == ["mean", "std", "min", "25%", "50%", "75%", "max"]
    pivoted = requests.pivot_table(index="request", columns="finish_reason", values=["latency_s"])
    assert library.units(pivoted) == {("latency_s", "length"): "s"}
    keyed = pd.concat({"a": requests[["latency_s"]], "b": requests[["latency_s"]]}, axis=1)
    assert library.units(keyed) == {("a", "latency_s"): "s", ("b", "latency_s"): "s"}
    of_own_function = requests.groupby("experiment_id")[["latency_s"]].agg(["mean", lambda values: values.var()])
    assert library.units(of_own_function) == {("latency_s", "mean"): "s"}


def test_a_series_is_a_column(frames):
    assert library.units(frames.experiments["energy_j"]) == {"energy_j": "J"}
    assert library.units(frames.experiments["model"]) == {}


def test_what_is_renamed_has_no_unit_unless_the_name_is_known_or_one_is_given(frames):
    wanted = frames.experiments[["energy_j", "duration_s"]]
    assert library.units(wanted.rename(columns={"energy_j": "cost"})) == {"duration_s": "s"}
    assert library.units(wanted.add_suffix("_before")) == {}
    assert library.units(wanted.rename(columns={"duration_s": "latency_mean_s"}))["latency_mean_s"] == "s"
    wanted["energy_kj"] = wanted["energy_j"] / 1000
    wanted.attrs["units"]["energy_kj"] = "kJ"
    assert library.units(wanted[["energy_kj"]]) == {"energy_kj": "kJ"}
    assert "energy_kj" not in frames.experiments.attrs["units"]


def test_other_quantities_have_no_unit(frames):
    counts = frames.requests.groupby("experiment_id")[["latency_s", "itl_s", "finish_reason"]].count()
    assert library.units(counts) == {}
    assert library.units(frames.requests.isna()) == {}
    assert library.units(frames.requests.T) == {}
    assert library.units(pd.DataFrame()) == {}
    assert library.units(pd.DataFrame({"other": [1.0], 3: [2.0]})) == {}


def test_attrs_that_are_not_lems_do_no_harm(frames):
    wanted = frames.experiments[["energy_j"]]
    wanted.attrs["units"] = "SI"
    assert library.units(wanted) == {"energy_j": "J"}
