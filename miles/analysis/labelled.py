"""Exact sums under labels that turn up as data are read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles.analysis import exact


class Labelled:
    """Exact sums [width] under labels (slice, value)."""

    def __init__(self, width: int) -> None:
        self.rows: dict[tuple[str, Any], int] = {}
        self.digits = exact.zeros(0, width)

    def places(self, labels: Iterable[tuple[str, Any]]) -> NDArray[np.int64]:
        """Rows of labels, made where they are new."""
        labels = list(labels)
        found = list(map(self.rows.get, labels))
        if None in found:
            found = [self.rows.setdefault(label, len(self.rows)) for label in labels]
        if len(self.rows) > len(self.digits):
            grown = exact.zeros(max(len(self.rows), 2 * len(self.digits)), self.digits.shape[1])
            grown[: len(self.digits)] = self.digits
            self.digits = grown
        return np.array(found, np.int64)

    def add(self, labels: list[tuple[str, Any]], values: NDArray[np.float64]) -> None:
        """values f64 [len(labels), width] are added, in the order given."""
        if labels:
            places = self.places(labels)  # before the sums are looked at: it may put others in their place
            exact.add_rows(self.digits, places, values)

    def merge(self, other: Labelled) -> None:
        places = self.places(other.rows)
        np.add.at(self.digits, places, other.digits[: len(other.rows)])

    def fill(self, labels: Iterable[tuple[str, Any]], digits: bytes) -> None:
        """Take another's labels and digits, as bytes, in place of one's own."""
        self.rows = {tuple(each): row for row, each in enumerate(labels)}
        self.digits = np.frombuffer(digits, np.int64).reshape(len(self.rows), self.digits.shape[1], exact.DIGITS).copy()

    def values(self, name: str) -> dict[Any, NDArray[np.float64]]:
        """label -> f64 [width] of one slice, by label: numbers by size, then texts."""
        found = {label: self.digits[row] for (each, label), row in self.rows.items() if each == name}
        return {label: exact.value(found[label]) for label in sorted(found, key=lambda label: (isinstance(label, str), label))}
