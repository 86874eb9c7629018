"""Memory of a process and all its descendants, sampled while they run."""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from pathlib import Path

import psutil

INTERVAL = 0.2  # seconds
PATIENCE = 1800.0


def watch(command: list[str], output: Path) -> tuple[int, int, dict[str, int]]:
    """Run a command to its end: (exit code, greatest sum of all processes [bytes], greatest of each role [bytes]).

    Counted is the proportional set size: pages that processes share are divided among them, so that the sum counts each once.
    """
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + PATIENCE
    most, each = 0, Counter[str]()
    while process.poll() is None:
        assert time.monotonic() < deadline, f"the run hangs\n{output.read_text()}"
        now = Counter[str]()
        for one in _family(process.pid):
            try:
                now[_role(one)] += one.memory_full_info().pss
            except psutil.Error:  # it ended in between
                continue
        most = max(most, now.total())
        each |= now
        time.sleep(INTERVAL)
    return process.returncode, most, dict(each)


def _family(pid: int) -> list[psutil.Process]:
    try:
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _role(process: psutil.Process) -> str:
    """trainer, engine, worker, service; launcher and supervisors are "other"."""
    return next((word.removeprefix("miles.run.") for word in process.cmdline() if word.startswith("miles.run.")), "other")
