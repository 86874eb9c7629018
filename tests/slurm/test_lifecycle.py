"""One run through all that a cluster does to it, one thing after another: it goes on by itself, and ends with the bits of an undisturbed one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import whole_runs as runs
from calm_jobs import calm_run
from clusters import cluster_or_skip
from jobs import HET, STEPS, Job

from miles.slurm.minicluster import Cluster, Settings

LONGER = [*STEPS, "num_rollout=4"]
LOW = ["cluster.groups.all.partition=low", "cluster.groups.train.constraint=aarch64", "cluster.groups.rollout.constraint=x86_64"]
HANGS = 6  # attempt
# Two minutes with a warning 110 s before their end: Slurm looks at its jobs every 30 s.
TIME = ["cluster.groups.all.time=2", "cluster.slurm.lead_seconds=110"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of each kind, so that one may fail; time enough to save on a busy machine."""
    with cluster_or_skip(nodes={"train": 2, "infer": 2, "cpu": 0}, settings=Settings(grace_seconds=60, kill_wait_seconds=60)) as made:
        yield made


def test_a_run_goes_on_whatever_the_cluster_does(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calm = calm_run(tmp_path / "calm", *LONGER)
    monkeypatch.setenv("STUCK", f"{HANGS}:0:4")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([runs.STUCK, *filter(None, [os.environ.get("PYTHONPATH")])]))
    holds = {1: 1, 2: 2, 3: 2, 4: 3, 5: 3, 7: 4}
    job = Job(cluster, tmp_path / "run", HET[0], *LOW, *TIME, "cluster.hang_seconds=30", steps=LONGER, hold=holds)
    follower = job.follow("trainer")

    job.until(lambda: job.ending(1), "the time limit is near")
    job.until(lambda: job.fields()["JobState"] == "PENDING", "the job is requeued")
    for part in (0, 1):
        job.slurm("scontrol", "update", f"JobId={job.id}+{part}", "TimeLimit=60")

    job.held(2)
    cluster.restart_controller(crash=True)
    taker = job.submit_more("--partition=high", "--exclusive", f"--nodelist={job.fields()['NodeList']}", "--wrap=true")

    job.held(3)
    job.slurm("scontrol", "requeue", str(job.id))

    job.held(4)
    job.kill_role("trainer")

    job.held(5)
    job.kill_role("engine")

    job.until(lambda: job.ending(HANGS), "the watchdog gives the hung attempt up")
    hung = job.ending(HANGS)["node"]

    job.held(7)
    assert job.fields()["NodeList"] not in ("", hung)
    dead = job.fields(f"{job.id}+1")["NodeList"]
    cluster.kill_node(dead, tasks=True)

    job.finished()
    job.ended(job=taker)
    ends = [job.ending(epoch) for epoch in range(1, 8)]
    assert job.epoch == 8
    assert [end.get("stopped") for end in ends[:6]] == [True, True, True, False, False, False]
    assert {end["code"] for end in ends if end} == {75}
    assert "trainer 0 was killed by SIGKILL" in ends[3]["reason"]
    assert "engine 0 was killed by SIGKILL" in ends[4]["reason"]
    assert f"trainer 0 on node {hung} hangs" in ends[5]["reason"]
    assert "in audit" in (job.run.attempt(HANGS) / "logs" / "trainer.0.log").read_text()
    assert set(json.loads((job.run_dir / "slurm" / "exclude.json").read_text())["nodes"]) == {hung, dead}
    runs.same_run(calm, job.run_dir)

    for epoch in (1, 2, 3):
        stop = json.loads((job.run.attempt(epoch) / "stop.json").read_text())
        assert 0 < sum(seconds or 0.0 for seconds in stop["seconds"].values()) < 110
        assert epoch == 3 or stop["seconds"]["save"] is not None, "saved for the stop's sake"  # `scontrol requeue` may leave no time for it
    assert job.log.count("the stop took") == 3
    assert f"job {job.id} begins again on {job.fields()['NodeList']}" in job.log
    assert (job.run_dir / "report" / "index.html").is_file()
    said, _ = follower.communicate(timeout=180)
    assert follower.returncode == 0
    assert [f"── attempt {epoch} ──" in said for epoch in range(2, 9)] == [True] * 7
    assert said.splitlines()[-1] == "── attempt 8 ended: finished (exit code 0) ──"
