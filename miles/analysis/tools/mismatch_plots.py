"""Plots of a log-prob mismatch: ratios, p_train against p_rollout, where along a response and a run, who at which step, first divergence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from miles.analysis import simulate
from miles.analysis.corrections import SAMPLED
from miles.analysis.measure import HALF
from miles.analysis.slices import POSITIONS, position_label
from miles.analysis.state import State
from miles.analysis.tools.plots import placed
from miles.report.figures import Placed
from miles.report.plots import bars, heat_map
from miles.report.scales import number, power
from miles.report.svg import WIDTH, Series

Runs = Sequence[tuple[str, Mapping[str, Any]]]  # label and result() of each run that a plot shows
COLOURS = ("c1", "c2")
GROUP = 8  # bins of the histogram in a bar: half an octave
SMALLEST, LARGEST = (127 - 23) * 16, (127 + 5) * 16  # bins of 2^-23 and 2^5 nats
CENTRE = 3  # bars as wide as the one of what is smaller
RANGES = ("rollout_probability", "entropy")  # slices whose values are ranges side by side: their lower ends say enough
MOST_ROWS = 32  # of a heat map


def ratios(state: State, marks: Sequence[tuple[float, str]], name: str = "ratios", label: str = "") -> Placed:
    """How often which d; marks: (ratio, label)."""
    sides = [[int(state.histogram[half + first : half + first + GROUP].sum()) for first in range(SMALLEST, LARGEST, GROUP)] for half in (HALF, 0)]
    count = len(sides[0])
    small = int(state.histogram[:SMALLEST].sum() + state.histogram[HALF : HALF + SMALLEST].sum())
    edges = [-CENTRE / 2 - place for place in range(count, -1, -1)] + [CENTRE / 2 + place for place in range(count + 1)]
    heights = [*sides[0][::-1], small, *sides[1]]
    bounds = [2.0 ** (-23 + place / 2) for place in range(count + 1)]
    above = [f"d {number(low)} to {number(high)}" for low, high in itertools.pairwise(bounds)]
    words = [*(said.replace("d ", "d −").replace(" to ", " to −") for said in above[::-1]), f"|d| below {number(bounds[0])}", *above]

    def place(d: float) -> float:
        return math.copysign(CENTRE / 2 + max(2 * (math.log2(abs(d)) + 23), 0.0), d) if d else 0.0

    ticks = [(place(sign * 10.0**decade), f"{'−' if sign < 0 else ''}{power(decade)}") for decade in (-5, -3, -1) for sign in (-1, 1)]
    shown = [(place(math.log(ratio)), said) for ratio, said in marks]
    title = "Ratio of train to rollout probability" + (f", {label}" if label else "")
    svg = bars(name, title, "d, the log of the ratio, nats; logarithmic on either side of 0", "tokens", edges, heights, ticks=[*ticks, (0.0, "0")], marks=shown, words=words, log=True)
    return Placed(name, title, "Tokens by d, two bars an octave. Dashed: bounds of a truncated weight.", svg)


def probabilities(state: State, name: str = "probabilities", label: str = "") -> Placed | None:
    """Train against rollout probability; None where no token was looked at."""
    table = simulate.density(state)
    filled = np.flatnonzero(table.sum(0) + table.sum(1))
    if not len(filled):
        return None
    most = min(int(filled[-1]) + 2, len(table))
    crop = table[:most, :most][::-1, ::-1]
    names = [number(math.exp(-(bin + 0.5) / 4), 1) for bin in range(most)][::-1]
    title = "Train against rollout probability" + (f", {label}" if label else "")
    svg = heat_map(name, title, "rollout probability", "train probability", names, names, [[int(each) or None for each in row] for row in crop.T], "tokens", log=True, diagonal=True)
    return Placed(name, title, f"One token in {SAMPLED}, in squares of a quarter of a nat; the stronger the colour, the more, by the logarithm. Without mismatch all lie on the diagonal.", svg)


def by_slice(runs: Runs, slice_: str, title: str, caption: str, metric: str = "abs_diff", unit: str = "mean |d|, nats") -> list[Placed]:
    """A metric over the values of a slice, in their order; nothing where no run recorded it."""
    there = [(label, found["slices"].get(slice_)) for label, found in runs]
    names = list(dict.fromkeys(str(row["value"]) for _, rows in there for row in rows or ()))
    if slice_ == "position":  # runs may have different ones
        names = [name for name in map(position_label, range(POSITIONS)) if name in names]
    if len(names) < 2:
        return []
    series = []
    for colour, (label, rows) in zip(COLOURS, there, strict=False):
        known = {str(row["value"]): row[metric] for row in rows or ()}
        at = [place for place, name in enumerate(names) if name in known]
        series.append(Series(label or metric, at, [known[names[place]] for place in at], colour))
    shown = [name.partition("-")[0] for name in names] if slice_ in RANGES else names
    return [placed(f"by-{slice_.replace('_', '-')}", title, unit, series, caption, slice_, names=shown, log=True)]


def by_step(runs: Runs) -> list[Placed]:
    """k3 and mean |d| over steps."""
    found = []
    for metric, unit, title in (("kl_k3", "k3", "k3 by step"), ("abs_diff", "mean |d|, nats", "Mean |d| by step")):
        rows = [(label, sorted(each["slices"].get("step") or [], key=lambda row: int(row["value"]))) for label, each in runs]
        series = [
            Series(label or metric, [int(row["value"]) for row in some], [row[metric] for row in some], colour, smooth=True) for colour, (label, some) in zip(COLOURS, rows, strict=False)
        ]
        if max(len(some) for _, some in rows) > 1:
            found.append(placed(f"step-{metric.replace('_', '-')}", title, unit, series, "Over the tokens of each step that count.", log=True))
    return found


def divergence(runs: Runs) -> list[Placed]:
    """Where sequences first exceed a threshold; of several runs the one of 1e-3."""
    names = [position_label(place) for place in range(POSITIONS)]
    lines: list[tuple[str, Mapping[str, Any]]] = []
    for label, found in runs:
        for row in found["first_divergence"]:
            if len(runs) == 1 or row["threshold"] == 1e-3:
                lines.append((label or f"|d| above {number(row['threshold'])}", row))
    last = max((names.index(name) for _, row in lines for name in row["positions"]), default=-1)
    if last < 0:
        return []
    shown = [*names[: last + 1], "never"]
    colours = ("c1", "c3", "c5", "c2") if len(runs) == 1 else COLOURS
    series = []
    for colour, (label, row) in zip(colours, lines, strict=False):
        values = [float(row["positions"].get(name, 0)) for name in shown[:-1]] + [float(row["never"])]
        total = sum(values) or 1.0
        series.append(Series(label, list(range(len(shown))), [value / total for value in values], colour))
    what = "|d| first exceeds the threshold" if len(runs) == 1 else "|d| first exceeds 0.001"
    return [placed("divergence", "First divergence", "share of sequences", series, f"Sequences by the position where {what}.", "position", names=shown, bounds=(0.0, None))]


def who_and_when(found: Mapping[str, Any]) -> list[Placed]:
    """Heat maps of mean |d|: train rank by step, engine by step."""
    pictures = []
    for kind, title in (("train_rank", "Train ranks by step"), ("engine", "Engines by step")):
        rows = found["places"][kind]
        steps = sorted({row["step"] for row in rows})
        who = list(dict.fromkeys(row[kind] for row in sorted(rows, key=lambda row: (isinstance(row[kind], str), row[kind]))))
        if len(who) < 2 or not steps:
            continue
        sums = np.zeros((len(who), len(steps), 2))
        for row in rows:
            sums[who.index(row[kind]), steps.index(row["step"])] += (row["tokens"] * row["abs_diff"], row["tokens"])
        whole = sums.sum(1)
        chosen = sorted(np.argsort(-whole[:, 0] / np.maximum(whole[:, 1], 1), kind="stable")[:MOST_ROWS].tolist())
        values = [[sums[i, j, 0] / sums[i, j, 1] if sums[i, j, 1] else None for j in range(sums.shape[1])] for i in chosen]
        columns = [str(step) for step in steps]
        name, names = f"heat-{kind.replace('_', '-')}", [str(who[i]) for i in chosen]
        svg = "".join(
            heat_map(f"{name}-{size}", title, "step", kind.replace("_", " "), columns, names, values, "nats", width=width) for size, width in (("wide", 2 * WIDTH), ("narrow", WIDTH))
        )
        more = f" The {len(chosen)} of {len(who)} that are furthest off." if len(chosen) < len(who) else ""
        longest = max(row["last_step"] - row["step"] for row in rows)
        steps_each = f" Each column is a stretch of up to {longest + 1} steps." if longest else ""
        pictures.append(Placed(name, title, f"Mean |d|; the stronger the colour, the greater. A row that stands out is a bad weight sync, a column a step at which something changed.{more}{steps_each}", svg, wide=True))
    return pictures
