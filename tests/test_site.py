"""The built site in a real browser: nothing is loaded from a network, the search works, and axe finds no grave fault.

Run by `nox -s browser`, which installs Chromium and axe-core.
"""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.axe import axe_source, faults  # noqa: F401 - a fixture
from tests.reports.test_browser import browse, requested

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parent.parent
PAGES = sorted(path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md"))
DARK = "--blink-settings=preferredColorScheme=0"
# Elements that make a browser load what an attribute names; a link, `a`, is not one of them.
LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    if find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed: run nox -s dev")
    folder = tmp_path_factory.mktemp("built") / "site"
    program = Path(sys.executable).with_name("mkdocs")
    subprocess.run([str(program), "build", "--strict", "--quiet", "--site-dir", str(folder)], cwd=ROOT, check=True)
    return folder


class Loads(HTMLParser):
    """Collects what a page loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if (value := dict(attrs).get(LOADING.get(tag, ""))) is not None:
            self.found.append(value)


def from_a_network(addresses):
    return [each for each in addresses if re.match(r"(https?:)?//", each)]


def test_what_a_page_loads_is_found():
    page = '<a href="https://a.b">c</a><script src="//d/e.js"></script><link href="https://f/g.css"><img src="h.png">'
    assert from_a_network(Loads(page).found) == ["//d/e.js", "https://f/g.css"]


def test_no_file_of_the_site_names_something_to_load_from_a_network(site):
    pages, styles = list(site.rglob("*.html")), list(site.rglob("*.css"))
    assert len(pages) > len(PAGES)
    assert styles
    assert [each for page in pages for each in from_a_network(Loads(page.read_text()).found)] == []
    named = [
        each for style in styles for each in re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')]+)", style.read_text())
    ]
    assert from_a_network(named) == []


@pytest.mark.parametrize("page", ["index", "reference/results"])
def test_a_page_asks_a_network_for_nothing_and_logs_no_error(site, tmp_path, page):
    log = tmp_path / "net.json"
    done = browse(site / f"{page}.html", "--dump-dom", f"--log-net-log={log}")
    assert "CONSOLE" not in done.stderr, done.stderr
    assert requested(log) == []


def test_the_search_finds_a_word_in_pages_that_are_opened_as_files(site):
    page = site / "index.html"
    found = site / "search-for.html"
    # The theme searches for what stands in the address; a file's address takes no query here, so a script adds it.
    script = "<script>history.replaceState(null, '', '?q=carry-over')</script>"
    found.write_text(page.read_text().replace("<head>", f"<head>{script}", 1))
    dom = browse(found, "--dump-dom").stdout
    assert "how-to/campaigns.html" in "".join(re.findall(r'<a href="([^"]*)" class="md-search-result__link"', dom))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", PAGES, ids=str)
def test_axe_finds_no_grave_fault(site, axe_source, page, scheme):  # noqa: F811 - a fixture
    options = [DARK] if scheme == "dark" else []
    assert faults(site / page.with_suffix(".html"), axe_source, browse, *options) == []
