"""Runs on a real Slurm through what clusters do to them. Each ends with the weights of an undisturbed run on this machine, bit for bit."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import cluster_or_skip
from jobs import HET, STEPS, Job

from miles.slurm.minicluster import Cluster, Settings

sys.path.insert(0, str(Path(__file__).parents[1] / "end_to_end"))

import whole_runs as runs

ALL = [1, 2, 3, 4]  # steps


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    """Small, and with time enough to save on a busy machine."""
    with cluster_or_skip(nodes={"train": 2, "infer": 2, "cpu": 0}, settings=Settings(grace_seconds=60, kill_wait_seconds=60)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on this machine, without Slurm."""
    folder = tmp_path_factory.mktemp("calm") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]))
        runs.run(folder, *STEPS)
    return folder


def test_signal_of_the_time_limit_with_two_groups(slurm: Cluster, calm: Path, tmp_path: Path) -> None:
    """All ranks save at the same step, the leader is requeued, and the second attempt finishes the run."""
    job = Job(slurm, tmp_path / "run", *HET, hold={1: 2})
    job.held()
    job.slurm("scancel", "--batch", "--signal=USR1", str(job.id))
    job.finished()
    assert job.epoch == 2
    assert (job.ending(1)["code"], job.ending(1)["stopped"], job.ending(1)["goes_on"]) == (75, True, True)
    assert job.fields()["Restarts"] == "1"
    assert job.trained() == ALL
    runs.same_run(calm, job.run_dir)


def test_a_node_that_dies(slurm: Cluster, calm: Path, tmp_path: Path) -> None:
    """The run goes on without it, and remembers it."""
    job = Job(slurm, tmp_path / "run", *HET, hold={1: 2})
    job.held()
    node = job.fields(f"{job.id}+1")["NodeList"]
    slurm.kill_node(node, tasks=True)
    try:
        job.finished()
        left_out = json.loads((job.run_dir / "slurm" / "exclude.json").read_text())["nodes"]
        assert list(left_out) == [node]
    finally:
        slurm.start_node(node)
    runs.same_run(calm, job.run_dir)


def test_a_wrong_configuration_is_never_requeued(slurm: Cluster, tmp_path: Path) -> None:
    """One attempt, exit code 78."""
    job = Job(slurm, tmp_path / "run", "model.build=dies.build")
    job.ended("FAILED")
    assert job.fields()["ExitCode"] == "78:0"
    assert (job.epoch, job.fields()["Restarts"], job.ending()["goes_on"]) == (1, "0", False)
    assert "error: model.build: dies.build raised ValueError: no such thing" in job.log
    job.nothing_left()
