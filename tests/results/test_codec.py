"""Records and plans as JSON are either read back as they were written, or refused."""

from __future__ import annotations

import json

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
    WarmupInfo,
)
from lem.results.codec import excerpt_of, from_json, read_excerpt, to_json, to_plain
from tests.records import plan, record

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


def test_what_is_read_is_what_was_written():
    read = from_json(ProcessRecord, to_json(FULL))
    assert read == FULL
    assert read.phase("measured").duration_s == FULL.phase("measured").duration_s
    assert read.phase("idle_before") is None


def test_what_another_version_wrote_beside_it_is_ignored():
    assert from_json(ProcessRecord, to_json(FULL).replace('"rank"', '"later": [1], "rank"')) == FULL


@pytest.mark.parametrize("damage", [lambda text: text[:-9], lambda text: text.replace(b'"rank"', b'"tank"')])
def test_a_damaged_record_is_no_record(damage):
    with pytest.raises(ValueError, match=r"truncated|required"):
        from_json(ProcessRecord, damage(to_json(FULL).encode()))


@given(st.integers(max_value=2**62 - 1) | st.integers(min_value=2**63) | st.text() | st.none())
def test_types_are_checked(value):
    content = to_json(FULL).replace('"duration_s": 4.0', f'"duration_s": {json.dumps(value)}')
    if isinstance(value, int) and 0 <= value < 2**62:
        assert from_json(ProcessRecord, content).phase("measured").duration_s == float(value)
    else:
        with pytest.raises(ValueError, match=r"duration_s|float"):
            from_json(ProcessRecord, content)


def test_a_plan_is_read_as_far_as_rows_need_it():
    whole = plan(count=7, cycles=2, seed=11)
    for excerpt in (excerpt_of(whole), read_excerpt(to_json(whole).encode())):
        assert json.loads(excerpt.config_json) == to_plain(whole.experiment)
        assert (excerpt.prompts.count, excerpt.experiment.seed, excerpt.experiment.cycles) == (7, 11, 2)
        assert excerpt.experiment.backend.name == "simulated"
        assert excerpt.overrides == list(whole.overrides)


def test_a_plan_of_an_older_version_has_the_defaults_of_what_it_lacks():
    old = to_json(plan()).replace('"seed": 42,', "")
    assert '"seed"' not in old
    assert read_excerpt(old.encode()).experiment.seed == 42


def test_a_damaged_plan_is_no_plan():
    with pytest.raises(ValueError):  # noqa: PT011 - the words are those of the whole reader
        read_excerpt(to_json(plan()).encode()[:-30])
