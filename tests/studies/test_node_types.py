"""Which type of node a campaign is kept on; tests/slurm/test_nodes.py does so on a real cluster."""

from __future__ import annotations

import pytest

from lem.machine import slurm
from lem.machine.slurm import Node, _as_node, _fields
from lem.spec.slurm import SlurmOptions
from lem.studies.node_types import kept_on_one_type

NODES = (
    Node("big1", "gpu:h100:4, 96 CPUs", 4, True),
    Node("old1", "gpu:a100:4, 64 CPUs", 4, True),
    Node("old2", "gpu:a100:4, 64 CPUs", 4, True),
    Node("old3", "gpu:a100:4, 64 CPUs", 4, False),
    Node("cpu1", "96 CPUs", 0, True),
    Node("cpu2", "96 CPUs", 0, True),
    Node("cpu3", "96 CPUs", 0, True),
)


@pytest.fixture
def mixed(monkeypatch):
    """A partition with nodes of three types; names are not shortened, as without Slurm's commands."""
    monkeypatch.setattr(slurm, "nodes", lambda _: list(NODES))
    monkeypatch.setattr(slurm, "expanded", lambda names: names.split(","))
    monkeypatch.setattr(slurm, "shortened", ",".join)


@pytest.mark.parametrize(
    ("gpus", "ran_on", "exclude", "excluded"),
    [
        (2, [], None, "big1"),  # nodes without GPUs need not be excluded
        (0, [], None, "big1,old1,old2,old3"),
        (2, ["big1"], None, "old1,old2,old3"),  # a campaign that has begun stays where it began
        (2, ["gone9"], None, "big1"),
        (2, [], "old1,old2", "old1,old2,old3"),  # the other node of that type cannot run jobs
        (2, [], "old1,old2,old3", "old1,old2,old3"),
        (8, [], None, None),
    ],
    ids=["GPUs", "no GPUs", "begun", "its node is gone", "unusable", "one type left", "no node is enough"],
)
def test_all_other_types_are_excluded(mixed, gpus, ran_on, exclude, excluded):
    options, note = kept_on_one_type(SlurmOptions(exclude=exclude), gpus, ran_on)
    assert options.exclude == excluded
    assert (note is None) == (excluded in (exclude, None))


@pytest.mark.parametrize(
    "chosen",
    [
        {"gpu_type": "h100"},
        {"constraint": "nvlink"},
        {"nodelist": "big1"},
        {"additional_parameters": {"gres": "gpu:h100:2"}},
    ],
    ids=str,
)
def test_what_the_user_has_chosen_is_left_alone(mixed, chosen):
    options = SlurmOptions(**chosen)
    assert kept_on_one_type(options, 2, []) == (options, None)


def test_a_node_as_slurm_shows_it():
    line = (
        "NodeName=gpu07 Arch=x86_64 CoresPerSocket=32  CPUAlloc=0 CPUEfctv=128 CPUTot=128 CPULoad=0.10 "
        "AvailableFeatures=nvlink,amd ActiveFeatures=nvlink,amd Gres=gpu:a100:4(S:0-1),nvme:1 NodeAddr=gpu07 "
        "OS=Linux 5.14.0 #1 SMP RealMemory=1031000 State=IDLE+DRAIN ThreadsPerCore=1 Partitions=gpu,debug "
    )
    expected = Node("gpu07", "gpu:a100:4,nvme:1, amd,nvlink, 128 CPUs", 4, False)
    assert _as_node(_fields(line)) == expected
    plain = "NodeName=c1 CPUTot=8 AvailableFeatures=(null) Gres=(null) State=MIXED Partitions=main"
    assert _as_node(_fields(plain)) == Node("c1", "8 CPUs", 0, True)
