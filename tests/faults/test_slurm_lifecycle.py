"""Runs on a real Slurm through what clusters do to them. Each ends with the weights of an undisturbed run on this machine, bit for bit."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import whole_runs as runs
from jobs import HET, REPOSITORY, Job, command

from miles.slurm.minicluster import Cluster
from miles.slurm.minicluster.processes import environment

LOW = ["cluster.groups.all.partition=low"]
ALL = [1, 2, 3, 4]  # steps


def test_signal_of_the_time_limit_with_two_groups(cluster: Cluster, calm_steps: Path, tmp_path: Path) -> None:
    """All ranks save at the same step, the leader is requeued, and the second attempt finishes the run."""
    job = Job(cluster, tmp_path / "run", *HET, hold={1: 2})
    job.held()
    job.slurm("scancel", "--batch", "--signal=USR1", str(job.id))
    job.finished()
    assert job.epoch == 2
    assert (job.ending(1)["code"], job.ending(1)["stopped"], job.ending(1)["goes_on"]) == (75, True, True)
    assert job.fields()["Restarts"] == "1"
    assert job.trained() == ALL
    runs.same_run(calm_steps, job.run_dir)


def test_a_node_that_dies(cluster: Cluster, calm_steps: Path, tmp_path: Path) -> None:
    """The run goes on without it, and remembers it."""
    job = Job(cluster, tmp_path / "run", *HET, hold={1: 2})
    job.held()
    node = job.fields(f"{job.id}+1")["NodeList"]
    cluster.kill_node(node, tasks=True)
    try:
        job.finished()
        left_out = json.loads((job.run_dir / "slurm" / "exclude.json").read_text())["nodes"]
        assert list(left_out) == [node]
    finally:
        cluster.start_node(node)
    runs.same_run(calm_steps, job.run_dir)


def test_a_wrong_configuration_is_never_requeued(cluster: Cluster, tmp_path: Path) -> None:
    """One attempt, exit code 78."""
    job = Job(cluster, tmp_path / "run", "model.build=dies.build")
    job.ended("FAILED")
    assert job.fields()["ExitCode"] == "78:0"
    assert (job.epoch, job.fields()["Restarts"], job.ending()["goes_on"]) == (1, "0", False)
    assert "error: model.build: dies.build raised ValueError: no such thing" in job.log
    job.nothing_left()


def test_preemption(cluster: Cluster, calm_steps: Path, tmp_path: Path) -> None:
    """A job of higher priority takes the node: the run saves in the grace time, waits, and goes on."""
    job = Job(cluster, tmp_path / "run", *LOW, hold={1: 2})
    job.held()
    taker = job.submit_more("--partition=high", "--exclusive", f"--nodelist={job.fields()['NodeList']}", "--wrap=sleep 1")
    job.finished()
    job.ended(job=taker)
    assert job.ending(1)["reason"] == "stopped on request"
    assert (job.epoch, job.trained()) == (2, ALL)
    runs.same_run(calm_steps, job.run_dir)


def test_requeue_by_an_administrator_and_a_killed_batch_process(cluster: Cluster, calm_steps: Path, tmp_path: Path) -> None:
    """`scontrol requeue` kills after some seconds; a TERM of the batch process alone saves and requeues."""
    job = Job(cluster, tmp_path / "run", hold={1: 2, 2: 3})
    job.held(1)
    job.slurm("scontrol", "requeue", str(job.id))
    job.held(2)
    job.slurm("scancel", "--batch", "--signal=TERM", str(job.id))
    job.finished()
    assert (job.epoch, job.trained()) == (3, ALL)
    assert job.fields()["Restarts"] == "2"
    assert [job.ending(epoch)["reason"] for epoch in (1, 2)] == ["stopped on request"] * 2
    runs.same_run(calm_steps, job.run_dir)


def test_killed_processes_and_a_restarted_controller(cluster: Cluster, calm_steps: Path, tmp_path: Path) -> None:
    """Trainer, then engine: new attempts in the same allocation, also while the controller is away."""
    job = Job(cluster, tmp_path / "run", *HET, hold={1: 2, 2: 3})
    job.held()
    job.kill_role("trainer")
    cluster.restart_controller(crash=True)
    job.held(2)
    job.kill_role("engine")
    job.finished()
    assert job.epoch == 3
    assert job.fields()["Restarts"] == "0"
    assert "trainer 0 was killed by SIGKILL" in job.ending(1)["reason"]
    assert "engine 0 was killed by SIGKILL" in job.ending(2)["reason"]
    runs.same_run(calm_steps, job.run_dir)


def test_attempts_that_bring_nothing_are_given_up(cluster: Cluster, tmp_path: Path) -> None:
    """Budget of one more attempt; the warm start would be a new step."""
    job = Job(cluster, tmp_path / "run", "cluster.restarts=1", "warm_start.steps=0", "rollout.generate_path=dies.generate")
    job.ended("FAILED")
    assert job.fields()["ExitCode"] == "75:0"
    assert job.epoch == 2
    job.nothing_left()


def test_a_chain_of_jobs(cluster: Cluster, calm_steps: Path, tmp_path: Path) -> None:
    """The second job goes on where the first had to stop; the third finds nothing to do."""
    job = Job(cluster, tmp_path / "run", "cluster.slurm.requeue=chain", "cluster.slurm.chain=3", hold={1: 2})
    first, second, third = job.ids
    job.held()
    job.slurm("scancel", "--batch", "--signal=USR1", str(job.id))
    job.ended("FAILED", first)
    assert job.fields()["ExitCode"] == "75:0"
    job.ended(job=second)
    job.ended(job=third)
    assert job.epoch == 2
    job.nothing_left()
    assert job.trained() == ALL
    runs.same_run(calm_steps, job.run_dir)


def test_two_jobs_that_find_each_other(cluster: Cluster, calm_steps: Path, tmp_path: Path) -> None:
    """The trainer's job is stopped and requeued; the rollout's serves its second attempt."""
    job = Job(cluster, tmp_path / "run", "cluster.placement=jobs", *HET[1:], hold={1: 2})
    job.held()
    job.slurm("scancel", "--batch", "--signal=USR1", str(job.id))
    job.finished()
    assert job.epoch == 2
    assert [job.fields(each)["Restarts"] for each in job.ids] == ["1", "0"]
    assert job.trained() == ALL
    runs.same_run(calm_steps, job.run_dir)


def test_cancel_attach_and_resume(cluster: Cluster, calm_steps: Path, tmp_path: Path) -> None:
    """`cancel` saves and ends; `resume` submits again, and the run has the same bits."""
    job = Job(cluster, tmp_path / "run", *HET, hold={1: 2})
    job.held()
    assert f"job: {job.id} running on train" in job.miles("status", str(job.run_dir))
    command = shlex.split(job.miles("attach", str(job.run_dir), "rollout", "--print"))
    said = job.slurm(*[word for word in command if word not in ("--pty", "bash", "-l")], "bash", "-c", "echo $SLURMD_NODENAME $SLURM_JOB_ID")
    assert said.split()[0].startswith("infer")
    job.miles("cancel", str(job.run_dir))
    job.ended("FAILED")
    assert job.fields()["ExitCode"] == "130:0"
    job.nothing_left()
    assert "state: stopped" in job.miles("status", str(job.run_dir))
    job.miles("resume", str(job.run_dir))
    job.ended(job=job.ids[-1])
    assert (job.epoch, len(job.ids), job.trained()) == (2, 2, ALL)
    runs.same_run(calm_steps, job.run_dir)


def test_without_requeue_a_stop_saves_and_ends(cluster: Cluster, calm_steps: Path, tmp_path: Path) -> None:
    """The job says how the run goes on, and so it does."""
    job = Job(cluster, tmp_path / "run", *HET, "cluster.slurm.requeue=none", hold={1: 2})
    job.held()
    job.slurm("scancel", "--batch", "--signal=USR1", str(job.id))
    job.ended("FAILED")
    assert (job.fields()["ExitCode"], job.fields()["Restarts"], job.ending()["goes_on"]) == ("75:0", "0", False)
    assert f"ended (cluster.slurm.requeue: none); go on with: miles-submit resume {job.run_dir}" in job.log
    job.nothing_left()
    job.miles("resume", str(job.run_dir))
    job.ended(job=job.ids[-1])
    assert (job.epoch, job.trained()) == (2, ALL)
    runs.same_run(calm_steps, job.run_dir)


def test_cancelled_at_once(cluster: Cluster, calm_steps: Path, tmp_path: Path) -> None:
    """`cancel --now` is the job's end, not the run's."""
    job = Job(cluster, tmp_path / "run", *HET, hold={1: 2})
    job.held()
    follower = job.follow("trainer")
    job.miles("cancel", "--now", str(job.run_dir))
    job.ended("CANCELLED")
    job.nothing_left()
    assert (job.epoch, job.fields()["Restarts"]) == (1, "0")
    said, _ = follower.communicate(timeout=90)
    assert (follower.returncode, "── attempt 1 ended: " in said.splitlines()[-1]) == (0, True)
    assert "state: stopped" in job.miles("status", str(job.run_dir))
    job.miles("resume", str(job.run_dir))
    job.ended(job=job.ids[-1])
    assert (job.epoch, len(job.ids)) == (2, 2)
    runs.same_run(calm_steps, job.run_dir)


class FromInside(Job):
    """Submitted by a step of another job, whose shape and settings are none of the run's."""

    def miles(self, *words: str) -> str:
        inner = shlex.join([sys.executable, "-m", "miles.cli", *words])
        shape = ["--partition=h200", "--ntasks=3", "--cpus-per-task=2", "--gres=gpu:h200:2", "--mem-per-cpu=50", "--time=5"]
        script = f"#!/bin/bash\nexport SBATCH_PARTITION=low SLURM_CPU_BIND=none SRUN_CPUS_PER_TASK=2\nsrun --ntasks=1 --overlap --mem=0 {inner}\n"
        return self.cluster.run(["sbatch", "--wait", "--parsable", *shape, f"--output={self.run_dir}.outer", f"--chdir={REPOSITORY}"], input=script, env=self.environment, timeout=120).stdout


def test_submitted_from_inside_a_job(cluster: Cluster, calm_steps: Path, tmp_path: Path) -> None:
    """The run's job has what its configuration asks for, and knows nothing of the job that it was submitted from."""
    job = FromInside(cluster, tmp_path / "run", *HET, hold={1: 2})
    job.held()
    (batch,) = [each for each in job.processes() if "miles.slurm.batch" in command(each)]
    seen = environment(batch)
    assert (seen["SLURM_CONF"], seen["SLURM_JOB_ID"], seen["SLURM_JOB_PARTITION"]) == (str(cluster.conf), str(job.id), "gb300")
    foreign = ("SLURM_CPUS_PER_TASK", "SLURM_MEM_PER_CPU", "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_CPU_BIND", "SBATCH_PARTITION", "SRUN_CPUS_PER_TASK")
    assert [name for name in foreign if name in seen] == []
    assert (job.fields()["NumNodes"], job.fields()["NumTasks"]) == ("1", "1")
    job.slurm("scancel", "--batch", "--signal=USR1", str(job.id))
    job.finished()
    assert (job.epoch, job.trained()) == (2, ALL)
    runs.same_run(calm_steps, job.run_dir)
