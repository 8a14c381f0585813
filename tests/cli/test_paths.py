"""Paths that begin with a tilde: the home directory, another user's, or that of a user who does not exist."""

from __future__ import annotations

import pytest

from lem.errors import BadInput
from lem.spec.paths import expanded
from tests.conftest import SIMULATED

COMMANDS = [
    ("experiment", *SIMULATED, "-d", "~nosuch/p.txt"),
    ("experiment", *SIMULATED[:4], "-p", "~nosuch/p.txt"),
    ("experiment", *SIMULATED, "-o", "~nosuch/r"),
    ("experiment", *SIMULATED, "-o", "~nosuch/r", "--dry-run"),
    ("experiment", *SIMULATED, "-o", "~nosuch/r", "--multirun", "seed=1,2"),
    ("experiment", "-m", "~nosuch/m", "-d", "sample", "--dry-run"),
    ("experiment", "-m", "tiny", "-d", "sample", "adapter='~nosuch/a'", "--dry-run"),
    ("experiment", "--resume", "exp_20260102_030405", "-o", "~nosuch/r"),
    ("experiment", "~nosuch/c.yaml"),
    ("results", "list", "-o", "~nosuch/r"),
    ("results", "show", "exp_20260102_030405", "-o", "~nosuch/r"),
    ("aggregate", "--all", "-o", "~nosuch/r"),
    ("aggregate", "exp_20260102_030405", "-o", "~nosuch/r"),
    ("batch", "~nosuch/*.yaml"),
    ("batch", "~nosuch/c.yaml"),
    ("datasets", "--config-dir", "~nosuch/c"),
    ("config", "validate", "~nosuch/c.yaml"),
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_home_of_nobody_is_refused_in_a_line(lem, tmp_path, arguments):
    finished = lem(*arguments)
    assert finished.code == 2
    assert "~nosuch" in finished.out + finished.err
    assert list(tmp_path.iterdir()) == []


def test_variable_with_the_home_of_nobody_is_refused_in_a_line(lem, monkeypatch):
    monkeypatch.setenv("LLM_ENERGY_RESULTS_DIR", "~nosuch/r")
    finished = lem("results", "list")
    assert finished.code == 2
    assert "there is no user nosuch" in finished.err


def test_names_that_begin_with_a_tilde_can_be_written(lem, tmp_path):
    (tmp_path / "~p.txt").write_text("one\n")
    asked = ("experiment", *SIMULATED[:4], "energy=none", "-y")
    for prompts in (("-d", "./~p.txt"), ("-p", "./~p.txt")):
        assert lem(*asked, *prompts, "-o", "./~r").code == 0
    assert len(list((tmp_path / "~r" / "raw").glob("exp_*"))) == 2
    assert "2" in lem("results", "list", "-o", "./~r").out
    assert lem("results", "list", "-o", "./~r", "--json").out.count('"experiment_id"') == 2


def test_home_directories_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert expanded("~/r") == tmp_path / "r"
    assert expanded("./~/r") == tmp_path / "~" / "r"
    assert expanded("~") == tmp_path
    assert expanded("r") == expanded(expanded("r"))
    for text in ("./~r", "~/r"):
        assert expanded(expanded(text)) == expanded(text)
    with pytest.raises(BadInput, match="there is no user nosuch"):
        expanded("~nosuch")


def test_unknown_home_directory_is_named(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError("no such user")))
    with pytest.raises(BadInput, match="home directory is unknown"):
        expanded("~/r")


def test_prompts_flag_does_not_take_a_directory(lem, tmp_path):
    (tmp_path / "set").mkdir()
    finished = lem("experiment", *SIMULATED[:4], "-p", "set")
    assert finished.code == 2
    assert "set is a directory" in finished.err
