"""Which jobs are a run's own: what is noted of a job when it is submitted, and Slurm's word on it, if it is still that job."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from miles.config.exits import UserError
from miles.data.store.run_dir import RunDir
from miles.slurm import queue, records
from miles.slurm.command import slurm_command
from miles.slurm.states import JobState, Marks, from_controller, job_state


def entry_of(run: RunDir, job: int, name: str, groups: Sequence[str], cluster: str, seconds: float | None = None) -> dict[str, Any]:
    """The entry of job.json for a job that has just been submitted, or is this one.

    seconds: Slurm is asked once, for at most so long; None: while its controller restarts, too, and UserError where it doesn't answer.
    """
    try:
        part = next(iter(queue.parts(job, seconds)), None)
    except UserError:
        if seconds is None:
            raise
        part = None  # it has the job all the same
    return {
        "job_id": job,
        "name": name,
        "groups": list(groups),
        "time": time.time(),
        "cluster": cluster,
        "submitted": part.submitted if part else "",
        "output": part.output if part else str(records.folder(run).absolute() / f"{job}.log"),  # as in the script
        "run_dir": str(run.path.absolute()),
    }


def note_here(run: RunDir, groups: Sequence[str]) -> None:
    """A job notes itself, unless the command that submitted it has: it was submitted by hand, or as an array's task."""
    job = int(os.environ["SLURM_JOB_ID"])
    if job not in [entry["job_id"] for entry in records.submitted(run)]:  # a requeued job keeps its id
        records.note(run, entry_of(run, job, os.environ.get("SLURM_JOB_NAME", ""), groups, os.environ.get("SLURM_CLUSTER_NAME", "")))


def state_of(entry: Mapping[str, Any]) -> JobState:
    """Slurm's word on a job of job.json; FORGOTTEN when its id is another job's by now. UserError: Slurm can't be asked."""
    job = str(entry["job_id"])
    return job_state(job, Marks(lambda output: output == entry["output"], entry["name"], entry["submitted"], entry["cluster"]))


def parts_of(entry: Mapping[str, Any], seconds: float | None = None) -> list[queue.Part]:
    """queue.parts of a job of job.json; none when its id is another job's by now."""
    parts = queue.parts(entry["job_id"], seconds)
    return parts if parts and parts[0].output == entry["output"] else []


def states(run: RunDir) -> list[JobState]:
    """The same for all jobs of a run, oldest first."""
    return [state_of(entry) for entry in records.submitted(run)]


def alive(run: RunDir) -> list[JobState]:
    """Those that wait or run."""
    return [state for state in states(run) if not state.over]


def array_state(folder: Path, job: str) -> JobState:
    """Slurm's word on an array of a sweep in this folder, or on one of its tasks (A_i)."""
    return job_state(job, _of_sweep(folder))


def is_array(folder: Path, job: int) -> bool:
    """Whether the controller knows this array as the sweep's."""
    return from_controller(str(job), _of_sweep(folder)) is not None


def _of_sweep(folder: Path) -> Marks:
    return Marks(lambda output: Path(output).parent == folder.absolute())


def cluster_name() -> str:
    """The name of the cluster; empty where Slurm doesn't say."""
    try:
        lines = slurm_command(["scontrol", "show", "config"], check=False).stdout.splitlines()
    except UserError:
        return ""
    return next((line.partition("=")[2].strip() for line in lines if line.startswith("ClusterName ")), "")
