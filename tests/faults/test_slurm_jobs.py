"""Two jobs that need each other, where one must queue or is taken away."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import whole_runs as runs

sys.path.insert(0, str(Path(__file__).parents[1] / "slurm"))

from clusters import cluster_or_skip
from jobs import HET, STEPS, Job

from miles.slurm.minicluster import Cluster, Settings

JOBS = ["cluster.placement=jobs", *HET[1:]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A node for each group."""
    with cluster_or_skip(nodes={"train": 1, "infer": 1, "cpu": 0}, settings=Settings(grace_seconds=60, kill_wait_seconds=60)) as made:
        yield made


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on this machine, without Slurm."""
    folder = tmp_path_factory.mktemp("calm") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "slurm"), prepend=":")
        runs.run(folder, *STEPS)
    return folder


def test_nodes_are_released_while_the_other_job_queues(cluster: Cluster, calm: Path, tmp_path: Path) -> None:
    """The trainer's job gives its node back, and starts again after the rollout's has."""
    blocker = cluster.run(["sbatch", "--parsable", "--partition=h200", "--exclusive", "--output=/dev/null", "--wrap=sleep 600"]).stdout.strip()
    job = Job(cluster, tmp_path / "run", *JOBS, "cluster.slurm.queue_seconds=10")
    train, rollout = job.ids
    job.until(lambda: job.fields(train)["JobState"] == "PENDING" and job.fields(train)["Restarts"] == "1", "the trainer's job queues again")
    assert f"after:{rollout}" in job.fields(train)["Dependency"]
    assert "while these nodes waited (cluster.slurm.queue_seconds)" in job.log
    cluster.run(["scancel", blocker])
    job.finished()
    runs.same_run(calm, job.run_dir)


def test_the_rollout_job_is_preempted(cluster: Cluster, calm: Path, tmp_path: Path) -> None:
    """The trainer's attempt goes on when the engines are back."""
    job = Job(cluster, tmp_path / "run", *JOBS, "cluster.groups.rollout.partition=low", "cluster.groups.rollout.nodelist=infer0", pace=3)
    job.until(lambda: "(rollout)" in job.log, "rollouts are made")
    taker = job.submit_more("--partition=high", "--exclusive", "--nodelist=infer0", "--wrap=sleep 1")
    job.ended(job=taker)
    job.finished()
    assert job.epoch == 1
    assert [job.fields(each)["Restarts"] for each in job.ids] == ["0", "1"]
    runs.same_run(calm, job.run_dir)
