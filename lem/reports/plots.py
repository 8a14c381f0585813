"""Writes the plots of a report as SVG and PNG files, sized for a column of a paper.

The package vl-convert draws them; it contains Vega-Lite and needs neither a browser nor a network. The module knows the
charts of a report, but nothing about its page.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lem.errors import ResultsError
from lem.reports.charts import COLORS, Chart, Spec
from lem.results.files import write_atomically

PACKAGE = "vl_convert"
# The version of Vega-Lite that draws the plots; vl-convert contains several.
VEGA_LITE = "6.4"
# A column of a two-column paper.
WIDTH_IN = 3.3
HEIGHT_IN = 2.0
# Bars are thinner than on a page.
BAR_SHARE = 2 / 3
# The number of panels side by side, the space between them, their height as a share of their width, and the width of
# the axis.
PANELS = 3
GAP_PX = 8
PANEL_SHARE = 0.7
AXIS_PX = 50
TEXT_PT = 8
PNG_PPI = 600
# SVG counts in pixels of this size. vl-convert takes a pixel for a 72nd of an inch, which `SCALE` corrects.
PX_PER_IN = 96
PT_PER_IN = 72
SCALE = PT_PER_IN / PX_PER_IN
FONT = "Liberation Sans, Arial, Helvetica, sans-serif"
INK, FAINT = "#000000", "#dddddd"
LONGEST_KEY = 80
# Three names of this many letters fit side by side in a legend.
SHORT_NAME = 10
FORMATS = ("svg", "png")


def check(folder: Path) -> None:
    """Raise `ResultsError` if plots cannot be drawn, or if the given path is a file."""
    if find_spec(PACKAGE) is None:
        raise ResultsError("--plots needs the package vl-convert-python (pip install 'lem[plots]').")
    if folder.exists() and not folder.is_dir():
        raise ResultsError(f"--plots: {folder} is not a directory; give the name of a directory.")


def files(charts: Sequence[Chart], folder: Path, *, force: bool) -> list[Path]:
    """Return the path of each chart's files, without a suffix.

    Raises:
        ResultsError: one of the files exists, and `force` is not set.
    """
    found = [folder / name for name in _names(charts)]
    there = [file for stem in found for suffix in FORMATS if (file := _with_suffix(stem, suffix)).exists()]
    if there and not force:
        raise ResultsError(f"--plots: {there[0]} already exists; use --force to replace it.")
    return found


def write(charts: Sequence[Chart], stems: Sequence[Path]) -> None:
    """Write each chart as SVG and PNG.

    Raises:
        ResultsError: a file cannot be written.
    """
    for chart, stem in zip(charts, stems, strict=True):
        svg, png = drawn(chart)
        try:
            stem.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(_with_suffix(stem, "svg"), svg)
            write_atomically(_with_suffix(stem, "png"), png)
        except OSError as error:
            raise ResultsError(f"--plots: {stem.parent} cannot be written: {error.strerror}.") from None


def drawn(chart: Chart) -> tuple[str, bytes]:
    """Return a chart as SVG and as PNG."""
    import vl_convert

    how: dict[str, Any] = {"vl_version": VEGA_LITE, "allowed_base_urls": []}
    spec = for_paper(chart)
    return vl_convert.vegalite_to_svg(spec, **how), vl_convert.vegalite_to_png(spec, scale=SCALE, ppi=PNG_PPI, **how)


def for_paper(chart: Chart) -> Spec:
    """Return the specification of a chart with the size and look of a figure in a paper: black on white."""
    if "facet" in chart.spec:
        return _panels_for_paper(chart)
    height_px = chart.spec["height"] * BAR_SHARE if "height" in chart.spec else HEIGHT_IN * PX_PER_IN
    return {
        **chart.spec,
        "description": chart.alt,
        "width": round(WIDTH_IN * PX_PER_IN),
        "height": height_px,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "padding": 2,
        "config": _config(_legend_columns(chart)),
    }


def _panels_for_paper(chart: Chart) -> Spec:
    """Do what `for_paper` does, for a chart with panels: set the size of each panel rather than of the chart."""
    width_px = math.floor((WIDTH_IN * PX_PER_IN - AXIS_PX) / PANELS) - GAP_PX
    facet = chart.spec["facet"] | {"header": {"labelLimit": width_px}}
    return {
        **chart.spec,
        "description": chart.alt,
        "columns": PANELS,
        "spacing": GAP_PX,
        "facet": facet,
        "spec": chart.spec["spec"] | {"width": width_px, "height": width_px * PANEL_SHARE},
        "padding": 2,
        "config": _config(_legend_columns(chart)),
    }


def _legend_columns(chart: Chart) -> int:
    """Return the number of columns of a chart's legend: three, or one if any name is too long for three."""
    longest = max((len(line[0]) for line in chart.lines if isinstance(line[0], str)), default=0)
    return 3 if longest <= SHORT_NAME else 1


def _config(legend_columns: int) -> Spec:
    text_px = TEXT_PT / PT_PER_IN * PX_PER_IN
    text = {"labelFontSize": text_px, "titleFontSize": text_px, "labelColor": INK, "titleColor": INK}
    plain = {"titleFontWeight": "normal"}
    return {
        "background": "white",
        "font": FONT,
        "axis": {**text, **plain, "domainColor": INK, "tickColor": INK, "gridColor": FAINT, "labelLimit": 110},
        "axisQuantitative": {"labelOverlap": "greedy", "labelSeparation": 4},
        "legend": {**text, **plain, "orient": "bottom", "columns": legend_columns, "labelLimit": 240, "symbolSize": 50},
        "mark": {"color": COLORS[0]},
        "point": {"size": 25},
        "range": {"category": COLORS},
        "view": {"stroke": FAINT},
    }


def _names(charts: Sequence[Chart]) -> list[str]:
    """Return a file name for each chart: its key in plain letters, numbered if an earlier chart has the same name."""
    found: list[str] = []
    for chart in charts:
        name = re.sub(r"[^a-z0-9_]+", "-", chart.key.lower()).strip("-")[:LONGEST_KEY] or "plot"
        number = 1 + sum(other == name or other.startswith(f"{name}--") for other in found)
        found.append(name if number == 1 else f"{name}--{number}")
    return found


def _with_suffix(stem: Path, suffix: str) -> Path:
    return stem.with_name(f"{stem.name}.{suffix}")
