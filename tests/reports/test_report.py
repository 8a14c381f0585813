"""`lem results report`: that a page has the numbers of the tables, and that nothing in it becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tempfile
from collections import Counter
from dataclasses import replace as changed
from datetime import datetime, timedelta
from html.parser import HTMLParser

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from lem.record import ErrorInfo, PowerRecord
from lem.reports import charts
from lem.reports.content import COLUMNS, MOST_SAMPLES, of_experiments
from lem.reports.page import SCRIPTS, embedded, page
from lem.results.aggregate import aggregate_all, read
from lem.results.parquet import write_rows
from lem.results.plan import State
from lem.results.store import Store
from tests.records import AT, experiment, finished, power, put, reading, record, requests

EVIL = "<img src=x onerror=alert(1)></script><script>alert(2)</script>\u202e\x1b[31m"


def _completed_row():
    with tempfile.TemporaryDirectory() as folder:
        return read(finished(Store(folder))).row


ROW = _completed_row()


class Elements(HTMLParser):
    """Collects the elements of a page, and the text of its tables and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data: dict[str, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.data.setdefault(self.tags[-1][0] if self.tags else "", []).append(data)


def content_of(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="content">(.*?)</script>', text, re.S)[1])


@pytest.fixture
def store(lem, tmp_path):
    """A results directory with two completed experiments, one of them with a power trace, and a failed one."""
    store = Store(tmp_path / "results")
    power(finished(store, energy=(reading(energy_j=100.0),)))
    finished(store, energy=(reading(energy_j=120.0, source="estimate"),))
    failed = experiment(store, datetime(2026, 1, 3))
    put(failed, replace(record(requests([0]), status="failed"), error=ErrorInfo("RunError", EVIL)), requests([0]))
    failed.write_state(State("failed", 1, AT))
    assert lem("aggregate", "--all", "--no-strict").code == 0
    return store


def test_the_numbers_are_those_of_the_table(lem, store, tmp_path):
    file = tmp_path / "r.html"
    assert lem("results", "report", "-o", str(file)).code == 0
    found = content_of(file.read_text())
    table = pd.read_parquet(store.root / "experiments").set_index("experiment_id")
    assert len(found["rows"]) == len(table) == 3
    for values in found["rows"]:
        row = table.loc[values[0]]
        for name, value in zip(COLUMNS, values, strict=True):
            expected = row.get(name, values[0])
            if name == "started_at":
                assert value == expected[:16].replace("T", " ")
            elif value is None:
                assert pd.isna(expected)
            else:
                assert value == expected


def test_every_chart_has_a_text_and_a_table_with_its_values(lem, store):
    found = of_experiments(store, [])
    headings = [chart.heading for chart in found.charts]
    assert headings == [
        "Energy of the window by component",
        "Energy by phase",
        f"Power of {store.ids()[0]}",
        "Distribution of latency",
        "Throughput and energy per token",
    ]
    by_component = found.charts[0]
    assert [line[2] for line in by_component.lines] == [100.0, 120.0]
    assert [line[3] for line in by_component.lines] == ["counter", "estimate"]
    assert by_component.note.startswith("The energies of some experiments are estimates.")
    for chart in found.charts:
        assert chart.alt
        assert chart.lines
        assert all(len(line) == len(chart.headers) for line in chart.lines)


def test_a_distribution_has_the_percentiles_of_its_values():
    chart = charts.distributions("Latency", "s", {"a": [i / 100 for i in range(1, 101)], "lone": [1.0]})
    assert chart.lines == [("a", 100, 0.5, 0.95, 0.99)]
    points = chart.spec["data"]["values"]
    assert [points[0]["value"], points[-1]["value"]] == [0.01, 1.0]
    assert points[-1]["share"] == 1
    assert charts.distributions("Latency", "s", {"lone": [1.0]}) is None


@given(st.lists(st.tuples(st.floats(1, 100), st.floats(0.1, 10)), min_size=1, max_size=30))
def test_no_experiment_beats_the_pareto_front(points):
    rows = [replace(ROW, output_tokens_per_s=speed, energy_per_output_token_j=cost) for speed, cost in points]
    front = [(row.output_tokens_per_s, row.energy_per_output_token_j) for row in charts._pareto(rows)]

    def beats(one, other):
        return one[0] >= other[0] and one[1] <= other[1] and one != other

    assert not any(beats(point, member) for point in points for member in front)
    assert all(point in front or any(beats(m, point) for m in front) for point in points)


def test_two_settings_that_vary_make_a_heat_map():
    config = json.loads(ROW.config_json)
    rows = [
        replace(ROW, config_json=json.dumps(config | {"seed": seed, "cycles": cycles}), energy_per_output_token_j=value)
        for seed, cycles, value in ((1, 1, 1.0), (1, 10, 2.0), (2, 1, 3.0), (2, 10, None))
    ]
    chart = charts.heat_map(rows)
    # A cell without a value is left out, not shown as 0.
    assert chart.lines == [("1", "1", 1.0), ("1", "10", 2.0), ("2", "1", 3.0)]
    assert chart.spec["encoding"]["y"]["sort"] == ["1", "10"]
    assert charts.heat_map(rows[:2] * 2) is None


def trace_of(store, directory):
    return next(each for each in of_experiments(store, [directory.id]).charts if each.heading.startswith("Power"))


def test_a_long_trace_is_thinned_out_for_each_device(store):
    directory = store.directory(store.ids()[0])
    # Two devices that are read in turn.
    samples = [PowerRecord(directory.id, 0, 1, 1, i / 10, "gpu", f"G{i % 2}", 50.0 + i % 7) for i in range(20_000)]
    write_rows(directory.power_file(0, 1, 1), PowerRecord, samples)
    chart = trace_of(store, directory)
    assert MOST_SAMPLES <= len(chart.lines) <= 2 * MOST_SAMPLES
    counts = Counter(device for _, device, _ in chart.lines)
    assert counts["G0"] == counts["G1"]


def test_the_trace_is_that_of_the_last_cycle_with_its_own_window(lem, store):
    directory = experiment(store, datetime(2026, 1, 4), cycles=10)
    for cycle in range(1, 11):
        known = {"cycle": cycle, "config_sha256": directory.plan().config_sha256}
        put(directory, record(duration_s=float(cycle), **known), requests())
        sample = PowerRecord(directory.id, 0, cycle, 1, 0.5, "gpu", "G", 100.0 + cycle)
        write_rows(directory.power_file(0, cycle, 1), PowerRecord, [sample])
    lem("aggregate", "--all", "--no-strict")
    chart = trace_of(store, directory)
    assert chart.heading.endswith("cycle 10")
    assert [power_w for _, _, power_w in chart.lines] == [110.0]
    phases = chart.spec["layer"][0]["data"]["values"]
    assert phases == [{"from_s": 0.0, "to_s": 10.0, "phase": "window"}]


def traced(root, count, samples=40, **more):
    """Write experiments of rising power, each with a trace."""
    store = Store(root)
    for i in range(count):
        energy = (reading(energy_j=100.0 + i),)
        directory = finished(store, datetime(2026, 1, 5) + timedelta(minutes=i), energy=energy, **more)
        trace = [PowerRecord(directory.id, 0, 1, 1, t / 10, "gpu", "G", 20.0 + i) for t in range(samples)]
        write_rows(directory.power_file(0, 1, 1), PowerRecord, trace)
    list(aggregate_all(store, store.ids()))
    return store


def panels(store, ids=()):
    """Return the chart with a panel for each experiment, and the names of the panels."""
    (chart,) = [each for each in of_experiments(store, list(ids)).charts if each.key == "power-traces"]
    return chart, list(dict.fromkeys(line[0] for line in chart.lines))


def test_more_than_four_traces_share_a_chart(tmp_path):
    store = traced(tmp_path / "results", 6)
    (store.directory(store.ids()[5]).power_file(0, 1, 1)).unlink()
    chart, names = panels(store)
    assert names == store.ids()[:5] == chart.spec["facet"]["sort"]
    assert chart.heading == "Power of 5 experiments"
    assert chart.note == (
        "All panels have the same scales, and the measured window is shaded. Experiments without a trace: 1 of 6."
    )
    windows = [each for each in chart.spec["data"]["values"] if "to_s" in each]
    assert [(each["name"], each["from_s"], each["to_s"]) for each in windows] == [(name, 0.0, 4.0) for name in names]
    assert [power_w for name, _, _, power_w in chart.lines if name == names[3]] == [23.0] * 40
    assert chart.alt == "One panel for each experiment (5): power from 20 to 24 W."


def test_of_many_traces_the_page_says_which_are_drawn(lem, tmp_path):
    store = traced(tmp_path / "results", 40)
    chart, names = panels(store)
    assert len(names) == 16
    assert {store.ids()[0], store.ids()[-1]} <= set(names)
    assert chart.note.startswith(
        "Of 40 experiments with a trace, 16 are drawn: those with the lowest and the highest average power, and others "
        "at even steps in between. To choose others, name up to 16 experiments: lem results report ID ID …."
    )
    assert lem("results", "report", "-o", "page.html").code == 0
    assert "Of 40 experiments with a trace, 16 are drawn" in (tmp_path / "page.html").read_text()
    others = store.ids()[1:17]
    assert panels(store, others)[1] == others


def test_panels_together_have_no_more_samples_than_one_trace(tmp_path):
    chart, names = panels(traced(tmp_path / "results", 16, samples=2_000))
    assert len(names) == 16
    assert MOST_SAMPLES // 2 <= len(chart.lines) <= 2 * MOST_SAMPLES


def test_a_table_that_is_not_printed_is_said_to_be_missing(store, tmp_path):
    directory = store.directory(store.ids()[0])
    trace = [PowerRecord(directory.id, 0, 1, 1, i / 10, "gpu", "G", 50.0) for i in range(201)]
    write_rows(directory.power_file(0, 1, 1), PowerRecord, trace)
    text = page(of_experiments(store, [directory.id]), "now")
    assert text.count(" is not printed") == 1
    note = "The table of the values (201 rows) is not printed; the page shows it on screen."
    assert f'<p class="on-paper">{note}</p>' in text
    write_rows(directory.power_file(0, 1, 1), PowerRecord, trace[:-1])
    assert " is not printed" not in page(of_experiments(store, [directory.id]), "now")


def test_a_damaged_trace_is_named(store):
    directory = store.directory(store.ids()[0])
    directory.power_file(0, 1, 1).write_bytes(b"PAR1 nothing")
    found = of_experiments(store, [directory.id])
    assert any("power_0_c1_a1.parquet cannot be read" in problem for problem in found.problems)


# ------------------------------------------------------------------ safety
def test_texts_are_shown_and_never_become_markup(store):
    found = of_experiments(store, [])
    rows = [replace(row, model=EVIL, device=EVIL, warnings=[f"few_samples: {EVIL}"]) for row in found.rows]
    text = page(changed(found, rows=rows), AT)
    elements = Elements(text)
    tags = [tag for tag, _ in elements.tags]
    assert tags.count("script") == len(SCRIPTS) + 1
    assert "img" not in tags
    assert not any(name.startswith("on") for _, attributes in elements.tags for name in attributes)
    shown = EVIL.replace("\u202e", "\\u202e").replace("\x1b", "\\u001b")
    assert any(shown in part for part in elements.data["td"])
    assert content_of(text)["rows"][0][list(COLUMNS).index("model")] == EVIL


FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(st.recursive(st.text() | FINITE | st.none(), st.lists, max_leaves=8))
def test_embedded_data_read_back_and_cannot_end_their_script(value):
    text = embedded(value)
    assert not {"<", ">", "&"} & set(text)
    assert json.loads(text) == value


def test_embedded_numbers_that_are_not_finite_are_null():
    assert json.loads(embedded({"a": [float("nan"), float("inf"), 1.5]})) == {"a": [None, None, 1.5]}


def test_the_page_forbids_the_network_and_all_scripts_but_its_own(store):
    text = page(of_experiments(store, []), AT)
    policy = next(a["content"] for tag, a in Elements(text).tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    assert "connect-src" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert len(scripts) == len(SCRIPTS)
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_no_element_loads_anything(store):
    found = Elements(page(of_experiments(store, []), AT)).tags
    assert not [tag for tag, attributes in found if {"src", "href", "srcset", "action"} & set(attributes)]


# ------------------------------------------------------------------ the command
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "There is no experiment 'nothing'"),
        (["--campaign", "nothing"], "no campaign 'nothing'"),
        (["--schedule", "nothing"], "no schedule 'nothing'"),
        (["--grid", "nowhere"], "--grid"),
        (["x", "--campaign", "y"], "alternatives"),
        (["--output", "/dev/null/r.html"], "cannot be written"),
    ],
)
def test_bad_input_ends_with_2(lem, store, arguments, words):
    done = lem("results", "report", *arguments)
    assert done.code == 2
    assert words in done.err


def test_an_empty_directory_has_nothing_to_report_on(lem, tmp_path):
    done = lem("results", "report", "--results-dir", str(tmp_path / "none"))
    assert done.code == 2
    assert "has no experiments to report on" in done.err


def test_a_failed_run_has_its_reason(lem, store, tmp_path):
    file = tmp_path / "r.html"
    lem("results", "report", store.ids()[-1], "-o", str(file))
    elements = Elements(file.read_text())
    assert any("Experiments that did not complete" in part for part in elements.data["h3"])
    assert any("onerror" in part for part in elements.data["td"])


def test_a_command_that_repeats_the_experiment_is_offered(lem, store, tmp_path):
    file = tmp_path / "r.html"
    lem("results", "report", store.ids()[0], "-o", str(file))
    assert content_of(file.read_text())["commands"] == ["lem experiment seed=1"]
