"""The shape of the code: rooms, direction of imports, private names, docstrings. pyproject.toml lists the rooms."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lem"
MODULES = sorted(PACKAGE.rglob("*.py"))
# The only code that may import Hydra: the room that composes, and the plain Hydra app.
KNOW_HYDRA = {"config", "cli/hydra_app.py"}


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the import contracts of pyproject.toml on the package in a folder."""
    program = Path(sys.executable).with_name("lint-imports")
    command = [str(program), "--no-logo", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "lem", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_imports_go_down_without_a_circle(copy):
    done = lint_imports(copy)
    assert done.returncode == 0, done.stdout
    assert "2 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("spec/experiment.py", "import lem.runner.job", "Imports go down BROKEN"),
        ("quantities.py", "from lem import errors", "Imports go down BROKEN"),
        ("energy/base.py", "from lem.backends import base", "Imports go down BROKEN"),
        ("results/files.py", "import lem.results.store", "No circles, in a room or between rooms BROKEN"),
    ],
    ids=["upwards", "between the lowest", "between families", "a circle"],
)
def test_a_planted_import_is_found(copy, module, line, contract):
    file = copy / "lem" / module
    file.write_text(f"{file.read_text()}\n{line}\n")
    done = lint_imports(copy)
    assert done.returncode == 1
    assert contract in done.stdout


def test_the_top_shows_few_rooms_two_levels_deep():
    entries = {path.relative_to(PACKAGE).parts[0] for path in MODULES}
    assert len(entries) <= 17
    assert max(len(path.relative_to(PACKAGE).parts) for path in MODULES) == 2


def test_every_room_and_its_data_are_packaged():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packaged = {name.removeprefix("lem.") for name in setuptools["packages"] if name.startswith("lem.")}
    assert packaged - {"conf"} == folders(PACKAGE)
    data = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    places = {name: ROOT / name.replace(".", "/") for name in setuptools["package-data"] if name != "lem.conf"}
    found = [path for name, place in places.items() for g in setuptools["package-data"][name] for path in place.glob(g)]
    assert set(found) == data


# Folders of tests/ that are not rooms: a package that stands in for an engine, and a private cluster.
STANDINS = {"tensorrt_standin", "slurm"}


def folders(root: Path) -> set[str]:
    return {path.parent.name for path in root.glob("*/*.py")}


def test_the_tests_mirror_the_rooms():
    assert folders(ROOT / "tests") - STANDINS == folders(PACKAGE)


def imported(path: Path) -> set[str]:
    """Return the top-level names of all imported packages, including imports inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_hydra_stays_in_its_room(path):
    place = path.relative_to(PACKAGE)
    if not KNOW_HYDRA & {place.parts[0], str(place)}:
        assert not imported(path) & {"hydra", "omegaconf", "submitit"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def foreign_private_names(text: str) -> list[str]:
    """Return the private names of other lem modules that a module imports, or reaches through its imports."""
    tree = ast.parse(text)
    imports = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lem")
    ]
    aliases = [alias for node in imports for alias in node.names]
    bound = {alias.asname or alias.name for alias in aliases}
    reached = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound
    }
    return sorted(name for name in reached | {alias.name for alias in aliases} if is_private(name.rpartition(".")[2]))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def test_a_foreign_private_name_is_found():
    text = "from lem import __version__\nfrom lem.a import _b\nfrom lem.c import d\nd._e\nd.f\nself._g\n"
    assert foreign_private_names(text) == ["_b", "d._e"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_stay_in_their_module(path):
    assert foreign_private_names(path.read_text()) == []
