"""Runs on a real Slurm through what clusters do to them. Each ends with the weights of an undisturbed run on this machine, bit for bit."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import whole_runs as runs

sys.path.insert(0, str(Path(__file__).parents[1] / "slurm"))

from clusters import cluster_or_skip
from jobs import HET, STEPS, Job

from miles.slurm.minicluster import Cluster, Settings

LOW = ["cluster.groups.all.partition=low"]


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
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1] / "slurm"), *filter(None, [os.environ.get("PYTHONPATH")])]))
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


def test_preemption(slurm: Cluster, calm: Path, tmp_path: Path) -> None:
    """A job of higher priority takes the node: the run saves in the grace time, waits, and goes on."""
    job = Job(slurm, tmp_path / "run", *LOW, hold={1: 2})
    job.held()
    taker = job.submit_more("--partition=high", "--exclusive", f"--nodelist={job.fields()['NodeList']}", "--wrap=sleep 1")
    job.finished()
    job.ended(job=taker)
    assert job.ending(1)["reason"] == "stopped on request"
    assert (job.epoch, job.trained()) == (2, ALL)
    runs.same_run(calm, job.run_dir)


def test_requeue_by_an_administrator_and_a_killed_batch_process(slurm: Cluster, calm: Path, tmp_path: Path) -> None:
    """`scontrol requeue` kills after some seconds; a TERM of the batch process alone saves and requeues."""
    job = Job(slurm, tmp_path / "run", hold={1: 2, 2: 3})
    job.held(1)
    job.slurm("scontrol", "requeue", str(job.id))
    job.held(2)
    job.slurm("scancel", "--batch", "--signal=TERM", str(job.id))
    job.finished()
    assert (job.epoch, job.trained()) == (3, ALL)
    assert job.fields()["Restarts"] == "2"
    assert [job.ending(epoch)["reason"] for epoch in (1, 2)] == ["stopped on request"] * 2
    runs.same_run(calm, job.run_dir)


def test_killed_processes_and_a_restarted_controller(slurm: Cluster, calm: Path, tmp_path: Path) -> None:
    """Trainer, then engine: new attempts in the same allocation, also while the controller is away."""
    job = Job(slurm, tmp_path / "run", *HET, hold={1: 2, 2: 3})
    job.held()
    job.kill_role("trainer")
    slurm.restart_controller(crash=True)
    job.held(2)
    job.kill_role("engine")
    job.finished()
    assert job.epoch == 3
    assert job.fields()["Restarts"] == "0"
    assert "trainer 0 was killed by SIGKILL" in job.ending(1)["reason"]
    assert "engine 0 was killed by SIGKILL" in job.ending(2)["reason"]
    runs.same_run(calm, job.run_dir)


def test_attempts_that_bring_nothing_are_given_up(slurm: Cluster, tmp_path: Path) -> None:
    """Budget of one more attempt."""
    job = Job(slurm, tmp_path / "run", "cluster.restarts=1", "rollout.generate_path=dies.generate")
    job.ended("FAILED")
    assert job.fields()["ExitCode"] == "75:0"
    assert job.epoch == 2
    job.nothing_left()


def test_a_chain_of_jobs(slurm: Cluster, calm: Path, tmp_path: Path) -> None:
    """The second job goes on where the first had to stop; the third finds nothing to do."""
    job = Job(slurm, tmp_path / "run", "cluster.slurm.requeue=chain", "cluster.slurm.chain=3", hold={1: 2})
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
    runs.same_run(calm, job.run_dir)


def test_two_jobs_that_find_each_other(slurm: Cluster, calm: Path, tmp_path: Path) -> None:
    """The trainer's job is stopped and requeued; the rollout's serves its second attempt."""
    job = Job(slurm, tmp_path / "run", "cluster.placement=jobs", *HET[1:], hold={1: 2})
    job.held()
    job.slurm("scancel", "--batch", "--signal=USR1", str(job.id))
    job.finished()
    assert job.epoch == 2
    assert [job.fields(each)["Restarts"] for each in job.ids] == ["1", "0"]
    assert job.trained() == ALL
    runs.same_run(calm, job.run_dir)


def test_cancel_attach_and_resume(slurm: Cluster, calm: Path, tmp_path: Path) -> None:
    """`cancel` saves and ends; `resume` submits again, and the run has the same bits."""
    job = Job(slurm, tmp_path / "run", *HET, hold={1: 2})
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
    runs.same_run(calm, job.run_dir)
