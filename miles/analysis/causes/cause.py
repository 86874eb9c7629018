"""A cause of a mismatch, and the numbers that the tests for causes look at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles.analysis import exact
from miles.analysis.evidence import CELL, CLASSES, FOLD, FOLDS, PAIR, ROUNDING, TOTALS, Evidence
from miles.analysis.sequence_kernels import PART, PARTS


@dataclass(frozen=True)
class Cause:
    """share: of Σ d² over what was looked at, 0 to 1; evidence: sentences; confirm: an experiment that would show it."""

    name: str
    share: float
    evidence: list[str]
    advice: str
    confirm: str


@dataclass
class Found:
    """A cause with `variance`, the part of Σ d² that it explains."""

    name: str
    variance: float
    evidence: list[str]
    advice: str
    confirm: str


class Case:
    """Evidence as plain numbers, each rounded once."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.classes = {name: dict(zip(TOTALS, row, strict=True)) for name, row in zip(CLASSES, exact.value(evidence.totals).tolist(), strict=True)}
        self.parts = {name: dict(zip(PART, row, strict=True)) for name, row in zip(PARTS, exact.value(evidence.parts).tolist(), strict=True)}
        self.rounding = dict(zip(ROUNDING, exact.value(evidence.rounding).tolist(), strict=True))
        self.pairs = dict(zip(PAIR, exact.value(evidence.pairs).tolist(), strict=True))
        self.total = sum(each["d2"] for each in self.classes.values())
        self.sequences = int(sum(each["sequences"] for each in self.classes.values()))
        self.tokens = int(sum(each["tokens"] for each in self.classes.values()))

    @cached_property
    def slopes(self) -> dict[str, tuple[float, float, float]]:
        """Of temperature and top-p: the slope of d, its standard error (a jackknife over folds), and the Σ d² that it explains."""
        folds = exact.value(self.evidence.folds)
        whole = _solve(folds.sum(0))
        left_out = np.array([_solve(folds.sum(0) - row) for row in folds])
        error = np.sqrt((FOLDS - 1) / FOLDS * ((left_out - left_out.mean(0)) ** 2).sum(0))
        s = dict(zip(FOLD, folds.sum(0).tolist(), strict=True))
        return {name: (float(whole[i]), float(error[i]), float(whole[i]) * s[product]) for i, (name, product) in enumerate((("temperature", "xd"), ("top_p", "sd")))}

    @cached_property
    def folds(self) -> dict[str, float]:
        """Sums over plain sequences."""
        return dict(zip(FOLD, exact.value(self.evidence.folds).sum(0).tolist(), strict=True))

    @cached_property
    def noise_level(self) -> float:
        """Variance of a logit's noise in plain sequences."""
        whole = self.parts["all"]
        return whole["r2"] / max(whole["noise"], 1e-300)

    def mean_of_folds(self, name: str) -> tuple[float, float]:
        """Of a sum over tokens: its mean, and the standard error by folds."""
        folds = exact.value(self.evidence.folds)
        value, count = folds[:, FOLD.index(name)], folds[:, 0]
        if not count.sum():
            return 0.0, 0.0
        mean = value.sum() / count.sum()
        return float(mean), float(np.sqrt(((value - mean * count) ** 2).sum()) / count.sum())

    def cells(self, factor: str) -> tuple[list[Any], NDArray[np.float64]]:
        """Values of a factor, and their sums f64 [windows, values, CELL]."""
        found = self.evidence.cells.values(factor)
        values = sorted({value for _, value in found})
        windows = max((window for window, _ in found), default=-1) + 1
        table = np.zeros((windows, len(values), len(CELL)))
        for (window, value), row in found.items():
            table[window, values.index(value)] = row
        return values, table


def _solve(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    s = dict(zip(FOLD, sums.tolist(), strict=True))
    left = np.array([[s["xx"], s["xs"]], [s["xs"], s["ss"]]])
    trace = np.trace(left)
    return np.linalg.solve(left + 1e-9 * trace * np.eye(2), np.array([s["xd"], s["sd"]])) if trace > 0 else np.zeros(2)
