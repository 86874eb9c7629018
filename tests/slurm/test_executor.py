"""submitit's executor for heterogeneous jobs on a real Slurm, with and without accounting."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import cluster_or_skip
from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError

from miles.slurm.executor import HetSlurmExecutor
from miles.slurm.job import HetSlurmInfoWatcher, HetSlurmJob
from miles.slurm.minicluster import Cluster, Settings
from miles.slurm.minicluster.processes import environment, everybody
from miles.slurm.states import ALIVE

HERE = Path(__file__).parent
REPORT_SECONDS = 10.0  # from a job's end to our word of it


@pytest.fixture(scope="module")
def patient() -> Iterator[Cluster]:
    """A cluster that waits as long as real ones do before it kills what SIGTERM did not end."""
    with cluster_or_skip(nodes={"train": 4, "infer": 4, "cpu": 1}, settings=Settings(kill_wait_seconds=30)) as found:
        yield found


@pytest.fixture
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """A cluster, by default without accounting, with a shell on it that is itself in a job of which nothing may be seen."""
    found: Cluster = request.getfixturevalue(getattr(request, "param", "patient"))
    for name, value in found.env().items():
        monkeypatch.setenv(name, value)
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK", "SLURM_ARRAY_TASK_ID", "SLURM_PROCID", "SBATCH_ACCOUNT", "SBATCH_PARTITION"):
        monkeypatch.setenv(name, "999")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(HetSlurmJob, "watcher", HetSlurmInfoWatcher())
    return found


both = pytest.mark.parametrize("cluster", ["patient", "slurm24"], indirect=True, ids=["22.05", "24.11"])
everywhere = pytest.mark.parametrize("cluster", ["patient", "slurm_accounting", "slurm24"], indirect=True, ids=["without accounting", "with accounting", "24.11"])


def executor(folder: Path, nodes: int = 1) -> HetSlurmExecutor:
    """Two components: a trainer of two tasks, and a server, on nodes of different kinds."""
    other = folder / "other python"
    folder.mkdir(parents=True, exist_ok=True)
    other.write_text(f"#!/bin/sh\nexport SET_UP=by_the_wrapper\nexec {sys.executable} \"$@\"\n")
    other.chmod(0o755)
    made = HetSlurmExecutor(folder / "jobs")
    made.update_parameters(time="15", job_name="pair", mem="200")
    made.component("trainer", nodes=nodes, tasks_per_node=2 // nodes, partition="gb300", gpus_per_node=4, gpu_type="gb300", environment={"ONLY_TRAINER": "1"}, setup=["export SET_UP=trainer"])
    made.component("server", partition="cpu" if nodes == 2 else "h200", gpus_per_node=0, environment={"ONLY_SERVER": "1"}, python=f"'{other}'")
    return made


def ended(job: HetSlurmJob[Any]) -> float:
    """Seconds from now until the job has reported, by each of its components."""
    start = time.monotonic()
    for component in job.components.values():
        component.exception()
    return time.monotonic() - start


def nothing_is_left(cluster: Cluster, folder: Path) -> None:
    """No process of a job in folder, and no held node."""
    deadline = time.monotonic() + 60
    while True:
        left = [p.pid for p in everybody() if environment(p).get("SUBMITIT_FOLDER", "").startswith(str(folder))]
        held = set(cluster.run(["sinfo", "-h", "-N", "-o", "%T"]).stdout.split()) - {"idle"}
        if not left and not held:
            return
        assert time.monotonic() < deadline, (left, held)
        time.sleep(0.1)


@everywhere
def test_results_logs_and_ranks_by_component(cluster: Cluster, tmp_path: Path) -> None:
    job = executor(tmp_path, nodes=2).submit_components({"trainer": ("payloads.train", "ok"), "server": ("payloads.serve", "ok", str(tmp_path / "ended"))})
    assert job.state in (*ALIVE, "COMPLETED")  # what is known now is mostly older than the results
    first, second = job.results()
    assert job.state in ("RUNNING", "COMPLETING", "COMPLETED")  # the server is being stopped
    server = job.components["server"]
    assert server.results() == [None]
    assert (tmp_path / "ended").read_text() == "SIGTERM"
    nothing_is_left(cluster, tmp_path)
    assert job.state == "COMPLETED"

    assert [first[name] for name in ("component", "group", "rank", "local", "node", "tasks", "nodes", "job")] == ["trainer", 0, 0, 0, 0, 2, 2, job.job_id]
    assert [second[name] for name in ("component", "group", "rank", "local", "node", "tasks", "nodes", "job")] == ["trainer", 0, 1, 0, 1, 2, 2, job.job_id]
    assert first["where"] < second["where"]  # in the order of the allocation
    assert first["nested"] == second["nested"] == "nested\n"  # srun in a task doesn't wait for what the task holds
    other = ast.literal_eval((tmp_path / "jobs" / "server" / f"about.{job.job_id}").read_text())
    assert [other[name] for name in ("component", "group", "rank", "tasks", "nodes", "job")] == ["server", 1, 0, 1, 1, job.job_id]
    assert other["where"].startswith("cpu")
    addresses = [cluster.run(["scontrol", "-o", "show", "node", node]).stdout.partition("NodeAddr=")[2].split()[0] for node in (first["where"], second["where"], other["where"])]
    assert first["addresses"] == other["addresses"] == {"trainer": addresses[:2], "server": addresses[2:]}

    conf = cluster.env()["SLURM_CONF"]
    assert first["environment"] == {"ONLY_TRAINER": "1", "SET_UP": "trainer", "SLURM_CONF": conf, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    assert other["environment"] == {"ONLY_SERVER": "1", "SET_UP": "by_the_wrapper", "SLURM_CONF": conf}

    assert "trainer of ok" in str(job.task(1).stdout())
    assert "complaint of ok" in str(job.task(0).stderr())
    assert "complaint of ok" not in str(job.task(0).stdout())
    assert sorted(path.name for path in (tmp_path / "jobs" / "trainer").iterdir()) == sorted(
        [f"{job.job_id}_{name}" for name in ("submission.sh", "submitted.pkl", "srun.err", *(f"{rank}_{kind}" for rank in (0, 1) for kind in ("log.out", "log.err", "result.pkl")))]
    )
    again = HetSlurmJob.of(tmp_path / "jobs", job.job_id)
    assert again.results() == [first, second]
    assert again.submission().args == ("ok",)


CASES = {
    "trainer raises": (FailedJobError, "Task 1 of component trainer on train", "FAILED"),
    "trainer exits": (UncompletedJobError, "Exited with exit code 9", "FAILED"),
    "server exits": (UncompletedJobError, "Task 0 of component server on infer", "FAILED"),
    "server killed": (UncompletedJobError, "Killed", "FAILED"),
}


@everywhere
def test_one_failure_ends_all_and_is_told(cluster: Cluster, tmp_path: Path) -> None:
    """Four jobs side by side, in each another process fails; the rest would go on for ever and doesn't mind SIGTERM."""
    made = executor(tmp_path)
    jobs = {case: made.submit_components({"trainer": ("payloads.train", case), "server": ("payloads.serve", case)}) for case in CASES}
    for case, (kind, words, state) in CASES.items():
        components = jobs[case].components
        failed = components["trainer"].task(1) if case.startswith("trainer") else components["server"]
        deadline = time.monotonic() + 120
        while not (tmp_path / "jobs" / f"{jobs[case].job_id}_end.json").exists():
            assert time.monotonic() < deadline, case
            time.sleep(0.1)
        assert ended(jobs[case]) < REPORT_SECONDS, case
        error = failed.exception()
        assert type(error) is kind, case
        told = str(components["trainer"].task(0).exception())
        assert words in told if case != "trainer raises" else "no batch 7" in str(error), told
        assert jobs[case].state == state, case
        with pytest.raises(UncompletedJobError):
            components["trainer"].results()
    assert jobs["trainer exits"].get_info()["ExitCode"] == "9"
    nothing_is_left(cluster, tmp_path)


def running(job: HetSlurmJob[Any], sign: Path) -> None:
    """Wait until the server runs."""
    deadline = time.monotonic() + 120
    while not sign.exists():
        assert time.monotonic() < deadline, job.get_info()
        time.sleep(0.1)


@both
@pytest.mark.parametrize("part", ["job", "component"])
def test_cancelled(cluster: Cluster, tmp_path: Path, part: str) -> None:
    """Cancelled as a whole by any of its component's jobs, or by a stranger's scancel of one component: reported long before Slurm's KillWait."""
    job = executor(tmp_path).submit_components({"trainer": ("payloads.train", "hangs"), "server": ("payloads.serve", "hangs")})
    running(job, tmp_path / "jobs" / "server" / f"about.{job.job_id}")
    if part == "job":
        job.components["server"].cancel()
    else:
        cluster.run(["scancel", str(int(job.job_id) + 1)])
    assert ended(job) < REPORT_SECONDS
    assert job.state == ("CANCELLED" if part == "job" else "FAILED")
    assert "ended by Slurm" in str(job.task(0).exception())
    nothing_is_left(cluster, tmp_path)


def test_cancelled_while_it_waits(cluster: Cluster, tmp_path: Path) -> None:
    made = executor(tmp_path)
    made.update_parameters(sbatch={"begin": "now+1hour"})
    job = made.submit_components({"trainer": ("payloads.train", "ok"), "server": ("payloads.serve", "ok")})
    assert job.get_info()["State"] == "PENDING"
    assert "may not start yet" in job.get_info()["Reason"]
    job.cancel()
    assert ended(job) < REPORT_SECONDS
    assert job.state == "CANCELLED"


@both
def test_saved_and_requeued_as_a_whole(cluster: Cluster, tmp_path: Path) -> None:
    """Both components save, the leader is requeued once, and the count goes on where it was."""
    job = executor(tmp_path).submit_components({"trainer": ("payloads.Counting", 60), "server": ("payloads.Serving", str(tmp_path))})
    deadline, far = time.monotonic() + 120, 0
    while far < 2:  # each task of the trainer counts for itself
        far = sum("at 20\n" in log.read_text() for log in (tmp_path / "jobs" / "trainer").glob(f"{job.job_id}_*_log.out"))
        assert time.monotonic() < deadline
        time.sleep(0.1)
    job._interrupt()
    begun, end, restart = job.task(0).result()
    assert 20 <= begun <= 40
    assert (end, restart) == (60, "1")
    assert (tmp_path / "server saved").exists()
    assert job.components["server"].results() == [None]
    assert job.get_info()["Restarts"] == "1"
    assert {path.name for path in (tmp_path / "jobs" / "trainer").glob("*_log.*")} == {f"{job.job_id}_{rank}_log.{kind}" for rank in (0, 1) for kind in ("out", "err")}
    assert all(line in str(job.task(rank).stdout()) for rank in (0, 1) for line in ("at 1\n", "at 20\n", "at 60\n"))
    nothing_is_left(cluster, tmp_path)


@pytest.mark.parametrize("cluster", ["slurm24"], indirect=True)
def test_a_segment_lies_in_one_block(cluster: Cluster, tmp_path: Path) -> None:
    """Blocks are train[0-1] and train[2-3]; with a node of the first taken, a segment of two has only the second."""
    taken = cluster.run(["sbatch", "--parsable", "--exclusive", "-p", "gb300", "-w", "train0", "--output=/dev/null", "--wrap=sleep 1000"]).stdout.strip()
    made = executor(tmp_path, nodes=2)
    made.component("trainer", **made.groups["trainer"], segment=2)
    job = made.submit_components({"trainer": ("payloads.train", "ok"), "server": ("payloads.serve", "ok")})
    assert [result["where"] for result in job.results()] == ["train2", "train3"]
    assert "#SBATCH --segment=2" in (tmp_path / "jobs" / "trainer" / f"{job.job_id}_submission.sh").read_text()
    cluster.run(["scancel", taken])
    nothing_is_left(cluster, tmp_path)


def test_one_component_as_submitit_does_it(cluster: Cluster, tmp_path: Path) -> None:
    """Without components the plugin is an executor like any other."""
    import payloads
    import submitit

    made = submitit.AutoExecutor(tmp_path / "jobs", cluster="hetslurm")
    made.update_parameters(timeout_min=15, mem_gb=0.2, nodes=2, name="alone", hetslurm_partition="gb300", stderr_to_stdout=True)
    job = made.submit(payloads.train, "ok alone")
    first, second = job.results()
    assert (first["component"], first["group"], first["rank"], second["rank"], second["nodes"]) == ("main", 0, 0, 1, 2)
    assert "complaint of ok alone" in str(job.task(1).stdout())
    assert made.submit(max, 3, 5).task(0).result() == 5


def test_what_cannot_be_submitted(cluster: Cluster, tmp_path: Path) -> None:
    made = executor(tmp_path)
    with pytest.raises(ValueError, match=r"unavailable parameter\(s\): partitoin; there are: account, "):
        made.component("third", partitoin="cpu")
    with pytest.raises(ValueError, match="component third, segment: Input should be greater than or equal to 1"):
        made.component("third", segment=0)
    with pytest.raises(ValueError, match="can't be imported by the job's interpreters"):
        made.submit(lambda: 1)
    with pytest.raises(ValueError, match="functions are given for trainer, but the components are trainer, server"):
        made.submit_components({"trainer": ("payloads.train",)})
    made.component("server", partition="nowhere")
    with pytest.raises(FailedSubmissionError, match="sbatch: Invalid partition name specified"):
        made.submit_components({"trainer": ("payloads.train", "ok"), "server": ("payloads.serve", "ok")})
    assert not [path for path in (tmp_path / "jobs").rglob("*") if path.is_file()]
    assert HetSlurmJob.watcher.get_state("424242", mode="force") == "FORGOTTEN"
    assert HetSlurmJob.watcher.is_done("424242")


def test_the_example_of_the_documentation(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = (HERE.parents[1] / "docs" / "slurm.md").read_text().partition("## Your own functions on groups of different hardware")[2]
    blocks = re.findall(r"```python\n# (\w+\.py).*?\n(.*?)```", section, re.DOTALL)
    for name, text in blocks:
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
    done = subprocess.run([sys.executable, "submit.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answer, state = done.stdout.splitlines()
    assert f"It prints `{answer}`" in section
    assert state.split()[0] in ("RUNNING", "COMPLETING", "COMPLETED")
