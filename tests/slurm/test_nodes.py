"""Campaigns and the nodes of a real Slurm cluster: one type of node, or several on purpose."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.commands import HERE, Lem, prompts

pytestmark = pytest.mark.slurm

EXCLUSIVE = "hydra.launcher.exclusive=true"  # two cycles run side by side, each on a node of its own


@pytest.fixture
def two_types(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with accounting, whose second node has a feature that the first one lacks."""
    cluster.wait_until_idle()
    cluster.command("scontrol", "update", "NodeName=n2", "AvailableFeatures=big", "ActiveFeatures=big")
    yield cluster
    cluster.command("scontrol", "update", "NodeName=n2", "AvailableFeatures=", "ActiveFeatures=")


@pytest.fixture
def arms(lem: Lem) -> tuple[str, ...]:
    for tokens in (4, 8):
        (lem.folder / f"arm{tokens}.yaml").write_text(f"defaults: [quick]\nmax_output_tokens: {tokens}\n")
    return "arm4.yaml", "arm8.yaml", "--primary", "latency_mean_s", *prompts(4), *HERE, EXCLUSIVE


def nodes_of(lem: Lem, campaign: str) -> dict[int, set[str]]:
    """Return the nodes on which each cycle of a campaign ran."""
    found: dict[int, set[str]] = {}
    for row in lem.rows():
        if row["campaign"] == campaign:
            found.setdefault(row["campaign_cycle"], set()).add(row["slurm_node"])
    return found


def answer(lem: Lem, campaign: str) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(lem("results", "show", campaign, "--json").stdout)
    return shown


def test_a_campaign_is_kept_on_one_type_of_node(two_types: Cluster, lem: Lem, arms: tuple[str, ...]) -> None:
    done = lem("campaign", *arms, "--campaign-name", "kept", "--cycles", "2", cluster=two_types)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("The campaign is kept on one type of node: n1 (gpu:2, 2 CPUs).") == 1
    assert nodes_of(lem, "kept") == {1: {"n1"}, 2: {"n1"}}
    # A type that the user has chosen is left alone.
    given = ("--campaign-name", "big", "--cycles", "1", "hydra.launcher.constraint=big")
    done = lem("campaign", *arms, *given, cluster=two_types)
    assert done.returncode == 0, done.stderr
    assert "one type of node" not in done.stderr
    assert nodes_of(lem, "big") == {1: {"n2"}}


def test_cycles_may_run_on_all_types_of_node(two_types: Cluster, lem: Lem, arms: tuple[str, ...]) -> None:
    given = ("campaign", *arms, "--campaign-name", "wide", "--cycles", "4", "--across-nodes")
    done = lem(*given, cluster=two_types)
    assert done.returncode == 0, done.stderr
    assert "The cycles ran on the nodes n1, n2 (" in done.stdout.replace("n2, n1", "n1, n2")
    before = nodes_of(lem, "wide")
    assert [len(nodes) for nodes in before.values()] == [1, 1, 1, 1]
    assert set.union(*before.values()) == {"n1", "n2"}
    shown = answer(lem, "wide")
    assert sorted(shown["nodes"]["nodes"]) == ["n1", "n2"]
    assert not [note for note in shown["warnings"] if note["code"].startswith(("campaign_boards", "campaign_cycle"))]
    # A cell that is measured again goes to the node that ran the rest of its cycle.
    lost = next(cell for cell in shown["cells"] if before[cell["cycle"]] == {"n2"})
    shutil.rmtree(lem.folder / "results" / "raw" / lost["experiment_id"])
    (lem.folder / "results" / "experiments" / f"{lost['experiment_id']}.parquet").unlink(missing_ok=True)
    done = lem(*given, cluster=two_types)
    assert done.returncode == 0, done.stderr
    again = [cell for cell in answer(lem, "wide")["cells"] if cell["position"] == lost["position"]]
    (again_id,) = [cell["experiment_id"] for cell in again if cell["cycle"] == lost["cycle"]]
    (row,) = [row for row in lem.rows() if row["experiment_id"] == again_id]
    assert again_id != lost["experiment_id"]
    assert row["slurm_node"] == "n2"
