"""Two jobs that need each other, where one must queue or is taken away."""

from __future__ import annotations

from pathlib import Path

import whole_runs as runs
from jobs import HET, Job

from miles.slurm.minicluster import Cluster

NODES = {"train": 1, "infer": 1, "cpu": 0}
JOBS = ["cluster.placement=jobs", *HET[1:]]


def test_nodes_are_released_while_the_other_job_queues(cluster: Cluster, calm_steps: Path, tmp_path: Path) -> None:
    """The trainer's job gives its node back, and starts again after the rollout's has."""
    blocker = cluster.run(["sbatch", "--parsable", "--partition=h200", "--exclusive", "--output=/dev/null", "--wrap=sleep 600"]).stdout.strip()
    job = Job(cluster, tmp_path / "run", *JOBS, "cluster.slurm.queue_seconds=10")
    train, rollout = job.ids
    job.until(lambda: job.fields(train)["JobState"] == "PENDING" and job.fields(train)["Restarts"] == "1", "the trainer's job queues again")
    assert f"after:{rollout}" in job.fields(train)["Dependency"]
    assert "while these nodes waited (cluster.slurm.queue_seconds)" in job.log
    cluster.run(["scancel", blocker])
    job.finished()
    runs.same_run(calm_steps, job.run_dir)


def test_the_rollout_job_is_preempted(cluster: Cluster, calm_steps: Path, tmp_path: Path) -> None:
    """The trainer's attempt goes on when the engines are back."""
    job = Job(cluster, tmp_path / "run", *JOBS, "cluster.groups.rollout.partition=low", "cluster.groups.rollout.nodelist=infer0", pace=3)
    job.until(lambda: "(rollout)" in job.log, "rollouts are made")
    taker = job.submit_more("--partition=high", "--exclusive", "--nodelist=infer0", "--wrap=sleep 1")
    job.ended(job=taker)
    job.finished()
    assert job.epoch == 1
    assert [job.fields(each)["Restarts"] for each in job.ids] == ["0", "1"]
    runs.same_run(calm_steps, job.run_dir)


def test_a_partner_that_runs_and_is_never_met(cluster: Cluster, calm_steps: Path, tmp_path: Path) -> None:
    """Its setup hangs. The trainer's job waits its time, ends both, and says so; with another setup the run goes on."""
    job = Job(cluster, tmp_path / "run", *JOBS, "cluster.slurm.partner_seconds=15", 'cluster.groups.rollout.setup=["sleep 900"]')
    train, rollout = job.ids
    job.ended("FAILED", train)
    assert (job.fields(train)["ExitCode"], job.fields(train)["Restarts"]) == ("75:0", "0")
    job.ended("CANCELLED", rollout)
    assert f"the job of group rollout ({rollout}) has been running for" in job.log
    assert "without being met (cluster.slurm.partner_seconds)" in job.log
    assert (job.ending()["stopped"], job.ending()["goes_on"]) == (True, False)
    job.nothing_left()
    job.miles("resume", str(job.run_dir), "cluster.groups.rollout.setup=[]", "cluster.slurm.partner_seconds=600")
    for again in job.ids[2:]:
        job.ended(job=again)
    assert (len(job.ids), job.epoch, job.ending()["code"]) == (4, 2, 0)
    job.nothing_left()
    runs.same_run(calm_steps, job.run_dir)
