"""tools/analyze/timeline.py: a picture of every process's phases, and where the time went."""

from __future__ import annotations

from typing import Any

from miles.analysis.timeline import Attempt
from miles.analysis.tools.findings import Findings
from miles.config.stdout import printable
from miles.data.store.events import facts_of
from miles.report.figures import Placed
from miles.report.gantt import Bar, gantt, phase_colour
from miles.report.plain_page import Section, Table
from miles.report.scales import number
from miles.report.summary import duration
from miles.report.svg import WIDTH
from miles.report.tiles import Tile


def findings(found: dict[str, Any], attempts: list[Attempt]) -> Findings:
    """Of what miles.analysis.timeline gives, and the phases it was computed from."""
    rows = found["attempts"]
    whole = sum(row["seconds"] for row in rows)
    sections = [section for row, attempt in zip(rows, attempts, strict=True) for section in _attempt(row, attempt, len(rows) > 1)]
    if found["between_attempts"]:
        pauses = [[after["attempt"], pause] for after, pause in zip(rows[1:], found["between_attempts"], strict=True)]
        sections.append(Section("Between attempts", [Table(["before attempt", "seconds without a phase"], pauses)]))
    if (passed := found["passed_over"])["count"]:
        sections.append(Section("Passed over", [f"{passed['count']} line{'s' if passed['count'] > 1 else ''} of events/ passed over, torn by a kill or no phase; the first: {printable(passed['first'])}"]))
    count = len({process["process"] for row in rows for process in row["processes"]})
    facts = f"{len(rows)} attempt{'s' if len(rows) > 1 else ''}, {duration(whole)} in phases of {count} process{'es' if count > 1 else ''}"
    return Findings("timeline", found["run"], facts, sections, found, _tiles(rows, whole))


def _attempt(row: dict[str, Any], attempt: Attempt, several: bool) -> list[Section]:
    start = attempt.extent[0]
    lanes: list[tuple[str, list[Bar]]] = []
    for lane in attempt.lanes:
        bars = [(span["start"] - start, span["end"] - start, span["phase"], _words(span)) for span in lane.spans]
        lanes.append((lane.name, bars))
    present = sorted({span["phase"] for lane in attempt.lanes for span in lane.spans})
    svg = "".join(gantt(f"lanes-{row['attempt']}-{name}", "Timeline", lanes, width) for name, width in (("wide", 2 * WIDTH), ("narrow", WIDTH)))
    legend = [(phase_colour(phase), phase) for phase in present]
    caption = f"{duration(row['seconds'])}. Half height: waiting. Hover over a phase for its step and seconds."
    picture = Placed(f"lanes-{row['attempt']}", "Phases of every process", caption, svg, legend, wide=True)
    processes = [[each["process"], each["working"], each["waiting"], each["idle"], each["idle_share"]] for each in row["processes"]]
    phases = [
        [each["process"], phase, one["count"], one["seconds"], one["seconds"] / one["count"], one["longest"], one["longest_step"], one["errors"]]
        for each in row["processes"]
        for phase, one in sorted(each["phases"].items(), key=lambda pair: -pair[1]["seconds"])
    ]
    name = f", attempt {row['attempt']}" if several else ""
    note = f"Of {duration(row['seconds'])}, nobody worked for {number(row['nobody'])} s; at least two processes worked at once for {number(row['overlap'])} s."
    return [
        Section(f"Processes{name}", [picture, Table(["process", "working, s", "waiting, s", "idle, s", "idle share"], processes, f"processes{name}"), note]),
        Section(f"Phases{name}", [Table(["process", "phase", "times", "seconds", "mean", "longest", "at step", "failed"], phases, f"phases{name}")]),
    ]


def _words(span: dict[str, Any]) -> str:
    rest = [f"{printable(key)} {number(value) if isinstance(value, int | float) else printable(value or '–')}" for key, value in facts_of(span).items()]
    return ", ".join([f"{span['phase']}, step {span['step']}: {number(span['end'] - span['start'])} s", *rest])


def _tiles(rows: list[dict[str, Any]], whole: float) -> list[Tile]:
    processes = [each for row in rows for each in row["processes"]]
    total = sum(each["working"] + each["idle"] for each in processes)
    idlest = max(processes, key=lambda each: each["idle_share"])
    nobody, overlap = (sum(row[name] for row in rows) for name in ("nobody", "overlap"))
    return [
        Tile("Idle", f"{100 * sum(each['idle'] for each in processes) / total:.1f} %" if total else "–", f"of all processes' time, waiting included; most: {idlest['process']}, {100 * idlest['idle_share']:.0f} %"),
        Tile("Nobody working", duration(nobody), f"{100 * nobody / whole:.1f} % of the time" if whole else ""),
        Tile("Several at once", duration(overlap), f"{100 * overlap / whole:.1f} % of the time" if whole else ""),
    ]
