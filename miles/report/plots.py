"""More plots as inline SVG: bars over bins or names with marked bounds, and heat maps. Same look and same size as those over steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from miles.report.scales import Linear, finite, linear, log_with_zero, number
from miles.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, axes, document

MOST_LABELS = 9  # along an axis
FAINTEST = 0.08  # opacity of the least value of a heat map that is not nothing


def bars(
    name: str,
    title: str,
    x_label: str,
    unit: str,
    edges: Sequence[float],
    heights: Sequence[float],
    *,
    ticks: Sequence[tuple[float, str]],
    marks: Sequence[tuple[float, str]] = (),
    words: Sequence[str] = (),
    log: bool = False,
    colour: str = "c1",
) -> str:
    """Bars between edges[i] and edges[i + 1] (in data, ascending; any unit, such as a logarithm), with ticks and marked bounds at (place, label).

    words[i]: the tooltip of a bar, before its height. log: heights by decades; what is 0 has no bar. Marks beyond the edges are left out.
    """
    assert len(edges) == len(heights) + 1, "an edge more than bars"
    x = Linear(LEFT, WIDTH - RIGHT, low=edges[0], high=edges[-1])
    x.ticks = [(x(place), label) for place, label in ticks if edges[0] <= place <= edges[-1]]
    top = max([*finite(heights), 1e-300])
    y = log_with_zero([value for value in heights if value > 0], HEIGHT - BOTTOM, TOP) if log else linear(heights, HEIGHT - BOTTOM, TOP, (0.0, 1.06 * top))
    parts = [axes(x, y, x_label, unit)]
    for i, height in enumerate(heights):
        if height > 0:
            at, left, right = y(height), x(edges[i]), x(edges[i + 1])
            at = min(at, HEIGHT - BOTTOM - 1.5)  # a single one can be seen
            said = f"{words[i] if words else f'{number(edges[i])} to {number(edges[i + 1])}'}: {number(height, 4)} {unit}"
            parts.append(f'<rect x="{left:.1f}" y="{at:.1f}" width="{max(right - left - 0.6, 0.6):.1f}" height="{HEIGHT - BOTTOM - at:.1f}" fill="var(--{colour})"><title>{escape(said)}</title></rect>')
    for place, label in marks:
        if edges[0] <= place <= edges[-1]:
            end = x(place) > WIDTH - RIGHT - 60
            parts.append(f'<path class="mark" d="M{x(place):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
            parts.append(f'<text class="tick" x="{x(place) + (-4 if end else 4):.1f}" y="{TOP + 10}" text-anchor="{"end" if end else "start"}">{escape(label)}</text>')
    return document(name, title, f"{len(heights)} bars, the highest {number(top)} {unit}", "".join(parts))


def heat_map(
    name: str,
    title: str,
    x_label: str,
    y_label: str,
    columns: Sequence[str],
    rows: Sequence[str],
    values: Sequence[Sequence[float | None]],
    unit: str,
    *,
    log: bool = False,
    diagonal: bool = False,
    width: int = WIDTH,
) -> str:
    """values[row][column], the first row at the bottom; None and 0 stay empty. The greater, the darker; log: by its logarithm. diagonal: a line through equal places."""
    known = [value for row in values for value in row if value]
    low, high = min(known, default=0.0), max(known, default=1.0)
    x = Linear(LEFT, width - RIGHT, low=0, high=max(len(columns), 1))
    y = Linear(HEIGHT - BOTTOM, TOP, low=0, high=max(len(rows), 1))
    x.ticks, y.ticks = ([(scale(i + 0.5), _short(names[i])) for i in _some(names, most)] for scale, names, most in ((x, columns, MOST_LABELS * width // WIDTH), (y, rows, MOST_LABELS)))
    parts = [axes(x, y, x_label, y_label, width)]
    tall = y(0) - y(1)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value:
                share = 1.0 if high <= low else math.log(value / low) / math.log(high / low) if log else value / high
                said = f"{x_label} {columns[j]}, {y_label} {rows[i]}: {number(value, 4)} {unit}"
                opacity = FAINTEST + (1 - FAINTEST) * share
                parts.append(
                    f'<rect x="{x(j):.1f}" y="{y(i + 1):.1f}" width="{x(1) - x(0):.2f}" height="{tall:.2f}" fill="var(--c2)" fill-opacity="{opacity:.2f}"><title>{escape(said)}</title></rect>'
                )
    if diagonal:
        parts.append(f'<path class="mark" d="M{x(0):.1f} {y(0):.1f}L{x(len(columns)):.1f} {y(len(rows)):.1f}"/>')
    return document(name, title, f"{len(rows)} by {len(columns)} places, from {number(low)} to {number(high)} {unit}", "".join(parts), width)


def _some(names: Sequence[str], most: int) -> range:
    """Places of the names that are written beside an axis; an empty name takes part and shows nothing."""
    return range(0, len(names), max(1, math.ceil(len(names) / most)))


def _short(name: str, most: int = 7) -> str:
    return name if len(name) <= most else f"…{name[-most + 1 :]}"
