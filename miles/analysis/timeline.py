"""Phases of every process out of its events: how long each took, when nothing ran, and the whole as a trace that Chrome and Perfetto read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from miles.config.exits import UserError
from miles.data.store.events import PassedOver, facts_of, read_events
from miles.data.store.files import check_target, seal_bytes, writing
from miles.data.store.run_dir import RunDir

SCHEMA = "miles.timeline/1"
WHOLE = frozenset({"step", "idle"})  # spans that hold others, or nothing
WAITING = frozenset({"wait"})  # the trainer's, for a batch: no work
OURS = b'{"otherData": {"made_by": "miles"'
Interval = tuple[float, float]


@dataclass
class Lane:
    """A process of an attempt: its phases by start [unix s]."""

    component: str
    rank: int
    epoch: int
    spans: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.component} {self.rank}"

    @property
    def work(self) -> list[Interval]:
        """When at least one of its phases ran, waiting aside: disjoint, ascending."""
        return union([(span["start"], span["end"]) for span in self.spans if span["phase"] not in WAITING])


@dataclass
class Attempt:
    """One attempt: its processes, and the time from its first phase's start to its last one's end."""

    epoch: int
    lanes: list[Lane]

    @property
    def extent(self) -> Interval:
        return min(span["start"] for lane in self.lanes for span in lane.spans), max(span["end"] for lane in self.lanes for span in lane.spans)


def read_timeline(path: Path, first: int | None = None, last: int | None = None, passed: PassedOver | None = None) -> list[Attempt]:
    """Attempts with a phase of the steps first to last (inclusive). UserError where there is none. passed counts lines of events that are no phase."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a run directory")
    lanes: dict[tuple[int, str, int], Lane] = {}
    passed = PassedOver() if passed is None else passed
    for event in read_events(RunDir(path), passed):
        step = event["step"]
        if event["phase"] in WHOLE or (first is not None and step < first) or (last is not None and step > last):
            continue
        key = (event["epoch"], event["component"], event["rank"])
        lanes.setdefault(key, Lane(event["component"], event["rank"], event["epoch"])).spans.append(event)
    if not lanes:
        between = "" if first is None and last is None else " of those steps"
        lines = f"; {passed.count} line{'s' if passed.count > 1 else ''} passed over, the first: {passed.first}" if passed.count else ""
        raise UserError(f"{path}: nothing to analyse: events/ holds no phase{between}{lines}")
    ordered = [lanes[key] for key in sorted(lanes, key=lambda key: (key[0], _order(key[1]), key[1], key[2]))]
    return [Attempt(epoch, [lane for lane in ordered if lane.epoch == epoch]) for epoch in sorted({lane.epoch for lane in ordered})]


def timeline(path: Path, attempts: list[Attempt], passed: PassedOver) -> dict[str, Any]:
    """Of what read_timeline gives. Seconds by process and phase, idle time (waiting within), time in which nobody or several worked; of each attempt, and the seconds between attempts."""
    rows = []
    for attempt in attempts:
        start, end = attempt.extent
        whole = end - start
        processes = [_process(lane, whole) for lane in attempt.lanes]
        work = [lane.work for lane in attempt.lanes]
        rows.append({
            "attempt": attempt.epoch, "start": start, "end": end, "seconds": whole, "processes": processes,
            "nobody": whole - length(union([interval for each in work for interval in each])), "overlap": _overlap(work),
        })  # fmt: skip
    between = [after.extent[0] - before.extent[1] for before, after in pairwise(attempts)]
    return {"schema": SCHEMA, "run": str(path), "attempts": rows, "between_attempts": between, "passed_over": asdict(passed)}


def _process(lane: Lane, whole: float) -> dict[str, Any]:
    phases: dict[str, dict[str, Any]] = {}
    for span in lane.spans:
        found = phases.setdefault(span["phase"], {"count": 0, "seconds": 0.0, "longest": 0.0, "longest_step": span["step"], "errors": 0})
        seconds = span["end"] - span["start"]
        if seconds > found["longest"]:
            found["longest"], found["longest_step"] = seconds, span["step"]
        found["count"] += 1
        found["seconds"] += seconds
        found["errors"] += "error" in span
    working = length(lane.work)
    waiting = length(union([(span["start"], span["end"]) for span in lane.spans])) - working
    return {"process": lane.name, "phases": phases, "working": working, "waiting": waiting, "idle": whole - working, "idle_share": (whole - working) / whole if whole else 0.0}


def chrome_trace(attempts: list[Attempt]) -> dict[str, Any]:
    """Trace Event Format (chrome://tracing, ui.perfetto.dev): a process for each attempt's process, times in µs after the first phase."""
    origin = min(attempt.extent[0] for attempt in attempts)
    events: list[dict[str, Any]] = []
    number = 0
    for attempt in attempts:
        for lane in attempt.lanes:
            number += 1
            title = f"{lane.name}, attempt {lane.epoch}" if len(attempts) > 1 else lane.name
            events.append({"ph": "M", "name": "process_name", "pid": number, "tid": 0, "args": {"name": title}})
            events.append({"ph": "M", "name": "process_sort_index", "pid": number, "tid": 0, "args": {"sort_index": number}})
            for track, spans in enumerate(tracks(lane.spans)):
                events += [
                    {
                        "ph": "X", "name": span["phase"], "cat": lane.component, "pid": number, "tid": track, "ts": round(1e6 * (span["start"] - origin), 3),
                        "dur": round(1e6 * (span["end"] - span["start"]), 3), "args": {"step": span["step"], **facts_of(span)},
                    }
                    for span in spans
                ]  # fmt: skip
    return {"otherData": {"made_by": "miles", "first_phase_unix_seconds": origin}, "displayTimeUnit": "ms", "traceEvents": events}


def write_trace(attempts: list[Attempt], target: Path) -> None:
    """Write chrome_trace() whole or not at all. An older trace of ours is replaced; UserError for any other file, which is not touched."""
    refuse_other_traces(target)
    with writing(target):
        seal_bytes(target, json.dumps(chrome_trace(attempts)).encode())


def refuse_other_traces(target: Path) -> None:
    """UserError where no trace can be written."""
    check_target(target, "a JSON file")
    if target.exists():
        with target.open("rb") as old:
            if old.read(len(OURS)) != OURS:
                raise UserError(f"{target}: is there already, and is no trace that miles made; give another name")


def tracks(spans: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Phases of a process shared out so that none of a track overlaps another: a viewer nests what overlaps, as if one were the other's part."""
    found: list[list[dict[str, Any]]] = []
    for span in sorted(spans, key=lambda span: span["start"]):
        free = next((track for track in found if track[-1]["end"] <= span["start"]), None)
        if free is None:
            found.append([span])
        else:
            free.append(span)
    return found


def union(intervals: list[Interval]) -> list[Interval]:
    """The same time as disjoint intervals, ascending."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def length(intervals: list[Interval]) -> float:
    """Seconds of disjoint intervals."""
    return sum(end - start for start, end in intervals)


def _overlap(work: list[list[Interval]]) -> float:
    """Seconds in which at least two processes worked."""
    marks = sorted([(start, 1) for each in work for start, _ in each] + [(end, -1) for each in work for _, end in each])
    running, since, found = 0, 0.0, 0.0
    for at, change in marks:
        if running > 1:
            found += at - since
        running, since = running + change, at
    return found


def _order(component: str) -> int:
    """Who drives first."""
    known = ("trainer", "service", "worker", "engine")
    return known.index(component) if component in known else len(known)
