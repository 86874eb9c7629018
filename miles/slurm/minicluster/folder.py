"""The folder of a cluster: made for it alone, and removed without touching anything else."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from miles.config.exits import UserError
from miles.slurm.minicluster.processes import Process, look

CLUSTER = "cluster.json"  # marks the folder as ours
PROCESSES = "processes.json"  # {name: [pid, start]}; gone once all have ended
SOCKET = "keeper/socket"  # in a folder that nobody else enters: who reaches it has our rights
LONGEST = 60  # bytes of its path: a socket's has 107, and slurmstepd's lie two folders down
FIT = ". _ - + @ ~"  # beside letters and digits
UNFIT = re.compile(r"[^\w./+@~-]")


class ClusterError(RuntimeError):
    """A daemon or a command of Slurm failed; the text has what it said, over several lines where it is long."""


def create(folder: Path) -> list[Path]:
    """Make the folder; an empty one is taken. Returns the folders above it that were made, the innermost first.

    UserError, with nothing made: one with something in it, that can't be written, or whose path is too long or has characters that Slurm's files can't have.
    """
    folder = folder.absolute()
    if (strange := UNFIT.search(str(folder))) is not None:
        raise UserError(f"{str(folder)!r}: {strange[0]!r} can't stand in the path: the names of Slurm's files have letters, digits and {FIT} alone; choose another folder")
    if len(os.fsencode(folder)) > LONGEST:
        raise UserError(f"{folder}: {len(os.fsencode(folder))} bytes are too long for the sockets in it; choose a path of at most {LONGEST}")
    if (folder / CLUSTER).exists():
        raise UserError(f"{folder}: a cluster is there; end it first (miles-submit minicluster down --dir {folder}) or choose another folder")
    above = list(itertools.takewhile(lambda each: not each.exists(), folder.parents))
    new = not folder.exists()
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder}: is not empty; choose a new folder")
        if folder.stat().st_uid != os.getuid():
            raise UserError(f"{folder}: belongs to somebody else; choose another folder")
        folder.chmod(0o755)
        tempfile.TemporaryFile(dir=folder).close()
    except FileExistsError:
        raise UserError(f"{folder}: is a file; choose a folder") from None
    except OSError as error:
        remove_empty([*([folder] if new else []), *above])
        raise UserError(f"{folder}: can't be made or written ({(error.strerror or str(error)).lower()}); choose another folder") from error
    return above


def remove_empty(folders: list[Path]) -> None:
    """Remove folders of this list, the innermost first; one that somebody else has put something into stays, and so do those above it."""
    for each in folders:
        if not each.is_dir():
            continue
        if any(each.iterdir()):
            return
        each.rmdir()


def write(path: Path, value: Any) -> None:
    """Replace a JSON file as a whole."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(json.dumps(value))
    os.replace(new, path)


def recorded(folder: Path) -> dict[str, Process]:
    """{name: process} of the keeper and the daemons that the folder names and that still live."""
    try:
        entries = json.loads((folder / PROCESSES).read_text())
    except FileNotFoundError:
        return {}
    found = {name: (look(pid), started) for name, (pid, started) in entries.items()}
    return {name: process for name, (process, started) in found.items() if process is not None and process.started == started}


def mounts_below(folder: Path) -> list[str]:
    """Where something is mounted at or below a folder."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [Path(line.split()[4].encode().decode("unicode_escape")) for line in lines]  # octal escapes for spaces
    return [str(point) for point in points if point.is_relative_to(folder.resolve())]


def remove(folder: Path) -> None:
    """Remove a cluster's folder. UserError if it is not one, or if something is mounted below it."""
    if not (folder / CLUSTER).exists():
        raise UserError(f"{folder}: is no folder of a private cluster; nothing was removed")
    if mounts := mounts_below(folder):
        raise UserError(f"{folder}: {mounts[0]} is mounted below it; unmount it, nothing was removed")
    shutil.rmtree(folder)
