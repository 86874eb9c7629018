"""Axes and plots: geometry against arithmetic done by hand."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from miles.report import figures
from miles.report.figures import PHASE_COLOURS
from miles.report.scales import linear, log_with_zero, nice_ticks, number, steps_axis
from miles.report.svg import Series, line_plot, running_mean, stacked_bars


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (0.123456, "0.123"), (12.0, "12"), (1e-7, "1.0e-07"), (12345.6, "12\u202f346"), (-2.5, "−2.5"), (1234.4, "1234"), (math.nan, "–"), (math.inf, "∞"), (-math.inf, "−∞")],
)
def test_numbers_for_people(value: float, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize(("low", "high", "marks"), [(0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (3.0, 52.0, [10, 20, 30, 40, 50]), (-0.03, 0.03, [-0.03, -0.02, -0.01, 0, 0.01, 0.02, 0.03])])
def test_ticks_are_round(low: float, high: float, marks: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(marks)


def test_linear_axis_holds_its_values_and_its_bounds() -> None:
    scale = linear([2.0, math.nan, 4.0], 200.0, 0.0)
    assert 0 < scale(4.0) < scale(2.0) < 200
    assert scale(3.0) == pytest.approx(100.0)
    fixed = linear([0.2, 0.3], 200.0, 0.0, (0.0, 1.0))
    assert fixed(0.25) == pytest.approx(150.0)


@pytest.mark.parametrize("values", [[], [math.nan], [5.0], [0.0, 0.0], [-1e-30], [1e30]])
def test_linear_axis_of_hardly_any_values(values: list[float]) -> None:
    scale = linear(values, 200.0, 0.0)
    assert all(0 <= scale(value) <= 200 for value in values if math.isfinite(value))
    assert scale.high > scale.low


def test_log_axis_sets_exact_zero_apart() -> None:
    scale = log_with_zero([0.0, 1e-6, 1e-2], 200.0, 0.0)
    assert scale(0.0) == 200.0
    assert scale(1e-6) == pytest.approx(178.0), "one band above zero"
    assert scale(1e-2) == pytest.approx(0.0)
    assert scale(1e-4) == pytest.approx(89.0), "the middle of the decades"
    assert [label for _, label in scale.ticks] == ["0", "10⁻⁶", "10⁻⁵", "10⁻⁴", "10⁻³", "10⁻²"]


def test_log_axis_without_zero_has_no_band() -> None:
    scale = log_with_zero([1e-3, 0.5], 200.0, 0.0)
    assert scale(1e-3) == pytest.approx(200.0)
    assert [label for _, label in scale.ticks] == ["10⁻³", "10⁻²", "10⁻¹", "1"]


def test_log_axis_of_zeros_alone() -> None:
    scale = log_with_zero([0.0, 0.0], 200.0, 0.0)
    assert scale(0.0) == 200.0
    assert scale.ticks[0] == (200.0, "0")


def test_steps_are_whole() -> None:
    scale = steps_axis([1, 2, 3], 0.0, 100.0)
    assert [label for _, label in scale.ticks] == ["1", "2", "3"]
    assert steps_axis([7], 0.0, 100.0)(7) == 50.0
    assert steps_axis([], 0.0, 100.0)(0) == 0.0


def test_running_mean() -> None:
    assert running_mean([1.0, 2.0, 6.0, math.nan, 8.0], window=3) == pytest.approx([1.5, 3.0, 4.0, 7.0, 8.0])
    assert math.isnan(running_mean([math.nan], window=3)[0])


def test_a_gap_breaks_the_line() -> None:
    text = line_plot("p", "P", "u", [Series("a", [1, 2, 3, 4], [1.0, math.nan, 3.0, 4.0])])
    path = re.search(r'class="line"[^>]* d="([^"]+)"', text)
    assert path
    assert path.group(1).count("M") == 2
    assert path.group(1).count("L") == 1
    assert "nan" not in text


def test_bars_are_as_high_as_their_parts() -> None:
    text = stacked_bars("b", "B", "seconds", ["x", "y"], [1, 2], [[1.0, 3.0], [2.0, 0.0]], ["c1", "c2"])
    heights = [float(height) for height in re.findall(r'height="([\d.]+)" fill', text)]
    assert len(heights) == 3, "nothing is drawn for nothing"
    assert heights[1] == pytest.approx(3 * heights[0], abs=0.3), "rounded to a tenth of a pixel"
    assert heights[2] == pytest.approx(2 * heights[0], abs=0.3)
    assert "step 1: 4 seconds" in text


def test_labels_are_escaped() -> None:
    text = line_plot("p", "<b>", "u&v", [Series("<i>", [1], [1.0])])
    assert "<b>" not in text
    assert "<i>" not in text
    assert "u&amp;v" in text


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (-0.001, 0.002, ["−0.0010", "−0.0005", "0", "0.0005", "0.0010", "0.0015", "0.0020"]),
        (-2e-9, 4e-9, ["−2×10⁻⁹", "−1×10⁻⁹", "0", "1×10⁻⁹", "2×10⁻⁹", "3×10⁻⁹", "4×10⁻⁹"]),
        (0.0, 1.0, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.0, 12000.0, ["0", "2000", "4000", "6000", "8000", "10\u202f000", "12\u202f000"]),
    ],
)
def test_the_marks_of_an_axis_are_written_alike(low: float, high: float, labels: list[str]) -> None:
    assert [label for _, label in linear([], 0.0, 100.0, (low, high)).ticks] == labels


def test_phases_that_touch_have_different_colours() -> None:
    assert len(set(PHASE_COLOURS.values())) == len(PHASE_COLOURS)
    css = (Path(figures.__file__).parent / "page.css").read_text()
    for theme in (css, css[css.index("prefers-color-scheme") :]):
        colours = {name: [int(value[at : at + 2], 16) for at in (0, 2, 4)] for name, value in reversed(re.findall(r"--(c\d+): #([0-9a-f]{6})", theme))}
        apart = sum(abs(a - b) for a, b in zip(colours[PHASE_COLOURS["train"]], colours[PHASE_COLOURS["save"]], strict=True))
        assert apart > 150
