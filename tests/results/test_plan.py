"""The state of an experiment: "running" is believed only while its process is alive."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from msgspec.structs import replace

from lem.results.codec import from_json, to_json
from lem.results.plan import State, running


def test_who_runs_is_believed_while_it_lives():
    state = running(1)
    assert (state.status, state.pid) == ("running", os.getpid())
    assert state.believed() is state


def test_who_is_gone_was_interrupted():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    believed = replace(running(3), pid=process.pid, process_started_s=None).believed()
    assert (believed.status, believed.attempt) == ("interrupted", 3)
    assert "is gone" in believed.error


def test_another_process_with_the_same_number_is_not_taken_for_it():
    state = running(1)
    assert replace(state, process_started_s=state.process_started_s - 60).believed().status == "interrupted"


def test_a_process_that_has_ended_and_was_not_waited_for_is_gone():
    process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    process.stdout.read()  # its end closes the pipe
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert replace(running(1), pid=process.pid, process_started_s=None).believed().status == "interrupted"
    process.wait()


def test_on_another_host_nobody_can_look():
    state = replace(running(1), host="elsewhere", pid=1, process_started_s=1.0)
    assert state.believed() is state


@pytest.mark.parametrize("status", ["planned", "interrupted", "failed", "completed", "aggregated"])
def test_what_is_not_running_is_believed(status):
    state = running(2).now(status, "why")
    assert state.believed() is state
    assert (state.attempt, state.error, state.pid, state.host) == (2, "why", None, None)


def test_a_state_survives_its_file():
    state = running(1)
    assert from_json(State, to_json(state)) == state
