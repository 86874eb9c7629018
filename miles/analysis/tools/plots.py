"""Plots of rows with a step, as every tool draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from miles.report.figures import Placed
from miles.report.svg import Series, line_plot

COLOURS = ("c1", "c2", "c3", "c4", "c5", "c7", "c9", "c6", "c8")


def over_steps(
    name: str, title: str, unit: str, rows: Sequence[Mapping[str, Any]], lines: Mapping[str, str], *, x: str = "step", band: tuple[str, str] | None = None,
    caption: str = "", bounds: tuple[float | None, float | None] = (None, None), log: bool = False,
) -> list[Placed]:  # fmt: skip
    """A plot of some columns of rows (label -> column) over column x; none where nothing is recorded. band: columns of its ends, for the first line."""
    places = [int(row[x]) for row in rows]
    series: list[Series] = []
    for colour, (label, column) in zip(COLOURS, lines.items(), strict=False):
        values = _values(rows, column)
        if any(math.isfinite(value) for value in values):
            low, high = (_values(rows, each) for each in band) if band and not series else ([], [])
            series.append(Series(label, places, values, colour, low, high))
    return [placed(name, title, unit, series, caption, x, bounds=bounds, log=log)] if series else []


def placed(name: str, title: str, unit: str, series: list[Series], caption: str, x: str = "step", **how: Any) -> Placed:
    """Lines as a figure, with a legend where there are several."""
    legend = [(one.colour, one.label) for one in series] if len(series) > 1 else []
    return Placed(name, title, caption, line_plot(name, title, unit, series, x_label=x.replace("_", " "), **how), legend)


def _values(rows: Sequence[Mapping[str, Any]], column: str) -> list[float]:
    return [math.nan if row.get(column) is None else float(row[column]) for row in rows]
