"""What components of the tests' jobs do; found by import name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import submitit
from submitit.helpers import DelayedSubmission

FOREVER = 1000.0


def about() -> dict[str, Any]:
    """Who this process is, and what it has from where."""
    env = submitit.JobEnvironment()
    names = ("ONLY_TRAINER", "ONLY_SERVER", "SET_UP", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_CONF", "SLURM_ARRAY_TASK_ID", "SBATCH_ACCOUNT")
    return {
        "component": env.component,  # type: ignore[attr-defined]
        "group": env.het_group,  # type: ignore[attr-defined]
        "addresses": env.addresses,  # type: ignore[attr-defined]
        "rank": env.global_rank,
        "local": env.local_rank,
        "node": env.node,
        "tasks": env.num_tasks,
        "nodes": env.num_nodes,
        "job": env.job_id,
        "where": os.environ["SLURMD_NODENAME"],
        "python": sys.executable,
        "environment": {name: os.environ[name] for name in names if name in os.environ},
    }


def train(case: str) -> dict[str, Any]:
    """The primary component: two tasks."""
    print(f"trainer of {case}", flush=True)
    print(f"complaint of {case}", file=sys.stderr, flush=True)
    last = os.environ["SLURM_PROCID"] == "1"
    if case == "trainer raises" and last:
        raise ValueError("no batch 7")
    if case == "trainer exits" and last:
        os._exit(9)
    if case not in ("ok", "ok alone"):
        time.sleep(FOREVER)
    nested = subprocess.run(["srun", "--nodes=1", "--ntasks=1", "echo", "nested"], capture_output=True, text=True, timeout=30)
    return {**about(), "nested": nested.stdout}


def serve(case: str, ended: str | None = None) -> dict[str, Any]:
    """The other component: a service without an end. On SIGTERM it leaves a file."""
    if ended is not None:

        def leave(signum: int, frame: Any) -> None:
            Path(ended).write_text(signal.Signals(signum).name)
            os._exit(0)

        signal.signal(signal.SIGTERM, leave)
    if case == "server killed":
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    if case == "server exits":
        time.sleep(1)
        os._exit(5)
    Path(f"{os.environ['SUBMITIT_FOLDER']}/about.{os.environ['SLURM_JOB_ID']}").write_text(repr(about()))
    time.sleep(FOREVER)
    return about()


class Counting:
    """A function that saves itself: counts to the end from where it was. It comes beyond 40 only once it was requeued."""

    def __init__(self) -> None:
        self.done = 0

    def __call__(self, end: int, done: int = 0) -> tuple[int, int, str]:
        self.done = done
        while self.done < end:
            time.sleep(0.05)
            if self.done == 40 and "SLURM_RESTART_COUNT" not in os.environ:
                continue
            self.done += 1
            print(f"at {self.done}", flush=True)
        return done, self.done, os.environ.get("SLURM_RESTART_COUNT", "0")

    def checkpoint(self, end: int, done: int = 0) -> DelayedSubmission:
        return DelayedSubmission(self, end, done=self.done)


class Serving:
    """A service that takes its time to save."""

    def __call__(self, folder: str) -> None:
        time.sleep(FOREVER)

    def checkpoint(self, folder: str) -> DelayedSubmission:
        time.sleep(0.5)
        (Path(folder) / "server saved").touch()
        return DelayedSubmission(self, folder)


def node_work(case: str) -> dict[str, Any]:
    """Body of a component as miles.slurm.srun starts it: an outcome of this node."""
    component, node = os.environ["MILES_COMPONENT"], int(os.environ["MILES_NODE"])
    outcome = {"code": 0, "role": component, "rank": node, "reason": "finished", "host": os.environ["MILES_HOST"], "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}
    if component != "train" or case in ("ends", "architecture", "setup"):
        return outcome
    if case == "silent" or (case == "echoes" and node == 0):
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # in echoes a supervisor listens, and says the same
    folder = Path(os.environ["SUBMITIT_FOLDER"])
    (folder / f"at_work.{node}").touch()
    while node == 1 and not (folder / "at_work.0").exists():  # what happens to one that only begins is another case
        time.sleep(0.05)
    if case == "fails" and node == 1:
        return {**outcome, "code": 1, "reason": "the trainer broke"}
    if case == "echoes" and node == 1:
        return {**outcome, "code": 75, "reason": "trainer 1 ended with exit code 75", "killed": False}
    if case == "echoes":
        time.sleep(4)
        return {**outcome, "code": 75, "reason": "trainer 1 hangs", "told": True}
    if case == "killed" and node == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if case == "exits" and node == 1:
        print("last words", flush=True)
        os._exit(7)
    time.sleep(FOREVER)
    return outcome
