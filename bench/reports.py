"""Measures reports on thousands of experiments: their size, the cost of writing them, and how fast they open.

Run with `python -m bench.reports`; it takes minutes. The experiments are those of `bench.aggregation`, each with one
record. The cost of writing is measured by the kernel and includes start-up. Opening is timed in Chromium, if it is
installed: from the start of the page's navigation to the moment at which the page's script has drawn every chart. The
benchmark fails if a limit is exceeded.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.aggregation import LEM, Cost, cost, write_experiments
from bench.usage import is_within, parser, write_json

SHOWN, WRITTEN = 5_000, 20_000
SIZE_LIMIT_MB = 10
OPEN_LIMIT_S = 3.0
CPU_LIMIT_S = 10.0
MEMORY_LIMIT_MB = 500
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Writes into the page the time at which all charts have been drawn, in ms since the navigation began.
WATCH = """
const watch = () => {
  if (document.querySelectorAll(".plot:not([data-drawn])").length > 0) return;
  document.documentElement.dataset.openMs = document.documentElement.dataset.openMs || performance.now();
};
document.querySelectorAll(".plot").forEach((each) => new MutationObserver(watch).observe(each, { attributes: true }));
watch();
"""


def write_report(folder: Path, count: int) -> tuple[Path, Cost]:
    """Write experiments and a report on them; return the page and the cost of writing it."""
    results, page = folder / f"results-{count}", folder / f"{count}.html"
    write_experiments(results, count, 1)
    cost([*LEM, "aggregate", "--all", "-o", str(results)])
    return page, cost([*LEM, "results", "report", "--results-dir", str(results), "-o", str(page)])


def seconds_to_open(page: Path) -> float | None:
    """Return how long Chromium takes to open a page and draw its charts; None without Chromium.

    The time is infinite if Chromium does not draw all charts within a minute.
    """
    if CHROMIUM is None:
        return None
    watched = page.with_suffix(".watched.html")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    watched.write_text(text.replace("</body>", f"<script>{WATCH}</script></body>"))
    # The page runs in real time; in virtual time, a slow script would seem fast.
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--timeout=60000", "--dump-dom",
        f"--user-data-dir={page.parent / 'profile'}", watched.as_uri(),
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout
    found = re.search(r'data-open-ms="([\d.]+)"', dom)
    return float(found[1]) / 1e3 if found else float("inf")


def figures(count: int, size_mb: float, open_s: float | None, written: Cost) -> dict[str, Any]:
    """Return the figures of a report, with the limits that apply to its number of experiments."""
    is_shown = count == SHOWN
    return {
        "experiments": count,
        "size_mb": size_mb,
        "limit_size_mb": SIZE_LIMIT_MB if is_shown else None,
        "is_drawn": None if open_s is None else math.isfinite(open_s),
        "open_s": open_s,
        "limit_open_s": OPEN_LIMIT_S if is_shown else None,
        "writing_cpu_s": written.cpu_s,
        "limit_writing_cpu_s": None if is_shown else CPU_LIMIT_S,
        "writing_memory_mb": written.memory_mb,
        "limit_writing_memory_mb": None if is_shown else MEMORY_LIMIT_MB,
    }


def report(found: Mapping[str, Any]) -> None:
    """Print the figures of a report."""
    open_s = found["open_s"]
    opened = "not timed: there is no Chromium" if open_s is None else f"opened in {open_s:.2f} s"
    print(
        f"{found['experiments']} experiments: {found['size_mb']:.1f} MB, {opened}, "
        f"written in {found['writing_cpu_s']:.2f} s CPU with {found['writing_memory_mb']:.0f} MB"
    )


def main() -> int:
    """Measure and print everything; return 1 if a limit is exceeded."""
    options = parser(__doc__).parse_args()
    found = []
    with tempfile.TemporaryDirectory(prefix="lem-bench-") as folder:
        for count in (SHOWN, WRITTEN):
            page, written = write_report(Path(folder), count)
            found.append(figures(count, page.stat().st_size / 1e6, seconds_to_open(page), written))
            report(found[-1])
    print(
        f"limits: {SHOWN} experiments: {SIZE_LIMIT_MB} MB, {OPEN_LIMIT_S:g} s; "
        f"{WRITTEN} experiments: {CPU_LIMIT_S:g} s CPU, {MEMORY_LIMIT_MB} MB"
    )
    # JSON has no infinity.
    write_json(options.json, [each if each["is_drawn"] else each | {"open_s": None} for each in found])
    return int(not all(map(is_within, found)))


if __name__ == "__main__":
    sys.exit(main())
