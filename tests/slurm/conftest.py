"""Private Slurm clusters of the session: real daemons, fake GPUs. Where packages can't be had, what needs them is skipped, unless absence is a fault."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "end_to_end")]

from clusters import cluster_or_skip  # noqa: E402

from miles.slurm.minicluster import Cluster  # noqa: E402


@pytest.fixture(autouse=True)
def as_it_was_found(request: pytest.FixtureRequest) -> Iterator[None]:
    """A session's cluster goes on to the next test when the jobs of this one have left the queue and its nodes: Slurm clears up behind a job that is over."""
    yield
    for name in {"slurm", "slurm_accounting", "slurm24"} & set(request.fixturenames):
        cluster, deadline = request.getfixturevalue(name), time.monotonic() + 120
        while left := [*cluster.run(["squeue", "-h"]).stdout.splitlines(), *busy_nodes(cluster)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.05)


def busy_nodes(cluster: Cluster) -> list[str]:
    """Nodes that are not idle, with their state."""
    return [line for line in cluster.run(["sinfo", "-h", "-N", "-o", "%N %T"]).stdout.splitlines() if not line.endswith(" idle")]


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """The machine's Slurm (Debian 12: 22.05) without accounting: train[0-3], infer[0-3], cpu[0-1]."""
    with cluster_or_skip() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def slurm_accounting() -> Iterator[Cluster]:
    """The same with slurmdbd: sacct, accounts research and infra, qos urgent and scavenge."""
    with cluster_or_skip(accounting=True) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def slurm24() -> Iterator[Cluster]:
    """Slurm 24.11 without accounting, with topology/block in blocks of two nodes."""
    with cluster_or_skip(version="24.11") as cluster:
        yield cluster
