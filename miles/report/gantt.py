"""Phases of processes over time as inline SVG: a row a process, one strip of them an attempt."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from miles.report.figures import OTHER, PHASE_COLOURS
from miles.report.scales import linear, number
from miles.report.summary import duration

ROW, GAP, LEFT, RIGHT, BOTTOM = 22, 6, 110, 14, 40
FINEST = 1.5  # pixels: a phase that is narrower is drawn with its neighbours
Bar = tuple[float, float, str, str]  # start and end [s], phase, words of the tooltip


def phase_colour(phase: str) -> str:
    """CSS variable of a phase, the same in every picture."""
    return {"start": "c9", "update_weights": "c5", "prompts": "c9", "compose": "c4"}.get(phase) or PHASE_COLOURS.get(phase, OTHER)


def gantt(name: str, title: str, rows: Sequence[tuple[str, Sequence[Bar]]], width: int) -> str:
    """rows: (label, bars by start). Seconds along the axis."""
    end = max((bar[1] for _, bars in rows for bar in bars), default=1.0)
    x = linear([0.0, end], LEFT, width - RIGHT, (0.0, end or 1.0))
    height = len(rows) * (ROW + GAP) + BOTTOM
    foot = height - BOTTOM
    parts = [f'<path class="grid" d="M{at:.1f} 0V{foot}"/><text class="tick" x="{at:.1f}" y="{foot + 16}" text-anchor="middle">{escape(label)}</text>' for at, label in x.ticks]
    parts.append(f'<text class="label" x="{(LEFT + width - RIGHT) / 2:.0f}" y="{height - 5}" text-anchor="middle">seconds</text>')
    for index, (label, bars) in enumerate(rows):
        top = index * (ROW + GAP) + GAP / 2
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{top + ROW / 2 + 4:.1f}" text-anchor="end">{escape(label)}</text><path class="grid" d="M{LEFT} {top + ROW:.1f}H{width - RIGHT}"/>')
        for start, stop, phase, words in coarse(bars, FINEST * (end or 1.0) / (width - RIGHT - LEFT)):
            thick = ROW / 2 if phase == "wait" else ROW
            opacity = ' fill-opacity="0.35"' if phase == "wait" else ""
            parts.append(
                f'<rect x="{x(start):.2f}" y="{top + ROW - thick:.1f}" width="{max(x(stop) - x(start), 0.5):.2f}" height="{thick:.1f}" fill="var(--{phase_colour(phase)})"{opacity}><title>{escape(words)}</title></rect>'
            )
    described = f"{len(rows)} processes over {duration(end)}"
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="{name}-t {name}-d" preserveAspectRatio="xMidYMid meet">'
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(described)}</desc>{"".join(parts)}</svg>'
    )


def coarse(bars: Sequence[Bar], finest: float) -> list[Bar]:
    """Bars as long as `finest` [s] and longer as they are; of the others, columns of that width that show the phase which took most of each.

    So a long run is a picture of bounded size.
    """
    found = [bar for bar in bars if bar[1] - bar[0] >= finest]
    columns: dict[int, dict[str, list[float]]] = {}
    for start, end, phase, _ in bars:
        if end - start < finest:
            counted = columns.setdefault(int(start / finest), {}).setdefault(phase, [0, 0.0])
            counted[0] += 1
            counted[1] += end - start
    for column, phases in columns.items():
        most = max(phases, key=lambda phase: phases[phase][1])
        words = ", ".join(f"{count:.0f} × {phase} {number(seconds)} s" for phase, (count, seconds) in phases.items())
        found.append((column * finest, (column + 1) * finest, most, words))
    return sorted(found)
