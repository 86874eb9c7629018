"""events/<component>.<rank>.<epoch>.jsonl: phases with start, end and what, for the timeline."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from miles.data.store.epoch import Fence
from miles.data.store.files import Damaged
from miles.data.store.metrics import append_line, finite, numbered_lines
from miles.data.store.run_dir import RunDir

OWN = frozenset({"component", "rank", "epoch", "phase", "step", "start", "end"})
YEAR_10000 = 253_402_300_800  # Unix seconds
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


@dataclass
class PassedOver:
    """Lines that are no phase: torn by a kill, or not ours. first: file, line and what is wrong with it."""

    count: int = 0
    first: str = ""

    def add(self, path: Path, number: int, why: str) -> None:
        self.count += 1
        self.first = self.first or f"{path}, line {number}: {why}"


def read_events(run_dir: RunDir, passed: PassedOver | None = None) -> list[dict[str, Any]]:
    """All phases of all processes, by start; component, rank and epoch are taken from the file names.

    Other files are passed over, and so are lines that are no phase, which `passed` counts. Damaged where a folder has a file's name.
    """
    passed = PassedOver() if passed is None else passed
    found = []
    for path in sorted(run_dir.events.glob("*.jsonl")):
        named = name_parts(path)
        if named is None:
            continue
        if path.is_dir():
            raise Damaged(f"{path}: a file of phases expected, a folder found; move it away")
        component, rank, epoch = named
        for number, event in numbered_lines(path):
            if event is None:
                passed.add(path, number, "no whole JSON object")
            elif why := _wrong_in(event):
                passed.add(path, number, why)
            else:
                found.append({**event, "component": component, "rank": rank, "epoch": epoch})
    return sorted(found, key=lambda event: event["start"])


def _wrong_in(event: dict[str, Any]) -> str:
    """Why an object is no phase; empty where it is one."""
    phase, step, start, end = (event.get(name) for name in ("phase", "step", "start", "end"))
    if not isinstance(phase, str) or not phase or not phase.isprintable():
        return f"phase: a name expected, {_short(phase)} found"
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 1 << 63:
        return f"step: a whole number expected, {_short(step)} found"
    if not _is_time(start):
        return f"start: Unix seconds expected, {_short(start)} found"
    if not _is_time(end):
        return f"end: Unix seconds expected, {_short(end)} found"
    return "" if end >= start else f"ends {start - end:.3g} s before it starts"


def facts_of(event: dict[str, Any]) -> dict[str, str | int | float | None]:
    """What a phase says of itself besides the step: plain values, those that are no number as None."""
    return {key: finite(value) for key, value in event.items() if key not in OWN and isinstance(value, str | int | float)}


def _is_time(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < YEAR_10000


def _short(value: Any) -> str:
    return f"{value!r:.40}" if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def name_parts(path: Path) -> tuple[str, int, int] | None:
    """component, rank, epoch of an events file's name; None for another name."""
    named = NAME.fullmatch(path.name)
    return None if named is None else (named[1], int(named[2]), int(named[3]))
