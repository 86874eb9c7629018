"""Processes by pid and start time, so that a reused pid is never taken for the process that had it."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

NODE = "SLURMD_NODENAME"  # a variable of tasks: the node's name
NODES = "nodes"  # in the cluster's folder: where its slurmds stay, each in a folder with the node's name
CONF = "conf/slurm.conf"
DAEMONS = ("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmscriptd", "slurmd", "slurmstepd")


@dataclass(frozen=True)
class Process:
    """A process: pid, start in clock ticks since boot, and what it calls itself."""

    pid: int
    started: int
    parent: int
    name: str

    def alive(self) -> bool:
        """Whether this very process runs; one that only waits to be reaped doesn't."""
        now = look(self.pid)
        return now is not None and now.started == self.started

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal, if it still is the one that was seen."""
        try:
            descriptor = os.pidfd_open(self.pid)  # from here on the pid can't be another's
        except ProcessLookupError:
            return
        try:
            if self.alive():
                signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            return
        finally:
            os.close(descriptor)


def look(pid: int) -> Process | None:
    """The process that has this pid now, or None; a zombie counts as none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    name = text[text.index("(") + 1 : text.rindex(")")]
    fields = text[text.rindex(")") + 2 :].split()  # from the third on: state, parent, ...
    return None if fields[0] in "ZX" else Process(pid, int(fields[19]), int(fields[1]), name)


def everybody() -> list[Process]:
    """All processes of the machine."""
    found = (look(int(entry)) for entry in os.listdir("/proc") if entry.isdecimal())
    return [process for process in found if process is not None]


def descendants(roots: set[int], among: list[Process]) -> list[Process]:
    """Those below the roots; the roots themselves are not in it."""
    children: dict[int, list[Process]] = {}
    for process in among:
        children.setdefault(process.parent, []).append(process)
    found: dict[int, Process] = {}
    waiting = list(roots)
    while waiting:
        for child in children.get(waiting.pop(), []):
            if child.pid not in found and child.pid not in roots:
                found[child.pid] = child
                waiting.append(child.pid)
    return list(found.values())


def environment(process: Process) -> dict[str, str]:
    """Variables it was started with; none where we may not look."""
    try:
        text = Path(f"/proc/{process.pid}/environ").read_bytes().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return {}
    return dict(part.split("=", 1) for part in text.split("\0") if "=" in part)


def directory(process: Process) -> Path | None:
    """Its working directory; None where we may not look."""
    try:
        return Path(os.readlink(f"/proc/{process.pid}/cwd"))
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None


def node_of(process: Process, folder: Path) -> str | None:
    """The node of a cluster whose slurmd, slurmstepd or task this is.

    A slurmstepd writes its title over its variables, but stays in the directory of its slurmd; a task goes where its job says, but has its variables.
    """
    if process.name in DAEMONS:
        place = directory(process)
        return place.name if place is not None and place.parent == folder / NODES else None
    variables = environment(process)
    return variables.get(NODE) if variables.get("SLURM_CONF") == str(folder / CONF) else None


def belongs(process: Process, folder: Path) -> bool:
    """Whether it is a daemon, slurmstepd or task of the cluster, and not a shell that talks to it or looks into its folder."""
    if process.name in DAEMONS and (place := directory(process)) is not None and place.is_relative_to(folder):
        return True
    return node_of(process, folder) is not None
