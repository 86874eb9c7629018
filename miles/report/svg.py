"""Plots as inline SVG text: lines with bands over steps, and stacked bars. Colours are CSS variables, so that a page can be light or dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from miles.report.scales import Linear, Scale, finite, linear, log_with_zero, number, steps_axis

WIDTH, HEIGHT = 560, 270
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 14, 40
LETTER, NAME_GAP = 6.2, 10.0  # pixels: a letter of a tick's label, and the space between two
MAX_HITS = 240  # places with a tooltip in one plot
SMOOTH_FROM = 40  # points from which on a running mean is drawn over the raw line
SMOOTH_WINDOW = 9  # points of that mean


@dataclass
class Series:
    """One line. low and high, when given, are drawn as a band. colour is the name of a CSS variable."""

    label: str
    steps: list[int]
    values: list[float]
    colour: str = "c1"
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    dashed: bool = False
    smooth: bool = False


@dataclass
class Figure:
    """A plot and the words around it. `svg` is safe markup; the rest is plain text."""

    name: str
    title: str
    caption: str
    svg: str
    legend: list[tuple[str, str]] = field(default_factory=list)  # (CSS variable, label)


def line_plot(
    name: str,
    title: str,
    unit: str,
    series: Sequence[Series],
    *,
    log: bool = False,
    bounds: tuple[float | None, float | None] = (None, None),
    warm_start: tuple[int, int] | None = None,
    steps: Sequence[int] = (),
    points: bool = False,
    x_label: str = "step",
    names: Sequence[str] = (),
) -> str:
    """An SVG of lines over steps, or over names: then the series' steps are places among them.

    unit labels the vertical axis; bounds fixes its ends; log draws decades and a line for exact zeros; warm_start shades steps first..last;
    steps sets the extent of the horizontal axis beyond the data (so that all plots of a page share it).
    """
    every = [value for one in series for value in [*one.values, *one.low, *one.high]]
    x = steps_axis([*steps, *(step for one in series for step in one.steps)], LEFT, WIDTH - RIGHT)
    if names:
        x = Linear(LEFT, WIDTH - RIGHT, low=-0.5, high=len(names) - 0.5)
        room = (WIDTH - LEFT - RIGHT) / (NAME_GAP + LETTER * max(map(len, names)))
        x.ticks = [(x(place), names[place]) for place in range(0, len(names), max(1, math.ceil(len(names) / room)))]
    y: Scale = log_with_zero(every, HEIGHT - BOTTOM, TOP) if log else linear(every, HEIGHT - BOTTOM, TOP, bounds)
    parts = [_shade(x, warm_start), axes(x, y, x_label, unit)]
    parts += [_band(one, x, y) for one in series if one.low]
    parts += [_line(one, x, y, points) for one in series]
    if log and finite(every) and not any(finite(every)):
        parts.append(f'<text class="remark" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{(HEIGHT - BOTTOM + TOP) / 2:.0f}" text-anchor="middle">exactly 0 at every {x_label}</text>')
    called = dict(enumerate(f"{x_label} {name}" for name in names)) if names else {step: f"{x_label} {step}" for one in series for step in one.steps}
    parts.append(_hits(series, x, called))
    return document(name, title, _describe(series, unit, called), "".join(parts))


def stacked_bars(
    name: str, title: str, unit: str, labels: Sequence[str], steps: Sequence[int], stacks: Sequence[Sequence[float]], colours: Sequence[str], width: int = WIDTH
) -> str:
    """An SVG of one bar a step; stacks[i][j] is the height of label j at step i; width in pixels."""
    totals = [sum(stack) for stack in stacks]
    y = linear(totals, HEIGHT - BOTTOM, TOP, (0.0, max([*totals, 1e-9]) * 1.06))
    gap = (width - RIGHT - LEFT) / max(len(steps), 1)
    x = Linear(LEFT, width - RIGHT, low=0, high=max(len(steps), 1))
    every = max(1, math.ceil(len(steps) / (width / 70)))
    x.ticks = [(x(index + 0.5), number(step, 6)) for index, step in enumerate(steps) if index % every == 0]
    parts = [axes(x, y, "step", unit, width)]
    thick = max(gap - max(0.8, gap * 0.18), 0.6)
    for index, (step, stack) in enumerate(zip(steps, stacks, strict=True)):
        bottom, inside = 0.0, []
        for colour, height in zip(colours, stack, strict=True):
            if height > 0:
                top, foot = round(y(bottom + height), 1), round(y(bottom), 1)  # rounded alike, so that no seam shows
                inside.append(f'<rect x="{x(index) + (gap - thick) / 2:.1f}" y="{top}" width="{thick:.1f}" height="{foot - top:.1f}" fill="var(--{colour})"/>')
                bottom += height
        words = [f"step {step}: {number(totals[index])} {unit}", *(f"{label} {number(part)}" for label, part in zip(labels, stack, strict=True) if part > 0)]
        parts.append(f"<g><title>{escape(chr(10).join(words))}</title>{''.join(inside)}</g>")
    mean = [sum(stack[j] for stack in stacks) / max(len(stacks), 1) for j in range(len(labels))]
    described = f"{len(steps)} bars; mean in {unit}: " + ", ".join(f"{label} {number(part)}" for label, part in zip(labels, mean, strict=True))
    return document(name, title, described, "".join(parts), width)


def running_mean(values: Sequence[float], window: int = SMOOTH_WINDOW) -> list[float]:
    """Centred mean over up to `window` finite neighbours; NaN where there are none."""
    half = window // 2
    result = []
    for index in range(len(values)):
        near = finite(values[max(0, index - half) : index + half + 1])
        result.append(sum(near) / len(near) if near else math.nan)
    return result


def document(name: str, title: str, description: str, body: str, width: int = WIDTH) -> str:
    """The SVG of a plot's markup, with words for those who do not see it."""
    return (
        f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-labelledby="{name}-t {name}-d" preserveAspectRatio="xMidYMid meet">'
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(description)}</desc>{body}</svg>'
    )


def axes(x: Scale, y: Scale, x_label: str, y_label: str, width: int = WIDTH) -> str:
    """Both axes with ticks, labels and horizontal lines."""
    bottom, right = HEIGHT - BOTTOM, width - RIGHT
    parts = [f'<path class="grid" d="M{LEFT} {at:.1f}H{right}"/><text class="tick" x="{LEFT - 7}" y="{at + 3.6:.1f}" text-anchor="end">{escape(label)}</text>' for at, label in y.ticks]
    parts += [f'<path class="axis" d="M{at:.1f} {bottom}v4"/><text class="tick" x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(label)}</text>' for at, label in x.ticks]
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>')
    parts.append(f'<text class="label" x="{(LEFT + right) / 2:.0f}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text class="label" transform="translate(12 {(TOP + bottom) / 2:.0f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    return "".join(parts)


def _shade(x: Linear, warm_start: tuple[int, int] | None) -> str:
    if warm_start is None:
        return ""
    left, right = max(x(warm_start[0] - 0.5), LEFT), min(x(warm_start[1] + 0.5), WIDTH - RIGHT)
    width = right - left
    if width < 2:
        return ""
    label = f'<text class="shade-label" x="{left + 5:.1f}" y="{TOP + 11}">warm start</text>' if width > 62 else ""
    return f'<g><title>warm start: steps {warm_start[0]} to {warm_start[1]}</title><rect class="shade" x="{left:.1f}" y="{TOP}" width="{width:.1f}" height="{HEIGHT - BOTTOM - TOP}"/>{label}</g>'


def _path(steps: Sequence[int], values: Sequence[float], x: Scale, y: Callable[[float], float]) -> str:
    """Path data; a gap where a value is not finite."""
    parts, pen_down = [], False
    for step, value in zip(steps, values, strict=True):
        if not math.isfinite(value):
            pen_down = False
            continue
        parts.append(f"{'L' if pen_down else 'M'}{x(step):.1f} {y(value):.1f}")
        pen_down = True
    return "".join(parts)


def _line(one: Series, x: Scale, y: Scale, points: bool) -> str:
    dash = ' stroke-dasharray="5 3"' if one.dashed else ""
    smoothed = one.smooth and len(one.values) >= SMOOTH_FROM
    parts = [f'<path class="line{" raw" if smoothed else ""}" stroke="var(--{one.colour})" d="{_path(one.steps, one.values, x, y)}"{dash}/>']
    if smoothed:
        parts.append(f'<path class="line" stroke="var(--{one.colour})" d="{_path(one.steps, running_mean(one.values), x, y)}"{dash}/>')
    if points or len(finite(one.values)) <= 24:
        radius = 3 if len(one.values) <= 60 else 2
        parts += [f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="{radius}" fill="var(--{one.colour})"/>' for step, value in zip(one.steps, one.values, strict=True) if math.isfinite(value)]
    return "".join(parts)


def _band(one: Series, x: Scale, y: Scale) -> str:
    whole = [(step, low, high) for step, low, high in zip(one.steps, one.low, one.high, strict=True) if math.isfinite(low) and math.isfinite(high)]
    if not whole:
        return ""
    if len(whole) == 1:
        step, low, high = whole[0]
        return f'<path class="whisker" stroke="var(--{one.colour})" d="M{x(step):.1f} {y(low):.1f}V{y(high):.1f}"/>'
    there = "L".join(f"{x(step):.1f} {y(high):.1f}" for step, _, high in whole)
    back = "L".join(f"{x(step):.1f} {y(low):.1f}" for step, low, _ in reversed(whole))
    return f'<path class="band" fill="var(--{one.colour})" d="M{there}L{back}Z"/>'


def _hits(series: Sequence[Series], x: Linear, called: dict[int, str]) -> str:
    """Invisible columns that carry the values as tooltips."""
    said: dict[int, list[str]] = {}
    for one in series:
        for index, (step, value) in enumerate(zip(one.steps, one.values, strict=True)):
            interval = f" ({number(one.low[index])} to {number(one.high[index])})" if one.low else ""
            said.setdefault(step, []).append(f"{one.label}: {number(value, 4)}{interval}")
    steps = sorted(said)
    steps = steps[:: max(1, math.ceil(len(steps) / MAX_HITS))]
    parts = []
    for index, step in enumerate(steps):
        left = (x(steps[index - 1]) + x(step)) / 2 if index else max(x(step) - 12, LEFT)
        right = (x(steps[index + 1]) + x(step)) / 2 if index + 1 < len(steps) else min(x(step) + 12, WIDTH - RIGHT)
        text = escape("\n".join([called[step], *said[step]]))
        parts.append(f'<rect class="hit" x="{left:.1f}" y="{TOP}" width="{max(right - left, 1):.1f}" height="{HEIGHT - TOP - BOTTOM}"><title>{text}</title></rect>')
    return "".join(parts)


def _describe(series: Sequence[Series], unit: str, called: dict[int, str]) -> str:
    """The alternative text: where each line starts and ends."""
    words = []
    for one in series:
        known = [(step, value) for step, value in zip(one.steps, one.values, strict=True) if math.isfinite(value)]
        if known:
            words.append(f"{one.label} from {number(known[0][1])} at {called[known[0][0]]} to {number(known[-1][1])} at {called[known[-1][0]]}")
    return f"{unit}: " + ("; ".join(words) or "no values yet")
