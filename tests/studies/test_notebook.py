"""The example notebook and the examples in the docs run, and show what they say they show."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import lem

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOK = json.loads((DOCS / "notebooks" / "compare.ipynb").read_text(encoding="utf-8"))


def run(blocks: list[str], folder: Path, monkeypatch) -> dict[str, Any]:
    """Run blocks of code in one namespace, as a notebook does, in an empty directory; return the namespace."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"block {number}", "exec"), names)
    return names


def test_the_notebook_has_no_outputs():
    assert {cell["cell_type"] for cell in NOTEBOOK["cells"]} == {"markdown", "code"}
    for cell in NOTEBOOK["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
        assert "/" not in "".join(cell["source"]) or cell["cell_type"] == "markdown"  # no paths of a machine


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    code = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    names = run(code, tmp_path, monkeypatch)
    assert names["row"].status == "completed"
    assert names["row"].energy_source == "simulated"
    assert names["outcome"].is_complete
    (ratio,) = names["ratios"].query("measure == 'energy_per_request_j'")["ratio"]
    assert ratio == pytest.approx(64 / 16, rel=0.15)  # some requests end before their last token
    assert list(names["means"].columns) == ["long", "short"]
    assert names["by_arm"]["energy_j"].tolist() == pytest.approx((200 * names["by_arm"]["duration_s"]).tolist())
    assert lem.units(names["by_arm"]) == {"energy_j": "J", "duration_s": "s", "output_tokens_per_s": "token/s"}
    assert lem.units(names["latencies"])["latency_s", "max"] == "s"
    assert len(names["requests"]) == 2 * 3 * 8
    assert "the mean number of output tokens" in names["comparison"].objections[0].text
    assert "long needs" in capsys.readouterr().out


def test_the_examples_on_the_page_about_results_run(tmp_path, monkeypatch, capsys):
    """The blocks run one after another, and a value in a comment behind an expression is the value that it has."""
    page = (DOCS / "how-to" / "results.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## From Python\n(.*?)^## ", page, re.DOTALL | re.MULTILINE)
    names = run(re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE), tmp_path, monkeypatch)
    assert names["outcome"].is_complete
    assert "long has" in capsys.readouterr().out
    claims = re.findall(r"^(\S.*?)  # ([{\['\d].*)$", section, re.MULTILINE)
    assert len(claims) == 2
    for expression, value in claims:
        assert eval(expression, names) == eval(value), expression
