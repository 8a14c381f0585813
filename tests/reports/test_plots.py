"""`lem results report --plots`: files of the right size for every plot, drawn by vl-convert where it is installed."""

from __future__ import annotations

import re
import struct
from dataclasses import replace
from importlib.util import find_spec
from xml.etree import ElementTree

import pytest

from lem.record import PowerRecord
from lem.reports import plots
from lem.reports.charts import PowerTrace, power_traces
from lem.reports.content import of_experiments
from lem.results.parquet import write_rows
from lem.results.store import Store
from tests.records import finished, power, reading

needs_vl_convert = pytest.mark.skipif(
    find_spec(plots.PACKAGE) is None, reason="vl-convert-python is not installed (pip install 'lem[plots]')"
)


@pytest.fixture
def store(lem, tmp_path):
    store = Store(tmp_path / "results")
    power(finished(store, energy=(reading(energy_j=100.0),)))
    finished(store, energy=(reading(energy_j=120.0, source="estimate"),))
    assert lem("aggregate", "--all").code == 0
    return store


@needs_vl_convert
def test_every_plot_becomes_two_files_as_wide_as_a_column(lem, store, tmp_path):
    done = lem("results", "report", "-o", str(tmp_path / "r.html"), "--plots", str(tmp_path / "plots"))
    assert done.code == 0, done.err
    charts = of_experiments(store, []).charts
    written = {file.name for file in (tmp_path / "plots").iterdir()}
    stems = {file.name for file in plots.files(charts, tmp_path / "none", force=False)}
    assert written == {f"{stem}.{suffix}" for stem in stems for suffix in plots.FORMATS}
    for stem in stems:
        root = ElementTree.fromstring((tmp_path / "plots" / f"{stem}.svg").read_text())
        assert float(root.get("width")) / plots.PX_PER_IN == pytest.approx(plots.WIDTH_IN, rel=0.01)
        assert "mark-" in (tmp_path / "plots" / f"{stem}.svg").read_text()
        header = (tmp_path / "plots" / f"{stem}.png").read_bytes()[:24]
        assert header[:4] == b"\x89PNG"
        (width,) = struct.unpack(">I", header[16:20])
        assert width / plots.PNG_PPI == pytest.approx(plots.WIDTH_IN, rel=0.01)


@needs_vl_convert
def test_existing_plots_are_kept_unless_forced(lem, store, tmp_path):
    arguments = ("results", "report", "-o", str(tmp_path / "r.html"), "--plots", str(tmp_path / "plots"))
    mine = tmp_path / "plots" / "energy-by-phase.png"
    mine.parent.mkdir()
    mine.write_text("mine")
    done = lem(*arguments)
    assert done.code == 2
    assert "energy-by-phase.png already exists; use --force to replace it" in done.err
    assert not (tmp_path / "r.html").exists()
    assert [file.name for file in mine.parent.iterdir()] == [mine.name]
    assert lem(*arguments, "--force").code == 0
    assert mine.read_bytes().startswith(b"\x89PNG")


@needs_vl_convert
def test_a_file_is_not_taken_for_a_directory(lem, store, tmp_path):
    (tmp_path / "plots").write_text("")
    done = lem("results", "report", "-o", str(tmp_path / "r.html"), "--plots", str(tmp_path / "plots"))
    assert done.code == 2
    assert "is not a directory" in done.err


def test_without_the_package_nothing_is_written(lem, store, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "PACKAGE", "a_package_that_is_not_installed")
    done = lem("results", "report", "-o", str(tmp_path / "r.html"), "--plots", str(tmp_path / "plots"))
    assert done.code == 2
    assert "pip install 'lem[plots]'" in done.err
    assert not (tmp_path / "r.html").exists()
    assert not (tmp_path / "plots").exists()


def test_force_needs_plots(lem, store):
    done = lem("results", "report", "--force")
    assert done.code == 2
    assert "--plots" in done.err


def test_plots_of_the_same_name_get_numbers_and_texts_become_plain(store):
    chart = of_experiments(store, []).charts[0]
    charts = [replace(chart, key=key) for key in ("power-a/../b", "power-A  b", "power-a-b", "é")]
    assert plots._names(charts) == ["power-a-b", "power-a-b--2", "power-a-b--3", "plot"]


@needs_vl_convert
def test_panels_are_drawn_within_the_column():
    samples = [{"t_s": i / 10, "device": "G", "power_w": 20.0 + i, "temperature_c": None} for i in range(40)]
    traces = [PowerTrace(f"experiment {n}", samples, [(0.0, 3.0, "window")]) for n in range(7)]
    svg, png = plots.drawn(power_traces(traces, "a note"))
    assert png.startswith(b"\x89PNG")
    assert all(f"experiment {n}" in svg for n in range(7))
    width_px = float(re.search(r'<svg[^>]* width="([\d.]+)"', svg)[1])
    assert 0.8 < width_px / (plots.WIDTH_IN * plots.PX_PER_IN) < 1.02


# ------------------------------------------------------------------ the temperature in the power trace
def test_temperatures_are_a_second_line_and_a_column_of_the_table(store):
    directory = store.directory(store.ids()[0])
    rows = [
        PowerRecord(directory.id, 0, 1, 1, i / 20, "gpu", "G", 100.0 + i % 3, 50 + i // 400 if i % 20 == 0 else None)
        for i in range(8_000)
    ]
    write_rows(directory.power_file(0, 1, 1), PowerRecord, rows)
    chart = next(each for each in of_experiments(store, [directory.id]).charts if each.key.startswith("power"))
    assert list(chart.headers) == ["time (s)", "device", "power (W)", "temperature (°C)"]
    known = [(t_s, temperature) for t_s, _, _, temperature in chart.lines if temperature is not None]
    assert known == [(row.t_s, row.temperature_c) for row in rows if row.temperature_c is not None]
    drawn = [each["temperature_c"] for each in chart.spec["layer"][-1]["data"]["values"]]
    assert drawn == [temperature for _, temperature in known]
    assert "temperature from 50 to 69 °C" in chart.alt


def test_without_temperatures_the_note_says_so(store):
    chart = next(each for each in of_experiments(store, [store.ids()[0]]).charts if each.key.startswith("power"))
    assert list(chart.headers) == ["time (s)", "device", "power (W)"]
    assert chart.note == "The temperature was not measured."
