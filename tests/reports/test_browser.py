"""Reports in a real browser: every chart is drawn, nothing is requested, and no error is logged.

Run by `nox -s browser`, which installs Chromium.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lem.results.store import Store
from tests.axe import axe_source, faults  # noqa: F401 - a fixture
from tests.conftest import command
from tests.records import finished, power, reading
from tests.reports.test_report import traced

pytestmark = pytest.mark.browser
DARK = ("--blink-settings=preferredColorScheme=0",)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SIMULATED = (
    "model=any", "backend=simulated", "backend.sleep=false", "backend.noise=0.02", "energy=simulated",
    "dataset=sample", "dataset.sample_size=8",
)  # fmt: skip


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page with the network off, and return Chromium's output."""
    assert CHROMIUM is not None, "there is no Chromium; run the session browser, which installs it"
    return subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
            "--virtual-time-budget=15000", f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip


def lem(root: Path, *arguments: str) -> str:
    """Run a command in a folder, and return its output."""
    done = command(*arguments, cwd=root)
    assert done.code == 0, done.err
    return done.out


def requested(log: Path) -> list[str]:
    """Return the addresses that a page asked for over the network, from the log, without those of Chromium itself."""
    events = [event.get("params") or {} for event in json.loads(log.read_text())["events"]]
    by_pages = [each for each in events if each.get("initiator", "not an origin") != "not an origin"]
    return [each["url"] for each in by_pages if not each["url"].startswith("file:")]


def test_a_request_would_be_noticed(tmp_path):
    (tmp_path / "page.html").write_text("<img src='http://example.invalid/a.png'>")
    browse(tmp_path / "page.html", "--dump-dom", f"--log-net-log={tmp_path / 'net.json'}")
    assert "http://example.invalid/a.png" in requested(tmp_path / "net.json")


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Pages of every kind: few and many experiments with traces, a sweep with two settings, a campaign, a schedule."""
    root = tmp_path_factory.mktemp("reports")
    store = Store(root / "results")
    power(finished(store, energy=(reading(energy_j=100.0),)))
    finished(store, energy=(reading(energy_j=120.0, source="estimate"),))
    lem(root, "aggregate", "--all", "-o", str(store.root))
    grid = ("batching.batch_size=1,2", "max_output_tokens=16,32", "--multirun", "-y", "-o", str(root / "grid"))
    lem(root, "experiment", *SIMULATED, *grid)
    for number in (1, 2):
        (root / f"arm{number}.yaml").write_text(f"model: any\nbatching: {{batch_size: {number}}}\n")
    arms = ("arm1.yaml", "arm2.yaml", "--campaign-name", "two", "-y", "-o", str(root / "campaign"))
    lem(root, "campaign", *arms, *SIMULATED[1:])
    schedule = ("--interval", "2s", "--duration", "7s", "-y", "--name", "often", "-o", str(root / "schedule"))
    lem(root, "schedule", *SIMULATED, *schedule)
    sweep = next((root / "multirun").iterdir())
    traced(root / "traces", 20)
    for name, arguments in {
        "experiments": ("--results-dir", str(store.root)),
        "grid": ("--grid", str(sweep)),
        "traces": ("--results-dir", str(root / "traces")),
        "schedule": ("--schedule", "often", "--results-dir", str(root / "schedule")),
        "campaign": ("--campaign", "two", "--results-dir", str(root / "campaign")),
    }.items():
        lem(root, "results", "report", *arguments, "-o", str(root / f"{name}.html"))
    return root


KINDS = {"experiments": 5, "grid": 4, "traces": 6, "campaign": 6, "schedule": 5}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [(), DARK, ("--window-size=500,900",)])
def test_every_chart_is_drawn_without_errors_or_requests(reports, tmp_path, kind, options):
    log = tmp_path / "net.json"
    done = browse(reports / f"{kind}.html", "--dump-dom", f"--log-net-log={log}", *options)
    plots = re.findall(r'<div class="plot"[^>]*>.*?(?=</section>)', done.stdout, re.S)
    assert len(plots) >= KINDS[kind]
    for plot in plots:
        assert 'data-drawn="yes"' in plot
        assert re.search(r'aria-roledescription="(bar|line|point|rect|rule|symbol)\b', plot), plot[:500]
        assert 'role="img" aria-label="Vega visualization"' not in plot
    assert "CONSOLE" not in done.stderr, done.stderr
    assert requested(log) == []


@pytest.mark.parametrize("options", [(), DARK], ids=["light", "dark"])
@pytest.mark.parametrize("kind", KINDS)
def test_axe_finds_no_grave_fault(reports, axe_source, kind, options):  # noqa: F811
    assert faults(reports / f"{kind}.html", axe_source, browse, *options) == []


def test_the_table_is_as_long_as_it_says_and_can_be_sorted(reports):
    dom = browse(reports / "grid.html", "--dump-dom").stdout
    assert "4 of 4 shown" in dom
    table = re.search(r'<table id="table">(.*?)</table>', dom, re.S)[1]
    assert table.count("<tr>") == 5  # the header, and a row for each experiment
    assert table.count(">copy command<") == 4


def test_the_page_prints(reports, tmp_path):
    browse(reports / "campaign.html", f"--print-to-pdf={tmp_path / 'r.pdf'}")
    content = (tmp_path / "r.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert len(content) > 20_000


@pytest.mark.parametrize("window_px", [500, 1280])
def test_a_chart_with_panels_is_as_wide_as_the_others(reports, window_px):
    dom = browse(reports / "traces.html", "--dump-dom", f"--window-size={window_px},900").stdout
    plots = re.findall(r'aria-label="([^"]*)"[^>]*><div[^>]*><svg[^>]* width="(\d+)"', dom)
    (panels_px,) = [int(width) for label, width in plots if "panel" in label]
    widest_px = max(int(width) for label, width in plots if "panel" not in label)
    assert 0.9 * widest_px <= panels_px <= widest_px


def test_the_numbers_of_the_page_are_those_of_the_json(reports):
    dom = browse(reports / "grid.html", "--dump-dom").stdout
    found = json.loads(re.search(r'id="content">(.*?)</script>', dom, re.S)[1])
    listed = json.loads(lem(reports, "results", "list", "--json", "-o", str(reports / "grid")))
    names = [head for head, _ in found["columns"]]
    energies = {row[0]: row[names.index("energy")] for row in found["rows"]}
    assert energies == {row["experiment_id"]: row["energy_j"] for row in listed}
