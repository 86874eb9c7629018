"""Time limits and preemptions one after another, on a real Slurm: each is saved before the kill, no step is lost, and the bits are those of a run on this machine."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import shared
import whole_runs as runs
from calm_jobs import calm_run
from clusters import cluster_or_skip
from jobs import HET, Job

from miles.slurm.minicluster import Cluster, Settings

LEAD, GRACE = 60, 20  # s
PACE = 8  # s: twice what a sample takes in a job, so that an attempt comes to a few steps


def words(steps: int) -> list[str]:
    """So many rollouts."""
    return ["recipes/tiny", "warm_start.steps=1", f"num_rollout={steps}", "checkpoint.save_interval=1000", "eval.interval=5", "algorithm.entropy_coef=0.01", "rollout.generate_path=holds.generate"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Nodes for two groups; a preempted job has some seconds to save."""
    with cluster_or_skip(nodes={"train": 1, "infer": 1, "cpu": 0}, settings=Settings(grace_seconds=GRACE)) as made:
        yield made


def check(job: Job, calm: Path, stops: int, bound: float) -> None:
    """Every stop was saved within the bound, no step was trained on twice, and the run ended with its bits."""
    ends = [json.loads((job.run.attempt(epoch) / "exit.json").read_text()) for epoch in range(1, job.epoch + 1)]
    told = [json.loads((job.run.attempt(epoch) / "stop.json").read_text()) for epoch in range(1, job.epoch)]
    seconds = [end["time"] - stop["time"] for end, stop in zip(ends, told, strict=False)]
    longest = {phase: max(stop["seconds"][phase] or 0.0 for stop in told) for phase in ("step", "save", "end", "leave")}
    trained = job.trained()
    shared.say(f"{job.run_dir.parent.name}: {len(seconds)} stops, saved after at most {max(seconds):.1f} s of {bound:g} s, {len(trained) - len(set(trained))} steps done again")
    shared.say(f"longest phases of a stop [s]: {', '.join(f'{phase} {value:.1f}' for phase, value in longest.items())}")
    shared.summary(f"slurm.{job.run_dir.parent.name}", {"stops": len(seconds), "seconds": seconds, "bound": bound, "longest": longest})
    assert len(seconds) >= stops
    assert all(end["stopped"] and end["code"] == 75 for end in ends[:-1])
    assert max(seconds) < bound
    assert trained == list(range(1, job.steps + 1))
    runs.same_run(calm, job.run_dir)


def test_time_limits(cluster: Cluster, tmp_path: Path, count: int) -> None:
    """--time=2 with a lead of a minute, a fifth of COUNT times."""
    stops = max(1, count // 5)
    steps = 4 * stops  # three to four an attempt: the generation of a step takes three samples' time
    calm = calm_run(tmp_path / "calm", *words(steps))
    job = Job(cluster, tmp_path / "run", *HET, "cluster.groups.all.time=2", f"cluster.slurm.lead_seconds={LEAD}", steps=words(steps), pace=PACE / 2)
    job.finished(patience=240.0 * (stops + 2))
    check(job, calm, stops, LEAD)


def test_preemptions(cluster: Cluster, tmp_path: Path, count: int, seed: int) -> None:
    """At moments that are drawn, a fifth of COUNT times."""
    stops, rng = max(1, count // 5), random.Random(seed)
    steps = 2 * stops + 2
    calm = calm_run(tmp_path / "calm", *words(steps))
    job = Job(cluster, tmp_path / "run", "cluster.groups.all.partition=low", "cluster.groups.all.nodelist=train0", steps=words(steps), pace=PACE / 2)
    for number in range(1, stops + 1):
        job.until(lambda number=number: job.epoch >= number and job.run.event_file("trainer", 0, number).exists(), f"attempt {number} works")
        time.sleep(rng.uniform(0, PACE))
        job.submit_more("--partition=high", "--exclusive", "--nodelist=train0", "--wrap=sleep 1")
        job.until(lambda number=number: job.ending(number), f"attempt {number} has ended")
        if not job.ending(number)["stopped"]:
            break  # the run was finished before
    job.finished(patience=240.0)
    check(job, calm, stops, GRACE)
