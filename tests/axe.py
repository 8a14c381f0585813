"""axe-core, which checks pages for obstacles to people with disabilities, and its results for a page in Chromium.

`python -m tests.axe` downloads axe-core with npm into .nox/; `nox -s browser` runs this. Tests that need axe-core take
it from the fixture `axe_source`, which skips them, with the reason, if it is not there.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import pytest

VERSION = "4.14.1"
FILE = Path(__file__).parent.parent / ".nox" / f"axe-core-{VERSION}.js"
# The impacts that a page may not have; axe's others are "minor" and "moderate".
GRAVE = ("serious", "critical")

# Runs axe and leaves its violations in the page, so that they are in the DOM that Chromium prints.
RUN = """
const leave = (text) => {
  const place = document.createElement("pre");
  place.id = "axe-found";
  place.textContent = text;
  document.body.append(place);
};
addEventListener("load", () => setTimeout(() => axe.run(document, { resultTypes: ["violations"] })
  .then((found) => leave(JSON.stringify(found.violations)))
  .catch((error) => leave(JSON.stringify({ error: String(error) }))), 1000));
"""


@dataclass(frozen=True)
class Fault:
    """What axe found wrong with a page: its rule, how grave it is, and the elements that break the rule."""

    rule: str
    impact: str
    elements: tuple[str, ...]


@pytest.fixture(scope="session")
def axe_source() -> str:
    """The source of axe-core."""
    if not FILE.exists():
        pytest.skip(f"there is no {FILE.name}: run `python -m tests.axe`, which downloads it with npm")
    return FILE.read_text(encoding="utf-8")


def faults(page: Path, source: str, browse: Callable[..., Any], *options: str) -> list[Fault]:
    """Return the grave faults of a page that `browse` opens in Chromium.

    `browse` takes a page and Chromium's options and returns the finished process. The page is copied beside itself, and
    axe is put into the copy; a content security policy, which would forbid this, is taken out of it.
    """
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    head, end, tail = text.rpartition("</body>")
    assert end, f"{page.name} has no </body>"
    copy = page.with_name(f"{page.stem}.with-axe.html")
    copy.write_text(f"{head}<script>{source}</script><script>{RUN}</script>{end}{tail}", encoding="utf-8")
    try:
        dom = browse(copy, "--dump-dom", *options).stdout
    finally:
        copy.unlink()
    found = re.search(r'<pre id="axe-found">(.*?)</pre>', dom, re.DOTALL)
    assert found, f"axe did not finish on {page.name}"
    violations = json.loads(unescape(found[1]))
    assert isinstance(violations, list), violations
    return [_fault(each) for each in violations if each["impact"] in GRAVE]


def _fault(violation: dict[str, Any]) -> Fault:
    elements = tuple(" ".join(map(str, node["target"])) for node in violation["nodes"])
    return Fault(violation["id"], violation["impact"], elements)


def download() -> None:
    """Download axe-core with npm, unless it is there."""
    if FILE.exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", "--pack-destination", folder, f"axe-core@{VERSION}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=120)
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            member = archive.extractfile("package/axe.min.js")
            assert member is not None
            FILE.parent.mkdir(exist_ok=True)
            FILE.write_bytes(member.read())


if __name__ == "__main__":
    try:
        download()
    except (OSError, subprocess.SubprocessError) as error:
        sys.exit(f"axe-core cannot be downloaded: {error}")
