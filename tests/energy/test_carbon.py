"""Carbon intensity over time: reading the file, weighting its values, and the CO2e of runs."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from lem.energy.carbon import WindowEnergy, carbon_of
from lem.energy.carbon_trace import read_carbon_trace
from lem.errors import BadInput
from lem.quantities import J_PER_KWH
from lem.record import Carbon
from lem.results.aggregate import Part, by_cycle, put_together
from lem.results.codec import excerpt_of
from lem.results.journal import Checkpoint, Window
from lem.results.rows import rows_of
from lem.spec.experiment import Energy
from tests.records import phases, plan, reading, record, requests

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)
HOURLY = "time,g/kWh\n2026-03-02T12:00Z,100\n2026-03-02T13:00+00:00,400\n2026-03-02T15:00+01:00,250\n"


def unknown(start_s, end_s):
    return None


@pytest.fixture
def trace(tmp_path):
    """Write a trace and return its path."""

    def write(text=HOURLY, name="grid.csv"):
        file = tmp_path / name
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(file)

    return write


# ------------------------------------------------------------------ the file
def test_the_times_have_their_offsets_and_the_digest_is_that_of_the_file(trace):
    path = trace("\ufeff" + HOURLY)
    found = read_carbon_trace(path)
    assert found.starts_s == tuple(NOON.timestamp() + 3600 * i for i in range(3))
    assert found.intensities == (100, 400, 250)
    assert found.end_s == NOON.timestamp() + 3 * 3600
    assert found.sha256 == hashlib.sha256(("\ufeff" + HOURLY).encode()).hexdigest()


def test_other_columns_and_blank_lines_are_ignored(trace):
    found = read_carbon_trace(trace("zone, g/kWh ,time\n\nDE,1.5,2026-03-02T12:00Z\n\nDE,0,2026-03-02T12:15Z\n"))
    assert (found.intensities, found.end_s - found.starts_s[0]) == ((1.5, 0), 1800)


def test_local_times_pass_through_the_change_of_the_clocks(trace):
    """On 25 October 2026, 02:00 comes twice in Berlin; the offsets tell the hours apart."""
    begin = datetime(2026, 10, 24, 22, tzinfo=UTC)
    times = [(begin + timedelta(hours=i)).astimezone(ZoneInfo("Europe/Berlin")) for i in range(6)]
    assert [at.hour for at in times] == [0, 1, 2, 2, 3, 4]
    found = read_carbon_trace(trace("time,g/kWh\n" + "".join(f"{at.isoformat()},{i}\n" for i, at in enumerate(times))))
    assert [found.at(begin.timestamp() + 3600 * i + 1800).intensity_g_per_kwh for i in range(6)] == [0, 1, 2, 3, 4, 5]


BAD = [
    ("", "has no column 'time'. The first line must be time,g/kWh."),
    ("t,g/kWh\n", "has no column 'time'."),
    ("time,gCO2/kWh\n2026-03-02T12:00Z,1\n", "has no column 'g/kWh'."),
    ("time,time,g/kWh\n", "has several columns 'time'."),
    ("time;g/kWh\n2026-03-02T12:00Z;1\n", "separated by semicolons. Separate them with commas."),
    ("time,g/kWh\n2026-03-02T12:00Z,1\n", "has fewer than two values. Give at least two"),
    ("time,g/kWh\n2026-03-02 noon,1\n", "line 2: '2026-03-02 noon' is not a time. Use ISO 8601"),
    ("time,g/kWh\n2026-03-02T12:00,1\n", "line 2: '2026-03-02T12:00' has no UTC offset. Add one"),
    ("time,g/kWh\n2026-03-02T12:00Z\n", "line 2: a value is missing."),
    (HOURLY + '2026-03-02T15:00Z,"1,5"\n', "line 5: '1,5' is not a number."),
    (HOURLY + "2026-03-02T15:00Z,\n", "line 5: '' is not a number."),
    (HOURLY + "2026-03-02T15:00Z,-1\n", "line 5: -1 g/kWh is not an intensity."),
    (HOURLY + "2026-03-02T15:00Z,nan\n", "line 5: nan g/kWh is not an intensity."),
    (HOURLY + "2026-03-02T14:00Z,1\n", "line 5: the time is the same as on line 4. Remove one of the two lines."),
    (HOURLY + "2026-03-02T11:00Z,1\n", "line 5: the time is earlier than on line 4. Sort the lines by time."),
    (HOURLY + "\n2026-03-02T17:00Z,1\n", "line 6: there is a gap: the time is 10800 s later than on line 4"),
    (HOURLY + "2026-03-02T14:15Z,1\n", "line 5: the times are closer together than before: the time is 900 s later"),
    (b"time,g/kWh\n\xff\xfe", "is not in UTF-8."),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_bad_file_is_refused_in_one_sentence_with_the_line_and_the_remedy(trace, text, message):
    path = trace(text)
    with pytest.raises(BadInput) as refused:
        read_carbon_trace(path)
    assert message in str(refused.value)
    assert path in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_file_and_a_directory_are_refused(tmp_path):
    with pytest.raises(BadInput, match=r"nowhere\.csv does not exist\."):
        read_carbon_trace(str(tmp_path / "nowhere.csv"))
    with pytest.raises(BadInput, match="is not a file"):
        read_carbon_trace(str(tmp_path))


# ------------------------------------------------------------------ the mean over a window
def test_a_window_within_an_hour_has_its_intensity(trace):
    found = read_carbon_trace(trace()).mean(NOON.timestamp() + 600, 3000, unknown)
    assert (found.intensity_g_per_kwh, found.by_energy) == (100, False)


def test_without_a_power_trace_the_hours_are_weighted_by_time(trace):
    # 30 minutes at 100, 60 minutes at 400 and 10 minutes at 250 g/kWh.
    found = read_carbon_trace(trace()).mean(NOON.timestamp() + 1800, 6000, unknown)
    assert found.intensity_g_per_kwh == pytest.approx((30 * 100 + 60 * 400 + 10 * 250) / 100)


def test_with_a_power_trace_the_hours_are_weighted_by_energy(trace):
    # 30 minutes at 50 W before 13:00, 30 minutes at 150 W after it: 90 kJ and 270 kJ.
    def energy_of(start_s, end_s):
        return 50.0 * (min(end_s, 1800) - min(start_s, 1800)) + 150.0 * (max(end_s, 1800) - max(start_s, 1800))

    found = read_carbon_trace(trace()).mean(NOON.timestamp() + 1800, 3600, energy_of)
    assert (found.intensity_g_per_kwh, found.by_energy) == (pytest.approx(0.25 * 100 + 0.75 * 400), True)


@pytest.mark.parametrize(("start_s", "duration_s"), [(-1, 2), (3 * 3600 - 1, 2), (3 * 3600, 0), (7 * 3600, 60)])
def test_outside_its_times_nothing_is_extrapolated(trace, start_s, duration_s):
    with pytest.raises(BadInput, match=r"covers 2026-03-02T.* but the run was measured at "):
        read_carbon_trace(trace()).mean(NOON.timestamp() + start_s, duration_s, unknown)


def test_a_window_may_end_exactly_at_the_end_of_the_trace(trace):
    assert read_carbon_trace(trace()).mean(NOON.timestamp() + 3 * 3600 - 60, 60, unknown).intensity_g_per_kwh == 250


@given(st.floats(0, 10_000), st.floats(0, 799))
def test_a_mean_lies_between_the_values_and_constant_power_weighs_like_time(tmp_path_factory, start_s, duration_s):
    file = tmp_path_factory.getbasetemp() / "constant.csv"
    file.write_text(HOURLY)
    trace = read_carbon_trace(str(file))
    by_time = trace.mean(NOON.timestamp() + start_s, duration_s, unknown).intensity_g_per_kwh
    by_energy = trace.mean(NOON.timestamp() + start_s, duration_s, lambda one, other: 70.0 * (other - one))
    assert 100 <= by_time <= 400
    assert by_energy.intensity_g_per_kwh == pytest.approx(by_time)


def test_the_source_names_the_file_and_the_weight(trace):
    path = trace(name="nl.csv")
    window = WindowEnergy(NOON.timestamp(), 60.0, unknown)
    found = carbon_of(Energy(carbon_trace=path), window)
    assert (found.source, found.until_unix_s) == ("energy.carbon_trace nl.csv, weighted by time", None)
    assert found.trace_sha256 == hashlib.sha256(HOURLY.encode()).hexdigest()
    assert carbon_of(Energy(carbon_trace=path), None) is None
    assert carbon_of(Energy(carbon_intensity_g_per_kwh=300.0), None).intensity_g_per_kwh == 300


# ------------------------------------------------------------------ attempts, cycles and killed processes
def carbon(intensity, source="energy.carbon_trace grid.csv, weighted by time", sha256="a" * 64):
    return Carbon(intensity, source, sha256)


def row_of(*records):
    parts = [Part(each, requests(cycle=each.cycle) if each.requests_completed else []) for each in records]
    cycles = max(each.cycle for each in records)
    return rows_of(put_together(excerpt_of(plan(cycles=cycles)), by_cycle(parts), 1)).row


def test_the_co2e_of_cycles_in_different_hours_is_the_mean_of_theirs():
    one = record(cycle=1, energy=(reading(energy_j=100.0),), carbon=carbon(100.0))
    two = record(requests(cycle=2), cycle=2, energy=(reading(energy_j=300.0),), carbon=carbon(400.0))
    row = row_of(one, two)
    assert row.co2e_g == pytest.approx((100 * 100 + 300 * 400) / 2 / J_PER_KWH)
    assert row.carbon_intensity_g_per_kwh == pytest.approx((100 * 100 + 300 * 400) / 400)
    assert row.carbon_trace_sha256 == "a" * 64
    assert row_of(one, replace(two, carbon=None)).co2e_g is None


def test_the_attempts_of_a_resumed_cycle_are_weighted_by_energy():
    first, last = requests([0]), requests([1, 2], attempt=2)
    parts = [
        Part(record(first, energy=(reading(energy_j=300.0),), carbon=carbon(100.0), status="interrupted"), first),
        Part(record(last, energy=(reading(energy_j=100.0),), carbon=carbon(400.0), attempt=2), last),
    ]
    row = rows_of(put_together(excerpt_of(plan()), by_cycle(parts), 2)).row
    assert (row.energy_j, row.carbon_intensity_g_per_kwh) == (400, pytest.approx(175))
    assert row.co2e_g == pytest.approx((300 * 100 + 100 * 400) / J_PER_KWH)
    parts[0] = Part(replace(parts[0].record, carbon=None), first)
    assert rows_of(put_together(excerpt_of(plan()), by_cycle(parts), 2)).row.co2e_g is None


def test_a_killed_process_has_co2e_only_if_the_intensity_did_not_change():
    opened = 1000.0
    killed = record(
        [], phases=phases()[:2], carbon=replace(carbon(100.0), until_unix_s=opened + 5), window_opened_unix_s=opened,
        status="interrupted",
    )  # fmt: skip
    checkpoint = Checkpoint(4.0, energy=(reading(energy_j=50.0),), energy_at_s=4.0)
    found = Window(killed, requests(), [checkpoint]).salvaged()
    assert found.carbon == carbon(100.0)
    later = Window(killed, requests(), [Checkpoint(6.0, energy=(reading(energy_j=50.0),), energy_at_s=6.0)]).salvaged()
    assert later.carbon is None
    assert "carbon_unknown" in {note.code for note in later.warnings}


# ------------------------------------------------------------------ the command
RUN = (
    "experiment", "-m", "any", "-d", "sample", "-n", "4", "backend=simulated", "backend.sleep=false",
    "energy=simulated", "energy.idle_s=0", "-y",
)  # fmt: skip


def hours(first, values):
    return "time,g/kWh\n" + "".join(f"{(first + timedelta(hours=i)).isoformat()},{v}\n" for i, v in enumerate(values))


def test_a_run_uses_the_intensity_of_its_hour(trace, lem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    now = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    path = trace(hours(now - timedelta(hours=1), [10, 20, 20, 20]))
    done = lem(*RUN, f"energy.carbon_trace={path}")
    assert done.code == 0, done.err
    assert "20 gCO2e/kWh, energy.carbon_trace grid.csv, weighted by time" in done.out
    (row,) = json.loads(lem("results", "list", "--json").out)
    assert row["co2e_g"] == pytest.approx(row["energy_j"] * 20 / J_PER_KWH)
    digest = hashlib.sha256((tmp_path / "grid.csv").read_bytes()).hexdigest()
    assert row["carbon_trace_sha256"] == digest


def test_outside_the_trace_co2e_is_null_with_a_warning(trace, lem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = lem(*RUN, f"energy.carbon_trace={trace()}")
    assert done.code == 0, done.err
    (row,) = json.loads(lem("results", "list", "--json").out)
    assert (row["co2e_g"], row["carbon_intensity_source"], row["carbon_trace_sha256"]) == (None, None, None)
    assert row["energy_j"] > 0
    (text,) = [text for text in row["warnings"] if text.startswith("carbon_unknown: ")]
    assert "covers 2026-03-02T" in text
    assert "– (see the warning)" in done.out


def test_a_bad_trace_is_refused_before_the_run(trace, lem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = lem(*RUN, f"energy.carbon_trace={trace(HOURLY + '2026-03-02T17:00Z,1')}")
    assert done.code == 2
    assert "line 5: there is a gap" in done.err
    assert "Traceback" not in done.err
