"""The built site in a real browser: nothing is loaded from a network, the search works, and axe finds no grave fault.

Run by `nox -s browser`, which installs Chromium and axe-core.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.axe import axe_source, grave  # noqa: F401 - a fixture
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


AT_ONCE = 8  # pages for one browser, so that it ends in time on a busy machine
# Opens one page after another in a frame, so that one browser checks all of them.
IN_FRAMES = """
const found = {};
const check = async (page) => {
  const frame = document.createElement("iframe");
  frame.width = 1280; frame.height = 900;
  await new Promise((loaded) => { frame.onload = loaded; frame.src = page; document.body.append(frame); });
  await new Promise((later) => setTimeout(later, 1000));
  const script = frame.contentDocument.createElement("script");
  script.textContent = SOURCE;
  frame.contentDocument.head.append(script);
  const result = await frame.contentWindow.axe.run(frame.contentDocument, { resultTypes: ["violations"] });
  found[page] = result.violations;
  frame.remove();
};
addEventListener("load", async () => {
  for (const page of PAGES) await check(page).catch((error) => { found[page] = String(error); });
  const place = document.createElement("pre");
  place.id = "axe-found";
  place.textContent = JSON.stringify(found);
  document.body.append(place);
});
"""


def faults_of_pages(folder, pages, source, *options):
    """Return axe's grave faults of pages in a folder, by page; an error in place of a list if axe failed."""
    names = [f"{page}.html" for page in pages]
    script = IN_FRAMES.replace("SOURCE", "document.getElementById('axe').textContent").replace(
        "PAGES", json.dumps(names)
    )
    harness = folder / "all-pages.html"
    axe = f'<script id="axe">{source}</script>'
    harness.write_text(f"<!doctype html><html><head>{axe}<script>{script}</script></head><body></body></html>")
    try:
        # The flag lets a page look into frames of other files; the time is virtual.
        dom = browse(harness, "--dump-dom", "--allow-file-access-from-files", "--virtual-time-budget=600000", *options)
    finally:
        harness.unlink()
    found = json.loads(unescape(re.search(r'<pre id="axe-found">(.*?)</pre>', dom.stdout, re.DOTALL)[1]))
    assert list(found) == names
    return {page: grave(each) if isinstance(each, list) else each for page, each in found.items()}


def test_a_grave_fault_is_found(tmp_path, axe_source):  # noqa: F811 - a fixture
    for name, alt in (("good", 'alt="A bar"'), ("bad", "")):
        page = f'<!doctype html><html lang="en"><title>x</title><body><main><h1>x</h1><img src="x" {alt}></main></body>'
        (tmp_path / f"{name}.html").write_text(page)
    found = faults_of_pages(tmp_path, ["good", "bad"], axe_source)
    assert found["good.html"] == []
    assert [fault.rule for fault in found["bad.html"]] == ["image-alt"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_grave_fault(site, axe_source, scheme):  # noqa: F811 - a fixture
    options = [DARK] if scheme == "dark" else []
    found = {}
    for first in range(0, len(PAGES), AT_ONCE):
        found |= faults_of_pages(site, PAGES[first : first + AT_ONCE], axe_source, *options)
    assert len(found) == len(PAGES)
    assert {page: faults for page, faults in found.items() if faults} == {}
