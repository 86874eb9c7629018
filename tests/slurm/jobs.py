"""Runs as jobs of a private cluster: submitted as `miles-submit run` would, followed by their files and by Slurm's word."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from miles.config.compose import dump_config, load_config
from miles.config.placement import node_groups
from miles.data.store.epoch import newest_epoch
from miles.data.store.run_dir import RunDir
from miles.slurm.minicluster import Cluster
from miles.slurm.minicluster.processes import Process, environment
from miles.slurm.script import script

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 180.0
# Hardly anybody is rewarded in so few steps: without the entropy bonus most rollouts would move no weight, and equal bits would say little.
STEPS = ["recipes/tiny", "num_rollout=3", "warm_start.steps=1", "checkpoint.save_interval=1", "eval.interval=2", "algorithm.entropy_coef=0.01"]
HET = ["cluster.placement=het", "cluster.groups.train.partition=gb300", "cluster.groups.rollout.partition=h200"]
SLURM = ["cluster.executor=slurm", "cluster.slurm.lead_seconds=20", "cluster.groups.all.mem=100"]


def command(process: Process) -> list[str]:
    """Its command line; empty for one that has ended."""
    try:
        return Path(f"/proc/{process.pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


class Job:
    """A submitted run."""

    def __init__(self, cluster: Cluster, run_dir: Path, *words: str, sbatch: tuple[str, ...] = ()) -> None:
        """words: overrides. sbatch: further options."""
        self.cluster, self.run_dir, self.run = cluster, run_dir, RunDir(run_dir)
        self.config = load_config(STEPS[:1], [*STEPS[1:], *SLURM, *words])
        (run_dir / "slurm").mkdir(parents=True)
        (run_dir / "run.yaml").write_text(dump_config(self.config))
        groups = list(node_groups(self.config))
        apart = [[group] for group in groups] if self.config.cluster.placement == "jobs" else [groups]
        self.scripts: list[Path] = []
        self.entries: list[dict[str, Any]] = []
        for each in apart:
            command = [sys.executable, "-m", "miles.slurm.batch", str(run_dir), *([each[0].name] if len(apart) > 1 else [])]
            self.scripts.append(run_dir / "slurm" / f"{each[0].name}.sbatch")
            self.scripts[-1].write_text(script(self.config.cluster.slurm, self.config.name, each, command, run_dir / "slurm" / "%j.log"))
        self.ids: list[int] = []
        for path, each in zip(self.scripts, apart, strict=True):
            self.submit(path, *sbatch)
            self.entries.append({"job_id": self.ids[-1], "name": self.config.name, "groups": [group.name for group in each], "time": time.time()})
        (run_dir / "slurm" / "job.json").write_text(json.dumps({"submissions": self.entries}))

    def submit(self, path: Path, *options: str) -> int:
        """sbatch; PYTHONPATH so that the job runs this tree."""
        self.ids.append(self.submit_more(*options, str(path)))
        return self.ids[-1]

    def submit_more(self, *words: str) -> int:
        """A job that is none of the run's."""
        env = self.cluster.env() | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])}
        return int(self.cluster.run(["sbatch", "--parsable", "--chdir=/tmp", *words], env=env).stdout)

    def kill_role(self, role: str, rank: int = 0) -> None:
        """kill -9 of a role process of the newest attempt."""
        (victim,) = [each for each in self.processes() if command(each)[-2:] == ["-m", f"miles.run.{role}"] and environment(each)["MILES_RANK"] == str(rank)]
        victim.kill()

    @property
    def id(self) -> int:
        return self.ids[0]

    def slurm(self, *words: str) -> str:
        """Output of one of Slurm's commands."""
        return self.cluster.run(list(words)).stdout

    def fields(self, job: int | None = None) -> dict[str, str]:
        """What scontrol says of the leader."""
        line = self.slurm("scontrol", "-o", "show", "job", str(job or self.id)).splitlines()[0]
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    @property
    def log(self) -> str:
        """What the batch processes have printed."""
        return "".join(path.read_text() for path in sorted((self.run_dir / "slurm").glob("*.log")))

    @property
    def epoch(self) -> int:
        return newest_epoch(self.run)

    def ending(self, epoch: int | None = None) -> dict[str, Any]:
        """exit.json of an attempt, default the newest."""
        path = self.run.attempt(epoch or self.epoch) / "exit.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def events(self) -> list[dict[str, Any]]:
        """Phases that the newest attempt's trainer has finished."""
        path = self.run.event_file("trainer", 0, self.epoch)
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def until(self, condition: Callable[[], Any], what: str) -> None:
        """Wait for a condition."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"{what}: did not happen\n{self.told()}"
            time.sleep(0.05)

    def trained(self, step: int, epoch: int = 0) -> None:
        """Wait until an attempt after this one has finished a step."""
        self.until(lambda: self.epoch > epoch and any(e["phase"] == "train" and e["step"] >= step for e in self.events()), f"step {step}")

    def ended(self, state: str = "COMPLETED", job: int | None = None) -> None:
        """Wait until Slurm says that the job is over, and hold it to the state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
        self.until(lambda: self.fields(job)["JobState"] in over, "the job's end")
        assert self.fields(job)["JobState"] == state, self.told()

    def finished(self) -> None:
        """The job ends well, with the run finished, and leaves nothing behind."""
        for job in self.ids:
            self.ended(job=job)
        assert self.ending()["code"] == 0, self.told()
        self.nothing_left()

    def nothing_left(self) -> None:
        """No process of the run, and no node held."""
        self.until(lambda: not self.processes(), f"end of {self.processes()}")
        self.until(lambda: not self.slurm("squeue", "-h", "-t", "R,CG", "-j", ",".join(map(str, self.ids))), "nodes are free again")

    def processes(self) -> list[Any]:
        """Living processes of the run's jobs: roles, supervisors, steps."""
        ids = {str(job) for job in self.ids}
        return [each for each in self.cluster.processes() if environment(each).get("SLURM_JOB_ID") in ids and each.name != "slurmstepd"]

    def told(self) -> str:
        """What is known of a run that went wrong."""
        ends = [f"== {path}\n{path.read_text(errors='replace')[-1200:]}" for path in sorted(self.run_dir.glob("attempts/*/logs/*"))]
        return "\n".join([self.log, *(json.dumps(self.ending(epoch)) for epoch in range(1, self.epoch + 1)), *ends])
