"""What a pass has found so far: integers and exact sums, so that states of any parts of a run merge to the same bits in any order."""

from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from miles.analysis import exact
from miles.analysis.evidence import Evidence
from miles.analysis.experts import Experts
from miles.analysis.labelled import Labelled
from miles.analysis.simulation import Simulation
from miles.analysis.slices import POSITIONS
from miles.analysis.terms import (
    BINS,
    COUNTS,
    NEAR,
    NEAR_UNIT,
    REPLICATES,
    SEQUENCE_HISTOGRAMS,
    SEQUENCE_SUMS,
    SUMS,
    TAUS,
    TOKEN_VALUES,
    VALUES,
    WORST,
)

VOCABULARY = 1 << 20  # token ids beyond it have no slice
WORST_FIELDS = np.dtype([("abs", "f4"), ("step", "i8"), ("shard", "i8"), ("row", "i8"), ("place", "i8")])
ODD = ("rollout_nan", "rollout_infinite", "rollout_absurd", "train_nan", "train_infinite", "train_absurd")  # absurd: finite, and beyond ±HUGE
ADDED = ("sums", "bootstrap", "sequence_sums", "counts", "odd", "histogram", "sequence_histogram", "divergence", "seen")
NEAR_K3 = math.expm1(NEAR) - NEAR  # the greatest of a token with |d| <= NEAR
NEAR_PLACES = np.array([math.frexp(NEAR_UNIT[name])[1] - 1 for name in TOKEN_VALUES])  # units as powers of 2
ROOM = 2.0**62 * NEAR_UNIT["abs"], 2.0**62 * NEAR_UNIT["k3"]  # below what overflows int64, by more than rounding adds
SEEN = ("steps", "sequences", "all_tokens", "not_trained_on", "other_batches", "record_bytes")


class State:
    """Mergeable. Exact sums: sums [len(SUMS)], bootstrap [REPLICATES, 8], sequence_sums, and of slices (name, label) -> [8].

    Integers: counts, odd, histogram [BINS], sequence_histogram [3, BINS], divergence [len(TAUS), 1 + POSITIONS] (0: never), seen
    (steps, sequences, tokens with those that don't count, batches not trained on, batches of another kind, bytes read).
    Besides: the greatest |d|, the worst tokens, sums by token id, what corrections are judged by, the evidence for causes, and sums by expert.
    """

    def __init__(self) -> None:
        self.sums = exact.zeros(len(SUMS))
        self.bootstrap = exact.zeros(REPLICATES, len(VALUES))
        self.sequence_sums = exact.zeros(len(SEQUENCE_SUMS))
        self.counts = np.zeros(len(COUNTS), np.int64)
        self.odd = np.zeros(len(ODD), np.int64)
        self.histogram = np.zeros(BINS, np.int64)
        self.sequence_histogram = np.zeros((len(SEQUENCE_HISTOGRAMS), BINS), np.int64)
        self.divergence = np.zeros((len(TAUS), 1 + POSITIONS), np.int64)
        self.seen = np.zeros(len(SEEN), np.int64)
        self.greatest = 0.0
        self.worst = np.zeros(0, WORST_FIELDS)
        self.slices = Labelled(len(VALUES))
        self.tokens = ByToken()
        self.simulation = Simulation()
        self.evidence = Evidence()
        self.experts = Experts()
        self.recorded: set[str] = set()

    def merge(self, other: State) -> None:
        """Add another state, of other chunks of the same run."""
        for name in ADDED:
            mine = getattr(self, name)
            mine += getattr(other, name)
        self.greatest = max(self.greatest, other.greatest)
        self.add_worst(other.worst)
        self.slices.merge(other.slices)
        self.simulation.merge(other.simulation)
        self.evidence.merge(other.evidence)
        self.experts.merge(other.experts)
        self.tokens.merge(other.tokens.ids, other.tokens.digits[: len(other.tokens.ids)])
        self.recorded |= other.recorded

    def add_worst(self, more: NDArray[Any]) -> None:
        """Keep the greatest |d| of both, ties by where they are."""
        both = np.empty(len(self.worst) + len(more), WORST_FIELDS)
        both[: len(self.worst)], both[len(self.worst) :] = self.worst, more
        order = np.lexsort((both["place"], both["row"], both["shard"], both["step"], -both["abs"]))
        self.worst = both[order[:WORST]]

    def pack(self) -> bytes:
        """For another process."""
        arrays = {name: getattr(self, name).tobytes() for name in ADDED}
        rest = [self.greatest, self.worst.tobytes(), sorted(self.recorded)]
        labels, slices = list(self.slices.rows), self.slices.digits[: len(self.slices.rows)].tobytes()
        tokens = [self.tokens.ids.tobytes(), self.tokens.digits[: len(self.tokens.ids)].tobytes()]
        return bytes(msgpack.packb([arrays, rest, labels, slices, tokens, self.simulation.pack(), self.evidence.pack(), self.experts.pack()]))

    @classmethod
    def unpack(cls, content: bytes) -> State:
        """What pack() gave."""
        state = cls()
        arrays, (greatest, worst, recorded), labels, digits, (ids, sums), simulation, evidence, experts = msgpack.unpackb(content, use_list=False)
        for name in ADDED:
            mine = getattr(state, name)
            mine += np.frombuffer(arrays[name], mine.dtype).reshape(mine.shape)
        state.greatest, state.worst = greatest, np.frombuffer(worst, WORST_FIELDS)
        state.recorded = set(recorded)
        state.slices.fill(labels, digits)
        state.simulation = Simulation.unpack(simulation)
        state.evidence = Evidence.unpack(evidence)
        state.experts = Experts.unpack(experts)
        state.tokens.merge(np.frombuffer(ids, np.int64), np.frombuffer(sums, np.int64).reshape(-1, len(TOKEN_VALUES), exact.DIGITS))
        return state


class ByToken:
    """Exact sums of TOKEN_VALUES by token id: int64 ids, rows in the order met.

    Nearly all tokens are added as integers of NEAR_UNIT to a table by id, which goes to the digits when they are asked for or before it
    could overflow. Digits are carried, so that a sum has the same ones however it was reached.
    """

    def __init__(self) -> None:
        self._row_of = np.full(0, -1, np.int64)
        self._ids = np.zeros(0, np.int64)
        self._digits = exact.zeros(0, len(TOKEN_VALUES))
        self._table = np.zeros((0, len(TOKEN_VALUES)), np.int64)
        self._held = 0.0, 0.0  # at most so much |d| and k3 is in the table
        self._written = False  # whether it was given away since it was folded

    @property
    def ids(self) -> NDArray[np.int64]:
        """Those with a token, each once."""
        self._fold()
        return self._ids

    @property
    def digits(self) -> exact.Digits:
        """Of the ids, in their order, and more rows that are 0: [>= len(ids), 4, DIGITS]."""
        self._fold()
        return self._digits

    def table(self, tokens: int) -> tuple[NDArray[np.int64], float]:
        """The table i64 [VOCABULARY, 4], with room for `tokens` more; and the greatest |d| that may be added to it: NEAR, or less than 0 where so many have no room."""
        if not len(self._table):
            held = np.zeros(VOCABULARY * len(TOKEN_VALUES) + 8, np.int64)  # takes memory where it is written to
            skip = -(held.ctypes.data // 8) % 8
            self._table = held[skip : skip - 8].reshape(VOCABULARY, -1)  # no row lies across two cache lines
        more = NEAR * tokens, NEAR_K3 * tokens
        if any(held + size > room for held, size, room in zip(self._held, more, ROOM, strict=True)):
            self._fold()
        self._written = True
        return self._table, NEAR if all(size <= room for size, room in zip(more, ROOM, strict=True)) else -1.0

    def added(self, size: float, k3: float) -> None:
        """At most so much |d| and k3 was added to the table."""
        self._held = self._held[0] + size, self._held[1] + k3

    def add(self, ids: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        """values f64 [i, 4] of single tokens; an id may come several times."""
        if len(ids):
            rows = self._rows(np.unique(ids))
            exact.add_rows(self._digits, self._row_of[ids], values)
            exact.carry(self._digits, rows)

    def merge(self, ids: NDArray[np.int64], digits: exact.Digits) -> None:
        """Sums [len(ids), 4] of another, each id once."""
        if len(ids):
            rows = self._rows(ids)
            self._digits[rows] += digits
            exact.carry(self._digits, rows)

    def _fold(self) -> None:
        """The table into the digits."""
        if not self._written:
            return
        ids = np.flatnonzero(self._table[:, 0])
        if len(ids):
            rows = self._rows(ids)
            exact.add_integers(self._digits, rows, self._table[ids], NEAR_PLACES)
            exact.carry(self._digits, rows)
            self._table[ids] = 0
        self._held = 0.0, 0.0
        self._written = False

    def _rows(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of ids, each once, made where they are new."""
        if (most := int(ids.max()) + 1) > len(self._row_of):
            self._row_of = np.concatenate([self._row_of, np.full(max(most, 2 * len(self._row_of)) - len(self._row_of), -1, np.int64)])
        new = ids[self._row_of[ids] < 0]
        self._row_of[new] = np.arange(len(self._ids), len(self._ids) + len(new))
        self._ids = np.concatenate([self._ids, new])
        if len(self._ids) > len(self._digits):
            grown = exact.zeros(max(len(self._ids), 2 * len(self._digits)), len(TOKEN_VALUES))
            grown[: len(self._digits)] = self._digits
            self._digits = grown
        return self._row_of[ids]
