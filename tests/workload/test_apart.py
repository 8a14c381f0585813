"""Calling a function in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from lem.config.problem import Problem, Problems
from lem.errors import ConfigError, DatasetError, RunError
from lem.spec.experiment import Dataset
from lem.workload import apart
from lem.workload.datasets import load_here

# No library has this name, so the calls are never made in this process.
NONE = "no_such_library"


def test_a_function_is_called_in_another_process():
    assert apart.call(NONE, os.getpid) != os.getpid()
    assert apart.call(NONE, sorted, [3, 1, 2], reverse=True) == [3, 2, 1]


def test_a_library_that_is_loaded_already_needs_no_process():
    assert apart.call("json", os.getpid) == os.getpid()


def test_large_arguments_and_results_get_through():
    text = "x" * 3_000_000
    assert apart.call(NONE, str.upper, text) == text.upper()


def test_a_hidden_library_seems_not_to_be_installed():
    assert apart.call(NONE, importlib.util.find_spec, "numpy") is not None
    assert apart.call_without(["numpy"], NONE, importlib.util.find_spec, "numpy") is None


def test_an_error_keeps_its_type_and_words():
    with pytest.raises(DatasetError, match=r"There is no file \./none\.jsonl\.$") as caught:
        apart.call(NONE, load_here, Dataset(path="./none.jsonl"), 0)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("error", [ConfigError("one", "two"), Problems([Problem("wrong_type", "seed", "must be 1.")])])
def test_an_error_with_several_problems_keeps_them(error):
    kind, arguments = error.__reduce__()
    assert (str(kind(*arguments)), kind(*arguments).problems) == (str(error), error.problems)


def test_an_unexpected_error_shows_where_it_was_raised():
    with pytest.raises(Exception, match=r"(?s)Traceback.*ValueError: invalid literal"):
        apart.call(NONE, int, "x")


@pytest.mark.parametrize(
    ("function", "argument", "how"),
    [(os._exit, 3, "ended with exit code 3"), (signal.raise_signal, signal.SIGKILL, "was ended by signal 9")],
)
def test_a_process_that_ends_without_an_answer_is_one_sentence(function, argument, how):
    with pytest.raises(RunError, match=f"^A process that lem started {how} before"):
        apart.call(NONE, function, argument)


def test_what_a_library_prints_does_not_get_into_the_output(capfd):
    assert apart.call(NONE, print, "noise") is None
    out, err = capfd.readouterr()
    assert (out, err) == ("", "noise\n")


def test_a_file_in_the_working_directory_does_not_shadow_a_library(tmp_path, monkeypatch):
    (tmp_path / "pickle.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    assert apart.call(NONE, os.getcwd) == str(tmp_path)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_process_ends_with_its_parent(sent):
    program = f"import time\nfrom lem.workload import apart\napart.call({NONE!r}, time.sleep, 60)"
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL) as parent:
        children = _eventually(lambda: psutil.Process(parent.pid).children())
        parent.send_signal(sent)
        parent.wait(timeout=20)
    assert _eventually(lambda: not any(_is_alive(child) for child in children))


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _eventually(seen, timeout_s=20):
    """Return what a function returns as soon as that is true, or false at the timeout."""
    deadline = time.monotonic() + timeout_s
    while not (found := seen()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found
