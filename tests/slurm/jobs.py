"""Runs as jobs of a private cluster: submitted as `miles-submit run` would, followed by their files and by Slurm's word."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from miles.config.compose import load_config
from miles.data.store.epoch import newest_epoch
from miles.data.store.metrics import read_lines
from miles.data.store.run_dir import RunDir
from miles.slurm.minicluster import Cluster
from miles.slurm.minicluster.processes import Process, environment
from miles.slurm.records import submitted

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 480.0
# Hardly anybody is rewarded in so few steps: without the entropy bonus most rollouts would move no weight, and equal bits would say little.
SHORT = ["num_rollout=1", "warm_start.steps=0", "eval.interval=null", "checkpoint.save_hf=false"]
STEPS = ["recipes/tiny", "num_rollout=3", "warm_start.steps=1", "checkpoint.save_interval=1000", "eval.interval=2", "algorithm.entropy_coef=0.01", "rollout.generate_path=holds.generate"]
HET = ["cluster.placement=het", "cluster.groups.train.partition=gb300", "cluster.groups.rollout.partition=h200"]
SLURM = ["cluster.executor=slurm", "cluster.slurm.lead_seconds=60", "cluster.groups.all.mem=100"]


def miles(cluster: Cluster, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A miles-submit command on a login node of a cluster, with this tree."""
    return cluster.run([sys.executable, "-m", "miles.cli", *words], check=False, cwd=cwd, env=with_path(cluster, REPOSITORY), timeout=PATIENCE)


def with_path(cluster: Cluster, *folders: Path) -> dict[str, str]:
    """The cluster's environment with these folders before what PYTHONPATH has."""
    return cluster.env() | {"PYTHONPATH": os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])}


def command(process: Process) -> list[str]:
    """Its command line; empty for one that has ended."""
    try:
        return Path(f"/proc/{process.pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


class Job:
    """A submitted run."""

    def __init__(self, cluster: Cluster, run_dir: Path, *words: str, hold: dict[int, int] | None = None, steps: list[str] | None = None, pace: float = 0.0) -> None:
        """words: overrides. hold: attempts that stand still in the generation by these weights (their number of updates). pace: seconds a sample."""
        self.cluster, self.run_dir, self.run = cluster, run_dir, RunDir(run_dir)
        run_dir.with_name("hold").write_text(json.dumps({"pace": pace, **(hold or {})}))
        self.miles("run", *(steps or STEPS), *SLURM, *words, "--run-dir", str(run_dir))

    def miles(self, *words: str) -> str:
        """Output of a miles-submit command on a login node of the cluster."""
        return self.cluster.run([sys.executable, "-m", "miles.cli", *words], env=self.environment, cwd=REPOSITORY, timeout=PATIENCE).stdout

    def follow(self, *component: str) -> subprocess.Popen[str]:
        """`logs -f` beside the run, from now on."""
        words = [sys.executable, "-m", "miles.cli", "logs", "-f", str(self.run_dir), *component]
        return subprocess.Popen(words, env=self.environment, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)

    @property
    def environment(self) -> dict[str, str]:
        """The cluster's, with this tree and this folder on the path."""
        return with_path(self.cluster, REPOSITORY, Path(__file__).parent)

    @property
    def ids(self) -> list[int]:
        """Job ids, oldest first."""
        return [entry["job_id"] for entry in submitted(self.run)]

    def submit_more(self, *words: str) -> int:
        """A job that is none of the run's."""
        return int(self.cluster.run(["sbatch", "--parsable", "--chdir=/tmp", "--output=/dev/null", *words]).stdout)

    def kill_role(self, role: str, rank: int = 0) -> None:
        """kill -9 of a role process of the newest attempt."""
        (victim,) = [each for each in self.processes() if command(each)[-2:] == ["-m", f"miles.run.{role}"] and environment(each)["MILES_RANK"] == str(rank)]
        victim.kill()

    @property
    def id(self) -> int:
        """The first job: for placement jobs the trainer's."""
        return self.ids[0]

    def slurm(self, *words: str) -> str:
        """Output of one of Slurm's commands."""
        return self.cluster.run(list(words)).stdout

    def fields(self, job: int | str | None = None) -> dict[str, str]:
        """What scontrol says of a job, default the first: of its leader, or of J+k."""
        line = self.slurm("scontrol", "-o", "show", "job", str(job or self.id)).splitlines()[0]
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    @property
    def log(self) -> str:
        """What the batch processes have printed."""
        return "".join(path.read_text() for path in sorted((self.run_dir / "slurm").glob("*.log")))

    @property
    def epoch(self) -> int:
        return newest_epoch(self.run)

    def trained(self) -> list[int]:
        """Steps that attempts have trained on, each as often as it was."""
        paths = self.run.events.glob("trainer.0.*.jsonl")
        return sorted(event["step"] for path in paths for event in read_lines(path) if event["phase"] == "train")

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return load_config([self.run.run_yaml]).total_steps

    def ending(self, epoch: int | None = None) -> dict[str, Any]:
        """exit.json of an attempt, default the newest."""
        path = self.run.attempt(epoch or self.epoch) / "exit.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def until(self, condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> None:
        """Wait for a condition."""
        deadline = time.monotonic() + patience
        while not condition():
            assert time.monotonic() < deadline, f"{what}: did not happen\n{self.told()}"
            time.sleep(0.05)

    def held(self, epoch: int = 1) -> None:
        """Wait until an attempt stands still."""
        self.until(self.run_dir.with_name(f"held.{epoch}").exists, f"attempt {epoch} comes to its hold")

    def ended(self, state: str = "COMPLETED", job: int | None = None, patience: float = PATIENCE) -> None:
        """Wait until Slurm says that the job is over, and hold it to the state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
        self.until(lambda: self.fields(job)["JobState"] in over, "the job's end", patience)
        assert self.fields(job)["JobState"] == state, self.told()

    def finished(self, patience: float = PATIENCE) -> None:
        """The job ends well, with the run finished, and leaves nothing behind."""
        for job in self.ids:
            self.ended(job=job, patience=patience)
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
