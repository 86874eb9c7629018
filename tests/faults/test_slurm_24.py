"""A run on Slurm 24.11 with block topology: its trainer's nodes lie in one block, also after a requeue."""

from __future__ import annotations

from pathlib import Path

import whole_runs as runs
from jobs import HET, Job

from miles.slurm.minicluster import Cluster

VERSION, NODES = "24.11", {"train": 4, "infer": 1, "cpu": 0}
TWO = [*(word for word in runs.TWO_RANKS if "gpus_per_node" not in word), "train.num_nodes=2", "rollout.generate_path=holds.generate"]


def test_a_segment_stopped_and_killed(cluster: Cluster, calm_two: Path, tmp_path: Path) -> None:
    """Of the first block a node is taken, so the segment is the second; then a stop before the time limit, and a trainer that is killed."""
    taken = cluster.run(["sbatch", "--parsable", "--exclusive", "-p", "gb300", "-w", "train0", "--output=/dev/null", "--wrap=sleep 1000"]).stdout.strip()
    job = Job(cluster, tmp_path / "run", *HET, "cluster.groups.train.segment=2", steps=TWO, hold={1: 3, 2: 4})
    for attempt in (1, 2):
        job.held(attempt)
        assert job.fields()["NodeList"] == "train[2-3]"
        if attempt == 1:
            job.slurm("scancel", "--batch", "--signal=USR1", str(job.id))
    job.kill_role("trainer", rank=1)
    job.finished()
    assert (job.epoch, job.fields()["Restarts"]) == (3, "1")
    assert "trainer 1 was killed by SIGKILL" in job.ending(2)["reason"]
    runs.same_run(calm_two, job.run_dir)
    cluster.run(["scancel", taken])
