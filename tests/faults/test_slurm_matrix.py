"""The fault matrix on a real Slurm: everything that a run consists of × every phase of a step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matrix
import pytest
import shared
from clusters import cluster_or_skip

from miles.slurm.minicluster import Cluster

Found = dict[tuple[str, str], dict[str, float]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of each kind, of which a run takes one."""
    with cluster_or_skip(nodes=matrix.NODES) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed_here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that all must equal."""
    return matrix.calm_run(tmp_path_factory.mktemp("calm") / "run")


@pytest.fixture(scope="module")
def found() -> Iterator[Found]:
    """Seconds of each cell that passed, as a table at the end."""
    cells: Found = {}
    yield cells
    phases = list(matrix.UNDER_WAY)
    shared.say(f"\nfault matrix: {len(cells)} cells passed of those that were run; seconds from sbatch to the checked end (from the kill)")
    shared.say("".join(["killed".ljust(28), *(phase.rjust(16) for phase in phases)]))
    for victim in matrix.VICTIMS:
        told = [f"{cells[victim, phase]['seconds']:.0f} ({cells[victim, phase]['after_kill']:.0f})" if (victim, phase) in cells else "-" for phase in phases]
        shared.say("".join([victim.ljust(28), *(text.rjust(16) for text in told)]))
    shared.summary("slurm_matrix", {f"{victim} x {phase}": value for (victim, phase), value in cells.items()})


@pytest.mark.parametrize("phase", list(matrix.UNDER_WAY))
@pytest.mark.parametrize("victim", matrix.VICTIMS)
def test_cell(cluster: Cluster, undisturbed_here: Path, found: Found, tmp_path: Path, victim: str, phase: str) -> None:
    """The run finishes with the bits of the undisturbed one, makes and trains on every sample once, and leaves no process and no node behind."""
    found[victim, phase] = matrix.cell(cluster, undisturbed_here, tmp_path, victim, phase)
    shared.say(f"{victim} x {phase}: {found[victim, phase]}")
