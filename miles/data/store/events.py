"""events/<component>.<rank>.<epoch>.jsonl: phases with start, end and what, for the timeline."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from miles.data.store.epoch import Fence
from miles.data.store.metrics import append_line, read_lines
from miles.data.store.run_dir import RunDir

NAME = re.compile(r"(.+)\.(\d+)\.(\d+)\.jsonl")


class Events:
    """Writes one process's phases, as long as its attempt is the newest."""

    def __init__(self, run_dir: RunDir, component: str, rank: int, epoch: int) -> None:
        self.path = run_dir.event_file(component, rank, epoch)
        self.fence = Fence(run_dir, epoch)

    def append(self, phase: str, step: int, start: float, end: float, **what: Any) -> None:
        """Write one phase that is over; start and end in unix seconds. Raises Fenced when a newer attempt exists."""
        self.fence.check()
        append_line(self.path, {"phase": phase, "step": step, "start": start, "end": end, **what})

    @contextmanager
    def phase(self, phase: str, step: int, **what: Any) -> Iterator[dict[str, Any]]:
        """append() when the phase ends; with "error" when it raised.

        The dict that it yields takes more facts while the phase runs (tokens, bytes).
        """
        facts: dict[str, Any] = dict(what)
        start = time.time()
        try:
            yield facts
        except BaseException as error:
            facts["error"] = type(error).__name__
            raise
        finally:
            self.append(phase, step, start, time.time(), **facts)


def read_events(run_dir: RunDir) -> list[dict[str, Any]]:
    """All phases of all processes, by start; component, rank and epoch are taken from the file names. Other files are passed over."""
    found = []
    for path in sorted(run_dir.events.glob("*.jsonl")):
        named = name_parts(path)
        if named is not None:
            component, rank, epoch = named
            found += [{"component": component, "rank": rank, "epoch": epoch, **event} for event in read_lines(path) if isinstance(event.get("start"), int | float)]
    return sorted(found, key=lambda event: event["start"])


def name_parts(path: Path) -> tuple[str, int, int] | None:
    """component, rank, epoch of an events file's name; None for another name."""
    named = NAME.fullmatch(path.name)
    return None if named is None else (named[1], int(named[2]), int(named[3]))
