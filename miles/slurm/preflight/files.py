"""Probes of file systems: what one node writes all see, and what the run reads is there."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from miles.slurm.preflight.verdict import Verdict, broken, not_checked, ok

POLL_SECONDS = 0.1
READ_BYTES = 64 << 10
LOGIN = "login"  # the canary of the node that submitted, beside the folder of the others'


def canary_write(folder: Path, node: str) -> None:
    """Leave a file that the others look for. OSError: this node can't write there."""
    path = folder / f".{node}.part"
    with path.open("w") as file:
        file.write(node)
        file.flush()
        os.fsync(file.fileno())
    path.rename(folder / node)


def canary_seen(folder: Path, nodes: Sequence[str], seconds: float) -> tuple[float, list[str]]:
    """(seconds until the files of all nodes were seen, with the right content; nodes whose file was not seen in time)."""
    began = time.monotonic()
    missing = list(nodes)
    while True:
        missing = [node for node in missing if not _there(folder / node, node)]
        spent = time.monotonic() - began
        if not missing or spent > seconds:
            return spent, missing
        os.listdir(folder)  # some network file systems look again only then
        time.sleep(POLL_SECONDS)


def _there(path: Path, content: str) -> bool:
    try:
        return path.read_text() == content
    except OSError:
        return False


def readable(paths: Sequence[str]) -> Verdict:
    """Whether this node reads the head and the end of every file in or below these paths; `files` is by path [number, bytes]."""
    if not paths:
        return not_checked("the run reads no files of its own")
    found: dict[str, list[int]] = {}
    for text in paths:
        path, number, size = Path(text), 0, 0
        try:
            for file in _files(path):
                size += _read(file)
                number += 1
        except OSError as error:
            return broken(f"{error.filename or path}: {(error.strerror or type(error).__name__).lower()}", files=found)
        found[text] = [number, size]
    number, size = (sum(column) for column in zip(*found.values(), strict=True))
    return ok(f"{number} file{'' if number == 1 else 's'}, {f'{size / 2**30:.1f} GiB' if size >= 2**30 else f'{size / 2**20:.1f} MiB'}", files=found)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    inside = sorted(path.rglob("*"))
    return [each for each in inside if not each.is_dir()]


def _read(path: Path) -> int:
    """Size of a file, whose head and end were read."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.read(READ_BYTES)
        file.seek(max(size - READ_BYTES, 0))
        file.read(READ_BYTES)
    return size
