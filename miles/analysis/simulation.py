"""What the pass has counted for corrections and pictures, mergeable: integers and exact sums."""

from __future__ import annotations

from typing import Any

import numpy as np

from miles.analysis import exact
from miles.analysis.corrections import CLASS_COLUMNS, CLASSES, DENSITY, SEQUENCE_COLUMNS, WEIGHT_BINS
from miles.analysis.labelled import Labelled

PLACE_COLUMNS = ("tokens", "d", "abs")
ARRAYS = ("classes", "weights", "density")


class Simulation:
    """Exact: classes [CLASSES, CLASS_COLUMNS], weights [WEIGHT_BINS, 5], places (kind, (name, first step, last step)) -> [3]. Integers: density [DENSITY, DENSITY]."""

    def __init__(self) -> None:
        self.classes = exact.zeros(CLASSES, CLASS_COLUMNS)
        self.weights = exact.zeros(WEIGHT_BINS, len(SEQUENCE_COLUMNS))
        self.density = np.zeros((DENSITY, DENSITY), np.int64)
        self.places = Labelled(len(PLACE_COLUMNS))

    def merge(self, other: Simulation) -> None:
        """Add that of other chunks."""
        for name in ARRAYS:
            mine = getattr(self, name)
            mine += getattr(other, name)
        self.places.merge(other.places)

    def pack(self) -> list[Any]:
        """For another process."""
        labels = list(self.places.rows)
        return [*(getattr(self, name).tobytes() for name in ARRAYS), labels, self.places.digits[: len(labels)].tobytes()]

    @classmethod
    def unpack(cls, content: Any) -> Simulation:
        """What pack() gave."""
        found = cls()
        *arrays, labels, digits = content
        for name, values in zip(ARRAYS, arrays, strict=True):
            mine = getattr(found, name)
            mine += np.frombuffer(values, np.int64).reshape(mine.shape)
        found.places.fill(labels, digits)
        return found
