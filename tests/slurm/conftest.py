"""The clusters that the tests of jobs run on, and a folder with config files for them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing
from tests.slurm.commands import Lem, make_lem

# The clusters that have been started, by whether they have accounting.
Running = dict[bool, Cluster]


@pytest.fixture(scope="session")
def running() -> Iterator[Running]:
    """The clusters that have been started, with and without accounting; all are stopped at the end."""
    if (reason := missing()) is not None:
        pytest.skip(f"no Slurm cluster can be started: {reason}")
    clusters: Running = {}
    yield clusters
    for cluster in clusters.values():
        cluster.stop()
        shutil.rmtree(cluster.root, ignore_errors=True)


def started(clusters: Running, *, has_accounting: bool) -> Cluster:
    if has_accounting not in clusters:
        # A short path, because munge's socket is in it.
        clusters[has_accounting] = Cluster(Path(tempfile.mkdtemp(prefix="lem-slurm-")), has_accounting)
        clusters[has_accounting].start()
    return clusters[has_accounting]


@pytest.fixture
def cluster(running: Running) -> Cluster:
    """A cluster with accounting."""
    return started(running, has_accounting=True)


@pytest.fixture(params=[True, False], ids=["accounting", "no accounting"])
def either_cluster(request: pytest.FixtureRequest, running: Running) -> Cluster:
    """A cluster with accounting, and one without."""
    return started(running, has_accounting=request.param)


@pytest.fixture
def lem(tmp_path: Path) -> Lem:
    """Runs lem in an empty folder that has config files for the simulated backend."""
    return make_lem(tmp_path)
