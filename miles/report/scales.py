"""Axes of a plot: from data to pixels, with ticks that people read. Linear, counts of steps, and a log axis that keeps exact zeros."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal

ZERO_BAND = 22.0  # pixels under the lowest decade, where values that are exactly zero are drawn


def number(value: float, digits: int = 3) -> str:
    """A short form for people: 0, 12 300, 1.23e20, 1.2e-07, 0.034. Non-finite values are named."""
    if isinstance(value, int) and abs(value) >= 10**15:  # perhaps more than a float holds
        return f"{Decimal(value):.{max(digits - 1, 0)}e}".replace("+", "").replace("-", "−", 1)
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e15:
        text = f"{value:.{max(digits - 1, 0)}e}".replace("+", "")
    elif size >= 10_000:
        text = f"{value:,.0f}".replace(",", "\u202f")
    elif size < 1e-3:
        text = f"{value:.{max(digits - 2, 0)}e}"
    else:
        text = f"{value:.{digits}g}" if size < 1000 else f"{value:.0f}"
    return text.replace("-", "−", 1) if value < 0 else text


def nice_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers (1, 2, 5 times a power of ten) that lie in low..high."""
    assert high > low, "an axis has an extent"
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


@dataclass
class Scale:
    """Maps a value to a pixel. `ticks` are (value's pixel, label)."""

    pixel_low: float
    pixel_high: float
    ticks: list[tuple[float, str]] = field(default_factory=list)

    def __call__(self, value: float) -> float:
        raise AssertionError("a scale says how it maps")


@dataclass
class Linear(Scale):
    low: float = 0.0
    high: float = 1.0

    def __call__(self, value: float) -> float:
        return self.pixel_low + (value - self.low) / (self.high - self.low) * (self.pixel_high - self.pixel_low)


@dataclass
class LogWithZero(Scale):
    """Decades, and under them one line for exact zeros (drawn only when there are any)."""

    low: float = 1e-9  # log10 bounds are whole decades
    high: float = 1.0
    has_zero: bool = False

    def __call__(self, value: float) -> float:
        if value <= 0:
            return self.pixel_low
        up = -1.0 if self.pixel_high < self.pixel_low else 1.0
        bottom = self.pixel_low + up * (ZERO_BAND if self.has_zero else 0.0)
        share = (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return bottom + min(max(share, 0.0), 1.0) * (self.pixel_high - bottom)


def finite(values: Sequence[float]) -> list[float]:
    """The values that can be drawn."""
    return [value for value in values if math.isfinite(value)]


def linear(values: Sequence[float], pixel_low: float, pixel_high: float, bounds: tuple[float | None, float | None] = (None, None)) -> Linear:
    """A linear axis that holds all finite values, with a little air, or exactly `bounds` where given."""
    drawn = finite(values) or [0.0]
    low, high = min(drawn), max(drawn)
    air = 0.06 * (high - low) if high > low else max(abs(high) * 0.5, 0.5)
    low = low - air if bounds[0] is None else bounds[0]
    high = high + air if bounds[1] is None else bounds[1]
    if high <= low:
        high = low + 1.0
    scale = Linear(pixel_low, pixel_high, low=low, high=high)
    marks = nice_ticks(low, high)
    scale.ticks = [(scale(mark), label) for mark, label in zip(marks, tick_labels(marks), strict=True)]
    return scale


def tick_labels(marks: Sequence[float]) -> list[str]:
    """Labels of evenly spaced marks, all written alike: 0.0005 beside 0.0010, 5×10⁻⁷ beside 10×10⁻⁷."""
    if len(marks) < 2:
        return [number(mark, 4) for mark in marks]
    decade = math.floor(math.log10(abs(marks[1] - marks[0])) + 1e-9)
    if decade >= 0:
        return [number(mark, 6) for mark in marks]
    if decade >= -4:
        return ["0" if mark == 0 else f"{mark:.{-decade}f}".replace("-", "−") for mark in marks]
    return ["0" if mark == 0 else f"{mark / 10.0**decade:.0f}×{power(decade)}".replace("-", "−") for mark in marks]


def steps_axis(steps: Sequence[int], pixel_low: float, pixel_high: float) -> Linear:
    """The horizontal axis: whole steps only; one step alone stands in the middle."""
    low, high = min(steps, default=0), max(steps, default=1)
    if low == high:
        low, high = low - 1, high + 1
    scale = Linear(pixel_low, pixel_high, low=low, high=high)
    scale.ticks = [(scale(mark), number(mark, 6)) for mark in nice_ticks(low, high, 6) if mark == int(mark) and mark >= 0]
    return scale


def log_with_zero(values: Sequence[float], pixel_low: float, pixel_high: float) -> LogWithZero:
    """Whole decades around the positive values; zeros get a line of their own, labelled 0. With zeros alone: that line alone."""
    drawn = finite(values)
    positive = [value for value in drawn if value > 0]
    low = math.floor(math.log10(min(positive))) if positive else -9
    high = math.ceil(math.log10(max(positive))) if positive else -3
    if high <= low:
        high = low + 1
    scale = LogWithZero(pixel_low, pixel_high, low=10.0**low, high=10.0**high, has_zero=len(positive) < len(drawn) or not positive)
    if scale.has_zero:
        scale.ticks.append((scale(0.0), "0"))
    every = max(1, math.ceil((high - low) / 5))
    scale.ticks += [(scale(10.0**decade), power(decade)) for decade in range(low, high + 1, every)]
    return scale


def power(decade: int) -> str:
    """10⁻³"""
    if decade == 0:
        return "1"
    return "10" + str(decade).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
