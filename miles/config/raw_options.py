"""What a user gives by a free name: raw options of sbatch and srun, environment variables, shell lines. Some names are miles's own, some would be run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from pydantic_core import PydanticCustomError

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
OPTION = re.compile(r"[A-Za-z][A-Za-z0-9-]*")
MOUNT = re.compile(r"[^:,]+:[^:,]+(:[a-z]+(\+[a-z]+)*)?")
TASKS = "there is one task a node, the supervisor of its processes (cluster.groups.*.cpus_per_task is what it gets)"
LOG = "miles finds a job's output where it put it, RUN/slurm"
REQUEUE = "set cluster.slurm.requeue"
NODES = "set cluster.groups.*.nodes, or what it follows from (train.num_nodes, rollout.num_gpus)"
SBATCH = {
    "array": "a run is one job; submit several runs with miles-submit sweep",
    "output": LOG,
    "error": LOG,
    "open-mode": LOG,
    "signal": "set cluster.slurm.lead_seconds",
    "requeue": REQUEUE,
    "no-requeue": REQUEUE,
    "dependency": "set cluster.slurm.requeue=chain for jobs that follow each other",
    "job-name": "set cluster.slurm.job_name",
    "nodes": NODES,
    "exclude": "set cluster.groups.*.exclude, to which nodes that failed are added",
    "hetjob": "set cluster.placement=het",
    "packjob": "set cluster.placement=het",
    "wrap": "lines before the start are cluster.groups.*.setup",
    "test-only": "miles-submit plan asks Slurm without submitting",
    "wait": "miles-submit run --wait follows the run to its end",
    "parsable": "miles reads the job's id itself",
}
SRUN = {
    "het-group": "set cluster.placement and the groups",
    "pack-group": "set cluster.placement and the groups",
    "nodes": NODES,
    "relative": NODES,
    "nodelist": "set cluster.groups.*.nodelist",
    "exclude": "set cluster.groups.*.exclude",
    "job-name": "set cluster.slurm.job_name",
    "output": LOG,
    "error": LOG,
    "open-mode": LOG,
    "input": "processes read no input",
    "kill-on-bad-exit": "miles ends the other nodes itself, so that each says how it ended",
    "wait": "miles ends the other nodes itself, so that each says how it ended",
    "multi-prog": TASKS,
    "pty": "miles-submit attach opens a shell beside a run",
    "test-only": "miles-submit plan asks Slurm without submitting",
}
OF_TASKS = re.compile(r"nt.*|tasks.*")  # --ntasks, --ntasks-per-node, --tasks-per-node and their like


def refuse(text: str) -> PydanticCustomError:
    """An error whose line is this text after the key."""
    return PydanticCustomError("refused", "{text}", {"text": text})


def check_variables(given: Mapping[str, str]) -> None:
    """Raises for a name that a shell could take for more than a variable, and for a value that no environment can hold."""
    for name, value in given.items():
        if VARIABLE.fullmatch(name) is None:
            raise refuse(f"{name!r} is no name of an environment variable; write letters, digits and _, the first no digit")
        if "\0" in value:
            raise refuse(f"{name}: a value can't hold a NUL; remove it")


def check_options(given: Iterable[str], owned: Mapping[str, str], command: str) -> None:
    """Raises for options that miles sets itself, also where they are abbreviated as Slurm's commands allow, and for what is no option's name."""
    for name in given:
        if OPTION.fullmatch(name) is None:
            raise refuse(f"{name!r} is no option of {command}; write its long name without dashes")
        word = name.lower()
        if OF_TASKS.fullmatch(word):
            raise refuse(f"{name}: miles sets it itself: {TASKS}; remove it")
        own = next((each for each in owned if each.startswith(word)), None)
        if own is not None:
            raise refuse(f"{name}: miles sets --{own} itself: {owned[own]}; remove it")


def check_setup(lines: Iterable[str]) -> None:
    """Raises for what no shell reads."""
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise refuse(f"line {number} holds a NUL; remove it")


def check_mounts(mounts: Iterable[str]) -> None:
    """Raises for what pyxis, which is given all mounts in one word, would divide otherwise than it was written."""
    for mount in mounts:
        if MOUNT.fullmatch(mount) is None:
            raise refuse(f"{mount!r} is not FROM:TO or FROM:TO:FLAGS; no path may hold a comma or a colon: give a mount an entry of its own, and a folder with such a name another one, or a link")


def check_name(name: str) -> None:
    """Raises for a run's name that isn't the name of a folder, since runs/NAME is the default of --run-dir."""
    if name in ("", ".", "..") or "/" in name or any(ord(sign) < ord(" ") for sign in name):
        raise refuse(f"{name!r} can't be the name of a folder (runs/NAME is the default of --run-dir); write it without / and line breaks, and choose the place with --run-dir")
