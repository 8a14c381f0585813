"""The import direction: units, errors < spec, record < families < stages < apps < cli, and Hydra only in apps."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lem"

# A module may import only from layers above its own in this list, or from its own family.
LAYERS = [
    {"_version", "errors", "quiet", "rules", "units"},
    {"spec", "record", "objection", "hub"},
    {"flops", "peaks", "batching", "gpu", "plan", "carbon", "doubts", "codec", "statistics", "columns", "traffic"},
    {"state", "brief", "latency"},
    {"journal", "merging"},
    {"headline"},
    {"averages"},
    {"host", "store", "progress", "conflicts", "ranks", "rows"},
    {"datasets", "energy", "parquet"},
    {"tiny", "tables"},
    {"models"},
    {"backends"},
    {"measure", "preflight", "aggregate", "launch", "report"},
    {"stopping"},
    {"worker", "job", "listing"},
    {"apps"},
    {"cli"},
    {"__main__"},
]
ONLY_IN_APPS = {"hydra", "omegaconf", "submitit"}


def modules():
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path):
    """Yield every imported module, those inside of functions included.

    Left out is what no importer meets: imports for type checkers alone, and of a module that is run as a program.
    """
    tree = ast.parse(path.read_text())
    apart = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in apart:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "lem":
            yield from (f"lem.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def layer(name: str) -> int:
    return next(i for i, members in enumerate(LAYERS) if name in members)


def test_every_module_has_a_layer():
    assert {room(path) for path in modules()} == set().union(*LAYERS)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    for name in imports(path):
        if name.startswith("lem."):
            other = name.split(".")[1]
            assert other == room(path) or layer(other) < layer(room(path)), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_hydra_ends_at_the_apps(path):
    if room(path) != "apps":
        assert not {name.split(".")[0] for name in imports(path)} & ONLY_IN_APPS


@pytest.mark.parametrize("family", ["backends", "datasets", "energy"])
def test_families_do_not_know_each_other(family):
    others = {"backends", "datasets", "energy"} - {family}
    for path in (PACKAGE / family).glob("*.py"):
        assert not {name.split(".")[1] for name in imports(path) if name.startswith("lem.")} & others


@pytest.mark.parametrize("path", [PACKAGE / "__init__.py", *modules()], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text()))
