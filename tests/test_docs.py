"""The generated pages are up to date, and everything that the pages mention exists and works."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_fresh():
    for path, content in generator().pages().items():
        assert path.read_text(encoding="utf-8") == content, f"{path.name} is stale: run `python docs/generate.py`"


def test_every_option_on_the_reference_page_has_a_meaning():
    rows = [line for line in (ROOT / "docs" / "reference" / "cli.md").read_text().splitlines() if line.startswith("| ")]
    assert [row for row in rows if re.search(r"\|\s*\|$", row)] == []


def test_every_warning_that_is_made_is_in_the_catalogue_and_the_other_way_round():
    from lem.warning_codes import WARNINGS

    made = set()
    for path in (ROOT / "lem").rglob("*.py"):
        made |= set(re.findall(r'\bwarning\(\s*"(\w+)"', path.read_text()))
    assert made == set(WARNINGS)


def test_every_column_named_in_the_docs_exists():
    from lem.results.parquet import columns
    from lem.results.schema import ExperimentRow

    names = {column.name for column in columns(ExperimentRow)}
    (listed,) = re.findall(r"runs\[\[(.*)\]\]", (ROOT / "docs" / "how-to" / "results.md").read_text())
    assert set(re.findall(r'"(\w+)"', listed)) <= names


README_FILE = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]


def test_the_readmes_config_file_composes(tmp_path):
    from lem.config.compose import prepare

    (tmp_path / "my.yaml").write_text(README_FILE)
    composed = prepare(tmp_path / "my.yaml", []).experiment()
    assert (composed.dataset.name, composed.dataset.sample_size) == ("gsm8k", 200)
    assert composed.fp_precision == "float16"


@pytest.mark.parametrize("session", ["demo", "tests"])
def test_the_readme_begins_with_the_two_commands(session):
    assert f"python -m pip install nox && python -m nox -s {session}\n" in (ROOT / "README.md").read_text()


PAGES = sorted((ROOT / "docs").rglob("*.md")) + [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
NAMING_PATHS = [*PAGES, *sorted((ROOT / "conf").rglob("*.yaml")), ROOT / "noxfile.py", ROOT / "docs" / "generate.py"]
# A path in this repository; for `lem/energy/<name>.py` and the like, the folder is checked.
PATH = re.compile(r"(?<![\w/.-])(?:lem|tests|docs|bench|multirun|llenergymeasure)/[\w./*-]*")
STARTED = re.compile(r"-m ((?:lem|llenergymeasure)(?:\.\w+)+)")


@pytest.mark.parametrize("page", NAMING_PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_that_a_page_names_exists(page):
    named = {match.rstrip(".") for match in PATH.findall(page.read_text(encoding="utf-8"))}
    assert [path for path in sorted(named) if not any(ROOT.glob(path))] == []


def test_a_path_that_does_not_exist_is_found():
    named = PATH.findall("See `lem/spec.py`, docs/none.md, `tests/none/` and `lem/energy/<name>.py`; not my/lem/x.py.")
    assert named == ["lem/spec.py", "docs/none.md", "tests/none/", "lem/energy/"]
    assert [any(ROOT.glob(path)) for path in named] == [False, False, False, True]


# Modules that the changelog mentions by their former names.
MOVED = {"lem.worker", "lem.apps.experiment"}


def can_be_started(module):
    file = ROOT / f"{module.replace('.', '/')}.py"
    return file.exists() and "__main__" in file.read_text()


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_that_a_page_starts_can_be_started(page):
    named = set(STARTED.findall(page.read_text(encoding="utf-8")))
    assert [module for module in sorted(named - MOVED) if not can_be_started(module)] == []


def test_the_architecture_page_names_every_module():
    page = (ROOT / "docs" / "architecture.md").read_text()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "lem").rglob("*.py") if path.name != "__init__.py"}
    assert sorted(module for module in modules if f"`{module}`" not in page) == []


def test_the_architecture_page_has_the_direction_of_imports():
    page = (ROOT / "docs" / "architecture.md").read_text()
    (block,) = re.findall(r"## Direction of imports\n\n```\n(.*?)```", page, re.DOTALL)
    shown = [re.split(r" {2,}", line)[0] for line in block.splitlines()]
    layers, _ = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert shown == layers["layers"]
