"""Runs on a real Slurm through what clusters do to them. Each ends with the weights of an undisturbed run on this machine, bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from jobs import HET, STEPS, Job

from miles.slurm.minicluster import Cluster

sys.path.insert(0, str(Path(__file__).parents[1] / "end_to_end"))

import whole_runs as runs


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on this machine, without Slurm."""
    folder = tmp_path_factory.mktemp("calm") / "run"
    runs.run(folder, *STEPS)
    return folder


def test_time_limit_with_two_groups(slurm: Cluster, calm: Path, tmp_path: Path) -> None:
    """USR1 comes before the limit: all ranks save at the same step, the leader is requeued, and the second attempt finishes the run."""
    job = Job(slurm, tmp_path / "run", *HET)
    job.trained(2)
    job.slurm("scancel", "--batch", "--signal=USR1", str(job.id))
    job.finished()
    assert job.epoch == 2
    assert (job.ending(1)["code"], job.ending(1)["stopped"], job.ending(1)["goes_on"]) == (75, True, True)
    assert job.fields()["Restarts"] == "1"
    runs.same_run(calm, job.run_dir)
