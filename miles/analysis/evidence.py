"""What speaks for each cause of a mismatch: integers and exact sums over sequences, mergeable to the same bits in any order."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from miles.analysis import exact
from miles.analysis.labelled import Labelled
from miles.analysis.sequence_kernels import BITS, PART, PARTS

WINDOWS = 16  # stretches of steps that are held apart, so that a fault of some steps is not diluted by the others
FOLDS = 16  # of sequences, for the errors of slopes
KEPT_OPENINGS = 4096  # sequences whose first tokens are kept, to compare siblings
OPENING = 8  # tokens of each
CLASSES = ("plain", "exploded", "rerouted", "shifted")  # sequences are of one of them
# Sums over sequences of a class.
TOTALS = ("sequences", "tokens", "d2", "missing", "missing_tail", "noise", "r2", "far", "after")
# By fold, over plain sequences.
FOLD = ("tokens", "d2", "xx", "xs", "ss", "xd", "sd", "t", "d2_above", "kept", "far")
# Of all tokens: rounding to one mantissa bit would have 1/12 of it as variance.
ROUNDING = ("tokens", "ulp_rollout", "ulp_train")
# By (window, value) of a factor: sequences with clear tokens, their mean log r²/noise and its square; then sums over tokens.
CELL = ("sequences", "log", "log2", "tokens", "r2", "noise", "xx", "xd", "far_r2")
# Of sequences with tokens routed alike and otherwise: how the mean log differs between them.
PAIR = ("sequences", "log", "log2")
# Plain sequences of one version that were routed alike, by the mean log r²/noise: how much that of their first tokens exceeds that of the others.
LOUDNESS = ("sequences", "fades", "fades2", "r2", "noise")
QUIETEST, LOUDEST, LOUDNESS_BIN = -32.0, 16.0, 0.25
OPENING_FIELDS = np.dtype(
    [("key", "u8"), ("sample", "u8"), ("prompt", "u8"), ("version", "i8"), ("count", "i8"), ("token", "i4", OPENING), ("rollout", "f4", OPENING), ("train", "f4", OPENING)]
)
ARRAYS = ("totals", "folds", "rounding", "parts", "pairs", "loudness", "zeros")


class Evidence:
    """totals [CLASSES, TOTALS], folds [FOLDS, FOLD], rounding [ROUNDING], parts [PARTS, PART] of plain sequences, pairs [PAIR], loudness
    [bins, LOUDNESS], exact; cells by (factor, (window, value)); zeros i64 [2, BITS], how many zeros mantissas end
    with; openings: of the sequences with the least hash of (step, draw)."""

    def __init__(self) -> None:
        self.totals = exact.zeros(len(CLASSES), len(TOTALS))
        self.folds = exact.zeros(FOLDS, len(FOLD))
        self.rounding = exact.zeros(len(ROUNDING))
        self.parts = exact.zeros(len(PARTS), len(PART))
        self.pairs = exact.zeros(len(PAIR))
        self.loudness = exact.zeros(round((LOUDEST - QUIETEST) / LOUDNESS_BIN), len(LOUDNESS))
        self.zeros = np.zeros((2, BITS), np.int64)
        self.cells = Labelled(len(CELL))
        self.openings = np.zeros(0, OPENING_FIELDS)

    def merge(self, other: Evidence) -> None:
        """Add that of other chunks."""
        for name in ARRAYS:
            mine = getattr(self, name)
            mine += getattr(other, name)
        self.cells.merge(other.cells)
        self.add_openings(other.openings)

    def add_openings(self, more: NDArray[Any]) -> None:
        """Keep those with the least keys; whole rows compare, so that what is kept depends on no order."""
        both = np.concatenate([self.openings, more])
        order = np.lexsort((both["prompt"], both["sample"], both["key"]))
        self.openings = both[order[:KEPT_OPENINGS]]

    def pack(self) -> bytes:
        """For another process."""
        arrays = [getattr(self, name).tobytes() for name in ARRAYS]
        labels = list(self.cells.rows)
        return bytes(msgpack.packb([arrays, labels, self.cells.digits[: len(labels)].tobytes(), self.openings.tobytes()]))

    @classmethod
    def unpack(cls, content: bytes) -> Evidence:
        """What pack() gave."""
        made = cls()
        arrays, labels, digits, openings = msgpack.unpackb(content, use_list=False)
        for name, part in zip(ARRAYS, arrays, strict=True):
            mine = getattr(made, name)
            mine += np.frombuffer(part, mine.dtype).reshape(mine.shape)
        made.cells.fill(labels, digits)
        made.openings = np.frombuffer(openings, OPENING_FIELDS)
        return made
