"""Reading without what no row needs: the same values where there are any, the same errors, the same plans."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lem.record import (
    Carbon,
    CodedWarning,
    CpuLoad,
    DeviceState,
    EngineInfo,
    Environment,
    ErrorInfo,
    Flops,
    Memory,
    ModelInfo,
    Prefill,
    ProcessRecord,
    RequestRecord,
    WarmupInfo,
)
from lem.results.codec import (
    LEFT_OUT,
    BriefRow,
    changed,
    of_plan,
    read_plan,
    read_record,
    to_compact_json,
    to_json,
    whole,
)
from tests.records import plan, reading, record, requests

FULL = record(
    error=ErrorInfo("E", "it broke", "measured"),
    model=ModelInfo("m", "main", "A", 5, True, 10, "float32", "a", "int8"),
    engine=EngineInfo("pytorch", "1", "cpu", "a cpu", {"compile": "False"}),
    memory=Memory(5, "process", 3),
    flops=Flops(1e9, "formula"),
    carbon=Carbon(400.0, "test"),
    prefill=Prefill(1.0, 30.0, 2.0),
    warmup=WarmupInfo(3, "converged", 0.04),
    cpu_load=CpuLoad(2.0, 1.0),
    counters={"preemptions": 1.0},
    environment=Environment(
        "h", "os", "cpu", 8, 1, ("GPU",), {"torch": "2"}, devices_before=(DeviceState("GPU-0", 1980),)
    ),
    warnings=(CodedWarning("short_window", "it is short."),),
)


def check_same(brief, full, path):
    """Every field that is read has the value that the whole record has."""
    for f in fields(full):
        if f"{path}.{f.name}" in LEFT_OUT:
            assert not hasattr(brief, f.name)
            continue
        one, other = getattr(brief, f.name), getattr(full, f.name)
        if isinstance(other, tuple):
            assert len(one) == len(other)
            pairs = list(zip(one, other, strict=True))
        else:
            pairs = [(one, other)]
        for small, large in pairs:
            if is_dataclass(large):
                check_same(small, large, type(large).__name__)
            else:
                assert small == large, f"{path}.{f.name}"


def test_what_is_read_is_what_the_record_says():
    brief = read_record(to_json(FULL).encode())
    check_same(brief, FULL, "ProcessRecord")
    assert brief.phase("measured").duration_s == FULL.phase("measured").duration_s
    assert brief.phase("idle_before") is None


def test_nothing_is_left_out_that_there_is_not():
    types = {kind.__name__: kind for kind in (ProcessRecord, ModelInfo, EngineInfo, Environment, DeviceState)}
    types["EnergyReading"] = type(reading())
    for name in LEFT_OUT:
        kind, _, field = name.partition(".")
        assert field in {f.name for f in fields(types[kind])}, name


def test_a_row_has_all_fields():
    assert BriefRow.__struct_fields__ == tuple(f.name for f in fields(RequestRecord))
    (row,) = requests([4])
    assert whole(BriefRow(**vars(row))) == row


@pytest.mark.parametrize("damage", [lambda text: text[:-9], lambda text: text.replace(b'"rank"', b'"tank"')])
def test_a_damaged_record_is_no_record(damage):
    with pytest.raises(ValueError, match=r"truncated|required"):
        read_record(damage(to_json(FULL).encode()))


@given(st.integers() | st.text() | st.none())
def test_types_are_checked(value):
    content = to_compact_json(FULL).replace('"duration_s":4.0', f'"duration_s":{to_compact_json(value)}')
    if isinstance(value, int) and abs(value) < 2**63:
        assert read_record(content.encode()).phase("measured").duration_s == float(value)
    elif not isinstance(value, int):
        with pytest.raises(ValueError, match=r"duration_s|float"):
            read_record(content.encode())


def test_values_are_changed_in_either_kind():
    for each in (FULL, read_record(to_json(FULL).encode())):
        other = changed(each, status="failed")
        assert (other.status, each.status, other.rank) == ("failed", "completed", 0)


def test_a_plan_is_read_as_far_as_rows_need_it():
    whole_plan = plan(count=7, cycles=2, seed=11)
    for brief in (of_plan(whole_plan), read_plan(to_json(whole_plan).encode())):
        assert brief.config_json == to_compact_json(whole_plan.experiment)
        assert (brief.prompts.count, brief.experiment.seed, brief.experiment.cycles) == (7, 11, 2)
        assert brief.experiment.backend.name == "simulated"
        assert brief.overrides == list(whole_plan.overrides)


def test_a_plan_of_an_older_version_has_the_defaults_of_what_it_lacks():
    old = to_json(plan()).replace('"seed": 42,', "")
    assert '"seed"' not in old
    assert read_plan(old.encode()).experiment.seed == 42


def test_a_damaged_plan_is_no_plan():
    with pytest.raises(ValueError):  # noqa: PT011 - the words are those of the whole reader
        read_plan(to_json(plan()).encode()[:-30])
