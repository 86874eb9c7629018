"""The end of a cluster, from the process that started it or from any other, and all that belongs to it until then."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

from miles.config.exits import UserError
from miles.slurm.minicluster.folder import CLUSTER, ClusterError, recorded, remove
from miles.slurm.minicluster.processes import Process, belongs, descendants, everybody

END_SECONDS = 40.0
POLL_SECONDS = 0.02


def attach(folder: Path) -> dict[str, Any]:
    """What the cluster of a folder is, as written at its start. UserError when there is none."""
    try:
        found: dict[str, Any] = json.loads((folder / CLUSTER).read_text())
    except FileNotFoundError:
        raise UserError(f"{folder}: no private cluster is there; start one: miles-submit minicluster up --dir {folder}") from None
    return found


def members(folder: Path) -> list[Process]:
    """All processes of a folder's cluster: those below its keeper, and those that are told by their traces though the keeper was killed."""
    roots = recorded(folder)
    everyone = everybody()
    tagged = [process for process in everyone if belongs(process, folder)]
    found = {process.pid: process for process in [*roots.values(), *tagged]}
    return list((found | {process.pid: process for process in descendants(set(found), everyone)}).values())


def end(folder: Path, keep: bool) -> None:
    """Kill a folder's cluster. Its keeper does it; what a killed keeper left behind is killed here."""
    deadline = time.monotonic() + END_SECONDS
    if (keeper := recorded(folder).get("keeper")) is not None:
        keeper.kill(signal.SIGTERM)
        while keeper.alive():
            if time.monotonic() > deadline:
                raise ClusterError(f"{folder}: its keeper (pid {keeper.pid}) does not end; see {folder}/log/keeper.out")
            time.sleep(POLL_SECONDS)
    while found := members(folder):
        if time.monotonic() > deadline:
            raise ClusterError(f"{folder}: {len(found)} processes can't be killed, such as {found[0].pid} ({found[0].name})")
        for process in found:
            process.kill()
        time.sleep(POLL_SECONDS)
    if not keep and (folder / CLUSTER).exists():
        remove(folder)
