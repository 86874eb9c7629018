"""Two cells of the fault matrix; `make test-faults` has all of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import cluster_or_skip

from miles.slurm.minicluster import Cluster

sys.path.insert(0, str(Path(__file__).parents[1] / "end_to_end"))
sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

import matrix


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of each kind, of which a run takes one."""
    with cluster_or_skip(nodes=matrix.NODES) as made:
        yield made


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that both must equal."""
    return matrix.calm_run(tmp_path_factory.mktemp("calm") / "run")


@pytest.mark.parametrize(("victim", "phase"), [("slurmd of the train node", "save"), ("orchestrator", "sync")])
def test_cell(cluster: Cluster, calm: Path, tmp_path: Path, victim: str, phase: str) -> None:
    """What the dead slurmd left alive meets the fence; what nobody goes on with is resumed."""
    matrix.cell(cluster, calm, tmp_path, victim, phase)
