"""The private Slurm under faults: preemption with its warning, a dead slurmd whose tasks go on, and whatever is killed, nothing is left."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from clusters import cluster_or_skip
from shared import say

from miles.slurm.minicluster import Cluster, Settings

ONE = {"train": 1, "infer": 0, "cpu": 0}
# Each task says when it starts and which signals reach it. The TERM comes twice where the step and the job end apart.
SAYS = """#!/bin/bash
srun bash -c 'trap "echo USR2 >> {file}" USR2; trap "echo TERM >> {file}" TERM; echo start ${{SLURM_RESTART_COUNT:-0}} >> {file}; while true; do sleep 0.1; done'
"""


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, what
        time.sleep(0.05)
    return time.monotonic() - began


def state(cluster: Cluster, job: str) -> str:
    return cluster.run(["squeue", "-h", "-t", "all", "-j", job, "-o", "%T"]).stdout.split()[0]


@pytest.mark.parametrize("version", ["22.05", "24.11"])
def test_preempted_job_is_warned_killed_and_starts_again(version: str, tmp_path: Path) -> None:
    lines = tmp_path / "lines"

    def said() -> list[str]:
        return lines.read_text().splitlines() if lines.exists() else []

    with cluster_or_skip(version=version, nodes=ONE) as cluster:
        cluster.run(["sbatch", "-p", "low", "--exclusive", "--signal=USR2@60", "--output=/dev/null"], input=SAYS.format(file=lines))
        wait_for(lambda: said() == ["start 0"], "the first job does not start")
        high = cluster.run(["sbatch", "--parsable", "-p", "high", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]).stdout.strip()
        warned = wait_for(lambda: "USR2" in said(), "no warning")
        ended = wait_for(lambda: state(cluster, high) == "COMPLETED", "the other job does not run")
        again = wait_for(lambda: said()[-1] == "start 1", "the first job does not start again")
        assert said()[:2] == ["start 0", "USR2"]
        assert set(said()[2:-1]) == {"TERM"}
        say(f"Slurm {version}: preemption warned after {warned:.1f} s, the other job done {ended:.1f} s later, restart {again:.1f} s after that")


def test_tasks_outlive_their_slurmd_until_the_node_is_down(tmp_path: Path) -> None:
    """Only slurmd dies. Its job goes on as if nothing were, until the controller gives the node up; then another node has it."""
    two = {"train": 2, "infer": 0, "cpu": 0}
    with cluster_or_skip(nodes=two, settings=Settings(slurmd_timeout_seconds=2, message_timeout_seconds=2)) as cluster:
        job = cluster.run(["sbatch", "--parsable", "-w", "train0", "--output=/dev/null", f"--wrap=echo $SLURMD_NODENAME >> {tmp_path}/nodes; sleep 1000"]).stdout.strip()
        cluster.run(["scontrol", "update", f"JobId={job}", "ReqNodeList="])
        wait_for((tmp_path / "nodes").exists, "the job does not start")
        cluster.kill_node("train0")
        assert "sleep" in {process.name for process in cluster.processes()}
        down = wait_for(lambda: cluster.node_state("train0") == "down*", "the node is not called down")
        assert "sleep" in {process.name for process in cluster.processes()}
        wait_for(lambda: (tmp_path / "nodes").read_text().split() == ["train0", "train1"], "the job does not start again")
        say(f"a dead slurmd is down after {down:.1f} s")


def test_whatever_is_killed_nothing_is_left(seed: int, count: int) -> None:
    """Some of the cluster's processes, any of them, are killed at a random moment of a job's life; then the cluster is taken down."""
    draw = random.Random(seed)
    for _ in range(max(3, count // 5)):
        cluster = cluster_or_skip(nodes={"train": 2, "infer": 0, "cpu": 0}, version=draw.choice(["22.05", "24.11"]))
        cluster.up()
        cluster.run(["sbatch", "-N2", "--output=/dev/null"], input="#!/bin/bash\nsrun sleep 1000 & srun sh -c 'setsid sleep 1000 & sleep 1000'\n")
        time.sleep(draw.uniform(0, 2.0))
        seen = cluster.processes()
        for process in draw.sample(seen, draw.randint(1, 4)):
            process.kill()
        time.sleep(draw.choice([0.0, 0.5]))
        seen += cluster.processes()
        cluster.down()
        assert not [process for process in seen if process.alive()]
        assert not cluster.processes()
        assert not cluster.folder.exists()
