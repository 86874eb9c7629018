"""The private Slurm itself: what starts, what a job sees, and that nothing is left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from clusters import cluster_or_skip

from miles.slurm.minicluster import Cluster
from miles.slurm.minicluster.processes import environment, everybody

SMALL = {"train": 1, "infer": 1, "cpu": 0}
HET = """#!/bin/bash
#SBATCH --partition=gb300 --nodes=2 --gpus-per-node=4 --output={folder}/batch
#SBATCH hetjob
#SBATCH --partition=h200 --nodes=1 --gres=gpu:h200:3
srun --het-group=0 --gpus-per-node=4 --output={folder}/train.%n {show} &
srun --het-group=1 --gres=gpu:h200:3 --output={folder}/infer.%n {show} &
wait
"""


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def state(cluster: Cluster, job: str) -> str:
    return cluster.run(["squeue", "-h", "-t", "all", "-j", job, "-o", "%T"]).stdout.split()[0]


def mentions(folder: Path) -> list[int]:
    """Processes whose variables or working directory name the folder, found without what the cluster records."""
    found = []
    for process in everybody():
        try:
            here = os.readlink(f"/proc/{process.pid}/cwd")
        except OSError:
            here = ""
        if process.pid != os.getpid() and (str(folder) in here or any(str(folder) in value for value in environment(process).values())):
            found.append(process.pid)
    return found


def test_nothing_is_left_even_of_a_job_that_hides() -> None:
    """A task that forks away from its step, in a session of its own, with an empty environment: it ends with the cluster all the same."""
    cluster = cluster_or_skip(nodes=SMALL)
    with cluster:
        pid_file = cluster.folder / "hidden"
        script = f"#!/bin/bash\nsetsid env -i /bin/bash -c 'cd /; echo $$ > {pid_file}; exec sleep 1000' &\nsleep 1000\n"
        cluster.run(["sbatch", "--output=/dev/null"], input=script)
        wait_for(lambda: pid_file.exists() and bool(pid_file.read_text().strip()), "the job does not run")
        hidden = int(pid_file.read_text())
        seen = cluster.processes()
        assert hidden in {process.pid for process in seen}
        assert {"munged", "slurmctld", "slurmd", "slurmstepd"} <= {process.name for process in seen}
        mount_count = len(Path("/proc/self/mountinfo").read_text().splitlines())
    assert not [process for process in seen if process.alive()]
    assert not mentions(cluster.folder)
    assert not cluster.folder.exists()
    assert len(Path("/proc/self/mountinfo").read_text().splitlines()) <= mount_count


def test_it_ends_with_a_killed_owner() -> None:
    """kill -9 of the process that has the cluster as a context: the keeper sees its pipe close."""
    cluster = cluster_or_skip(nodes=SMALL)
    code = f"import time\nfrom pathlib import Path\nfrom miles.slurm.minicluster import Cluster\nwith Cluster(Path({str(cluster.folder)!r}), nodes={SMALL!r}): print('up', flush=True); time.sleep(1000)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "up\n"
        seen = cluster.processes()
        owner.kill()
    assert len(seen) > 4
    wait_for(lambda: not cluster.folder.exists(), "the folder stays")
    assert not [process for process in seen if process.alive()]


def test_down_after_a_killed_keeper() -> None:
    """kill -9 of the keeper: its daemons die with it, steps and tasks are found by their variables."""
    cluster = cluster_or_skip(nodes=SMALL)
    cluster.up()
    cluster.run(["sbatch", "--output=/dev/null", "--wrap=sleep 1000"])
    wait_for(lambda: "sleep" in {process.name for process in cluster.processes()}, "the job does not run")
    seen = cluster.processes()
    cluster.daemons()["keeper"].kill()
    cluster.down()
    assert not [process for process in seen if process.alive()]
    assert not cluster.folder.exists()


def test_two_clusters_side_by_side(slurm: Cluster) -> None:
    with cluster_or_skip(nodes=SMALL) as other:
        for cluster, nodes in ((slurm, "train0,train1,train2,train3"), (other, "train0")):
            names = cluster.run(["sinfo", "-h", "-N", "-p", "gb300", "-o", "%N"]).stdout.split()
            assert ",".join(names) == nodes
        job = other.run(["sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true"]).stdout.strip()
        assert state(other, job) == "PENDING"
        assert slurm.run(["squeue", "-h"]).stdout == ""
    assert slurm.run(["srun", "-N1", "echo", "still"]).stdout == "still\n"


def test_het_job_sees_its_groups_gpus(slurm: Cluster, tmp_path: Path) -> None:
    show = "bash -c 'echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES'"
    job = slurm.run(["sbatch", "--parsable", "--wait"], input=HET.format(folder=tmp_path, show=show)).stdout.strip()
    assert state(slurm, job) == "COMPLETED"
    assert {path.name: path.read_text().split() for path in tmp_path.glob("train.*")} == {"train.0": ["train0", "0,1,2,3"], "train.1": ["train1", "0,1,2,3"]}
    assert [path.read_text().split() for path in tmp_path.glob("infer.*")] == [["infer0", "0,1,2"]]


def test_a_task_has_this_python(slurm: Cluster) -> None:
    out = slurm.run(["srun", "-p", "cpu", sys.executable, "-c", "import sys, torch; print(sys.executable, torch.ones(2).sum().item())"]).stdout
    assert out.split() == [sys.executable, "2.0"]


def test_restarted_controller_knows_its_jobs(slurm: Cluster) -> None:
    job = slurm.run(["sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true"]).stdout.strip()
    slurm.restart_controller()
    assert state(slurm, job) == "PENDING"
    slurm.run(["scancel", job])
    assert slurm.run(["srun", "-N4", "-p", "h200", "echo", "x"]).stdout == "x\n" * 4


def test_outer_slurm_is_not_seen(slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a job of another cluster our commands would otherwise take its job for theirs."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SBATCH_PARTITION", "nowhere")
    assert slurm.run(["srun", "-p", "cpu", "printenv", "SLURM_JOB_ID"]).stdout != "4711\n"
    assert "SBATCH_PARTITION" not in slurm.env()
