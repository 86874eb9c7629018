"""events/<component>.<rank>.<epoch>.jsonl: phases with start, end and what, for the timeline."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from miles.data.store.metrics import append_line, read_lines
from miles.data.store.run_dir import RunDir


class Events:
    """Writes one process's phases."""

    def __init__(self, run_dir: RunDir, component: str, rank: int, epoch: int) -> None:
        self.path = run_dir.event_file(component, rank, epoch)

    @contextmanager
    def phase(self, phase: str, step: int, **what: Any) -> Iterator[dict[str, Any]]:
        """Write {"phase", "step", "start", "end" (unix seconds), ...} when the phase ends; with "error" when it raised.

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
            append_line(self.path, {"phase": phase, "step": step, "start": start, "end": time.time(), **facts})


def read_events(run_dir: RunDir) -> list[dict[str, Any]]:
    """All phases of all processes, by start; component, rank and epoch are taken from the file names."""
    found = []
    for path in sorted(run_dir.events.glob("*.*.*.jsonl")):
        component, rank, epoch = name_parts(path)
        found += [{"component": component, "rank": rank, "epoch": epoch, **event} for event in read_lines(path)]
    return sorted(found, key=lambda event: event["start"])


def name_parts(path: Path) -> tuple[str, int, int]:
    """component, rank, epoch of an events file's name."""
    component, rank, epoch, _ = path.name.rsplit(".", 3)
    return component, int(rank), int(epoch)
