"""A trainer rank that hangs, of two on two nodes of a real Slurm: its node is named and left out, and the run goes on elsewhere to the same bits."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import whole_runs as runs
from jobs import HET, Job

from miles.slurm.minicluster import Cluster

NODES = {"train": 3, "infer": 1, "cpu": 0}
TWO = [*(word for word in runs.TWO_RANKS if "gpus_per_node" not in word), "train.num_nodes=2"]


def test_a_rank_that_hangs(cluster: Cluster, calm_two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUCK", "1:1:4")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([runs.STUCK, *filter(None, [os.environ.get("PYTHONPATH")])]))
    job = Job(cluster, tmp_path / "run", *HET, "cluster.hang_seconds=30", steps=TWO)
    job.until(lambda: job.ending(1), "the watchdog gives the attempt up")
    first = job.ending(1)
    assert (first["code"], first["role"], first["rank"], first["goes_on"]) == (75, "trainer", 1, True)
    assert first["reason"].startswith(f"trainer 1 on node {first['node']} hangs: it lags behind the others")
    logs = [(job.run.attempt(1) / "logs" / f"trainer.{rank}.log").read_text() for rank in (0, 1)]
    assert "distributed_c10d.py" in logs[0], "rank 0 waits in a collective"
    assert "in audit" in logs[1]
    job.finished()
    assert (job.epoch, job.fields()["Restarts"]) == (2, "1")
    assert list(json.loads((job.run_dir / "slurm" / "exclude.json").read_text())["nodes"]) == [first["node"]]
    assert job.fields()["ExcNodeList"] == first["node"]
    assert f"node {first['node']} failed in attempt 1: trainer 1 on node {first['node']} hangs" in job.log
    runs.same_run(calm_two, job.run_dir)
