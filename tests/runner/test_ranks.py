"""The ranks of a node's processes, and their waiting for each other: two real processes over gloo."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

from lem.errors import ConfigError, RunError
from lem.runner.ranks import Ranks, join, named_by_launcher

pytestmark = pytest.mark.processes

# Each process writes down when it arrived at the barrier, when it left, and what it received.
TWO = """
    import json, sys, time
    from lem.runner.ranks import announce_end, join, named_by_launcher, publish, receive, wait_for_ends
    here = named_by_launcher()
    sent = "a path/with ä" if here.rank == 0 else None
    if sent:
        publish(sent)
    ranks = join(2)
    if ranks.rank == 1:
        time.sleep(2.5)
    called = []
    came = time.time()
    ranks.barrier(lambda: called.append(time.time()))
    left = time.time()
    ranks.close()
    if ranks.rank == 1:
        time.sleep(0.5)
        announce_end(1)
    else:
        wait_for_ends([1])
    received = sent or receive()
    row = [ranks.rank, ranks.local_rank, ranks.size, came, left, len(called), received, time.time()]
    open(f"{sys.argv[1]}/{ranks.rank}", "w").write(json.dumps(row))
"""


def several(code: str, *arguments: str, processes: int = 2):
    file = arguments[0] + "/code.py"
    with open(file, "w") as opened:
        opened.write(textwrap.dedent(code))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    return subprocess.run([*launcher, file, *arguments], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Return what each of the two processes wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    done = several(TWO, str(folder))
    assert done.returncode == 0, done.stderr
    names = ("rank", "local_rank", "size", "came", "left", "called", "received", "ended")
    return [dict(zip(names, json.loads((folder / str(rank)).read_text()), strict=True)) for rank in range(2)]


def test_each_process_knows_which_one_it_is(both):
    assert [(each["rank"], each["local_rank"], each["size"]) for each in both] == [(0, 0, 2), (1, 1, 2)]


def test_no_process_leaves_the_barrier_before_all_have_arrived(both):
    assert min(each["left"] for each in both) >= max(each["came"] for each in both)


def test_a_process_that_waits_long_is_called_now_and_then(both):
    # It waits for two and a half seconds, and checks every second.
    assert [each["called"] for each in both] == [2, 0]


def test_all_receive_what_the_first_one_publishes(both):
    assert {each["received"] for each in both} == {"a path/with ä"}


def test_the_first_one_waits_for_the_ends_of_the_others(both):
    assert both[0]["ended"] >= both[1]["left"] + 0.5


def test_a_barrier_is_over_when_another_process_is_gone(tmp_path):
    code = """
        import sys, time
        from lem.runner.ranks import join
        ranks = join(2)
        ranks.barrier()
        if ranks.rank == 1:
            time.sleep(1.2)
            sys.exit(3)
        ranks.barrier()
    """
    done = several(code, str(tmp_path))
    assert done.returncode == 1
    assert "exitcode  : 3" in done.stderr


def test_a_process_alone_does_not_wait(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    ranks = join(1)
    assert ranks == Ranks(0, 0, 1)
    ranks.barrier()
    ranks.close()


def test_the_ranks_are_the_launchers(monkeypatch):
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert named_by_launcher() == Ranks(5, 1, 8)


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
def test_ranks_that_are_no_numbers_are_bad_input(monkeypatch, name):
    monkeypatch.setenv(name, "\u0660x")
    with pytest.raises(ConfigError, match=rf"must be whole numbers, but the environment has .*{name}="):
        named_by_launcher()


@pytest.mark.parametrize(("planned", "started"), [(2, None), (2, "3"), (1, "2")])
def test_another_number_of_processes_than_planned_is_an_error(monkeypatch, planned, started):
    if started is None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("WORLD_SIZE", started)
    with pytest.raises(
        RunError, match=rf"planned: {planned}; started by the launcher: {started or 1}\. .* {planned}\b"
    ):
        join(planned)
