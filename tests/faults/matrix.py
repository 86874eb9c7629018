"""A cell of the fault matrix: a run on a private Slurm loses something in the middle of a phase, and must end as if nothing had been."""

from __future__ import annotations

import fnmatch
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import shared
import whole_runs as runs
from clusters import cluster_or_skip
from jobs import HET, Job, command

from miles.data.store.journal import read_journal
from miles.data.store.metrics import read_lines
from miles.data.store.run_dir import journal_paths
from miles.slurm.minicluster import Cluster

HERE = Path(__file__).parent
NODES = {"train": 2, "infer": 2, "cpu": 0}  # one of each kind to spare
WARM_STEPS, STEPS = 1, 4
HALT = 3  # the step with all phases
WORDS = [
    "recipes/tiny", f"warm_start.steps={WARM_STEPS}", f"num_rollout={STEPS - WARM_STEPS}", "checkpoint.save_interval=2", "eval.interval=null",
    "train.num_gpus_per_node=2", "train.num_steps_per_rollout=2", "algorithm.entropy_coef=0.01", "rollout.generate_path=halting.generate",
]  # fmt: skip
# What the trainer's events must tell when a phase of the step is under way: what has ended, and what has not.
UNDER_WAY = {
    "generate": (("sync", HALT - 1), ("wait", HALT)),
    "train": (("wait", HALT), ("train", HALT)),
    "sync": (("train", HALT), ("sync", HALT)),
    "save": (("sync", HALT), ("save", HALT)),
}
HALTED = {"generate": ["worker.0"], "train": ["trainer.0", "trainer.1"], "sync": ["trainer.0"], "save": ["trainer.0", "trainer.1"]}
# The orchestrator is the batch process, a node its slurmd, the job all of its processes.
VICTIMS = ("trainer", "orchestrator", "service", "engine", "train-node", "rollout-node", "job")
GONE = ("orchestrator", "job")  # nothing is left that could go on: a person resumes the run
CELLS = {f"{victim}:{phase}": (victim, phase) for victim in VICTIMS for phase in UNDER_WAY}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of each kind, of which a run takes one."""
    with cluster_or_skip(nodes=NODES) as made:
        yield made


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that all cells must equal."""
    return calm_run(tmp_path_factory.mktemp("calm") / "run")


def chosen(patterns: str = "", share: str = "") -> list[str]:
    """Names of cells: all, or those that fit one of the patterns (`trainer:*,job:save`); share: `2/4` is the second of four shares of them."""
    words = [word.strip() for word in patterns.split(",") if word.strip()]
    for word in words:
        assert fnmatch.filter(CELLS, word), f"CELLS: no cell is called {word}; there are {', '.join(CELLS)}"
    found = [name for name in CELLS if not words or any(fnmatch.fnmatch(name, word) for word in words)]
    number, _, of = (share or "1/1").partition("/")
    assert 1 <= int(number) <= int(of), f"SHARD: {share} is no share, such as 2/4"
    return found[int(number) - 1 :: int(of)]


@contextmanager
def halting() -> Iterator[None]:
    """Processes started in here can stand still."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE / "halting"), *filter(None, [os.environ.get("PYTHONPATH")])]))
        yield


def calm_run(folder: Path) -> Path:
    """The same run on this machine, without Slurm."""
    with halting():
        runs.run(folder, *WORDS)
    return folder


def cell(cluster: Cluster, calm: Path, folder: Path, victim: str, phase: str) -> dict[str, float]:
    """One cell; returns seconds from the kill to the checked end, and the number of attempts."""
    folder.mkdir(exist_ok=True)
    (folder / "halt").write_text(json.dumps({"epoch": 1, "phase": phase, "step": HALT}))
    with halting():
        job = Job(cluster, folder / "run", *HET, "cluster.groups.all.time=30", steps=WORDS)
        lost: list[str] = []
        try:
            under_way(job, phase)
            kept = journalled(job)
            killed = time.monotonic()
            lost += strike(job, victim)
            goes_on(job, victim)
            job.ended(job=job.ids[-1])
        finally:
            (folder / "released").touch()
            if job.fields(job.ids[-1])["JobState"] != "COMPLETED":
                job.slurm("scancel", *map(str, job.ids))
            for node in lost:
                cluster.start_node(node)
    assert not finished(job, 1, UNDER_WAY[phase][1]), "the phase was over before the kill"
    assert job.ending()["code"] == 0, job.told()
    job.nothing_left()
    job.until(lambda: set(job.slurm("sinfo", "-h", "-N", "-o", "%T").split()) == {"idle"}, "all nodes are free again")
    nothing_made_again(job, kept)
    shared.no_draw_lost_or_used_twice(job.run_dir, WARM_STEPS, STEPS)
    runs.same_run(calm, job.run_dir)
    assert runs.train_records(calm) == runs.train_records(job.run_dir)
    return {"after_kill": round(time.monotonic() - killed, 1), "attempts": job.epoch}


def finished(job: Job, epoch: int, place: tuple[str, int]) -> bool:
    """Whether a phase of a step has ended well in an attempt."""
    events = read_lines(job.run.event_file("trainer", 0, epoch))
    return any((event["phase"], event["step"]) == place and "error" not in event for event in events)


def under_way(job: Job, phase: str) -> None:
    """Wait until all who take part in the phase stand still in it, and hold the run's own events to it."""
    halted: Callable[[], bool] = lambda: all(job.run_dir.with_name(f"halted.{who}").exists() for who in HALTED[phase])  # noqa: E731
    job.until(halted, f"{phase} of step {HALT}")
    before, not_yet = UNDER_WAY[phase]
    assert finished(job, 1, before), f"{before} is over"
    assert not finished(job, 1, not_yet), f"{not_yet} is under way"
    if phase == "generate":
        job.until(lambda: len([key for key in journalled(job) if key[1] == HALT - 1]) == shared.BATCH // 2, "half of the groups are finished")
        assert not (job.run.batch(HALT)).exists()
    if phase == "save":
        assert list((job.run.attempt(1) / "staging").glob(".step_*")), "a checkpoint is being written"
        assert not (job.run.checkpoints / f"step_{HALT:06d}").exists()


def strike(job: Job, victim: str) -> list[str]:
    """Kill; returns the names of nodes whose slurmd died."""
    if victim.endswith("-node"):
        node = job.fields(f"{job.id}+{1 if victim == 'rollout-node' else 0}")["NodeList"]
        job.cluster.kill_node(node)
        return [node]
    if victim == "job":
        for process in job.processes():
            process.kill()
    elif victim == "orchestrator":
        (batch,) = [each for each in job.processes() if "miles.slurm.batch" in command(each)]
        batch.kill()
    else:
        job.kill_role(victim, rank=1 if victim == "trainer" else 0)
    return []


def goes_on(job: Job, victim: str) -> None:
    """The run goes on by itself, or is resumed where nobody is left; then what stood still wakes up, if it still lives, and must do no harm."""
    if victim in GONE:
        job.ended("FAILED")
        job.nothing_left()
        job.miles("resume", str(job.run_dir))
    job.until(lambda: job.epoch >= 2, "a second attempt")
    job.run_dir.with_name("released").touch()


Key = tuple[str, int, int]  # kind, weight version, draw


def journalled(job: Job) -> set[Key]:
    """Finished groups."""
    return {(context["kind"], context["weight_version"], group[0].draw) for path in journal_paths(job.run.journal) for context, group in read_journal(path)}


def nothing_made_again(job: Job, kept: set[Key]) -> None:
    """No later attempt generates what the first one had finished."""
    later = [path for path in job.run_dir.parent.glob("generated.*") if path.name != "generated.1"]
    again = {tuple(json.loads(line)[:3]) for path in later for line in path.read_text().splitlines()}
    assert again, "the second attempt generated"
    assert not again & kept, f"generated again: {sorted(again & kept)}"
