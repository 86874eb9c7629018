"""Counting into the log-histogram from vectors: bins leave them by way of memory, where they wait until a load need not wait for the store.

A place is that of a bin's first counter. Neighbouring tokens count in different columns, so that equal ones need not wait for each other; bins
of both signs lie side by side, so that those in use are few cache lines next to each other, of which none displaces another.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from miles.analysis.terms import BINS, CORE_WIDE, SUB_BINS, WIDE
from miles.analysis.vectors import I8, I16, I32, I64, IVEC, at, call, const, fetch, number

AHEAD, LINE = 2048, 64  # tokens; bytes of a cache line
assert BINS * SUB_BINS == 1 << 16, "a place has 16 bits"


def count(b: ir.IRBuilder, counters: ir.Value, place: ir.Value, token: int) -> None:
    """Count a place, i64, of the token-th token of a turn in the counters, a pointer to u16 [BINS / 2, SUB_BINS, 2]."""
    spot = b.gep(counters, [b.add(place, number(2 * (token % SUB_BINS)))])
    b.store(b.add(b.load(spot), ir.Constant(I16, 1)), spot)


def store_bins(b: ir.IRBuilder, vectors: Sequence[ir.Value], waiting: ir.Value) -> None:
    """The places of one or two vectors of d, to a pointer to u16; which of the tokens comes first is not said."""
    count = len(vectors) * WIDE
    lower = [b.bitcast(b.lshr(b.bitcast(vector, IVEC), const(IVEC, 19)), ir.VectorType(I16, 2 * WIDE)) for vector in vectors]
    # Four of either in turn, which x86 does in one step; 32 bits to 16.
    order = [which * 2 * WIDE + 8 * four + 2 * k for four in range(WIDE // 4) for which in range(len(vectors)) for k in range(4)]
    bins = b.shuffle_vector(lower[0], lower[-1], ir.Constant(ir.VectorType(I32, count), order))
    places = call(b, f"llvm.fshl.v{count}i16", bins.type, bins, bins, const(bins.type, 4))
    b.store(places, b.bitcast(waiting, bins.type.as_pointer()), align=8)


def upper_places(b: ir.IRBuilder, d: ir.Value) -> ir.Value:
    """The places of a vector of d in the upper halves of i32, whose lower halves are 0."""
    bits = b.bitcast(d, IVEC)
    return b.or_(b.and_(b.shl(bits, const(IVEC, 1)), const(IVEC, -(2 * SUB_BINS << 16))), b.and_(b.lshr(bits, const(IVEC, 15)), const(IVEC, 1 << 16)))


class Counting:
    """Counting of the CORE_WIDE places of a turn, some at a time between other work; evenly among them what is read AHEAD tokens from now is
    fetched into the second cache, one array after another: the processor itself stops at the end of each page, and drops fetches that crowd.

    arrays: addresses, each with bytes of a token; index: the turn, i64; counters as in count(); waiting: a pointer to the places, u16 [CORE_WIDE].
    """

    def __init__(self, b: ir.IRBuilder, arrays: list[tuple[ir.Value, int]], index: ir.Value, counters: ir.Value, waiting: ir.Value) -> None:
        self._b, self._index, self._counters, self._waiting, self.done = b, index, counters, waiting, 0
        self._lines = [(address, size, line) for address, size in arrays for line in range(size)]
        self._each = CORE_WIDE // len(self._lines)

    def some(self, many: int) -> None:
        """Count the next ones."""
        for place in range(self.done, self.done + many):
            count(self._b, self._counters, self._b.zext(self._b.load(self._b.gep(self._waiting, [number(place)]), align=2), I64), place)
            if place % self._each == self._each - 1:
                self._fetch(*self._lines[place // self._each])
        self.done += many

    def _fetch(self, address: ir.Value, size: int, line: int) -> None:
        b = self._b
        place = b.add(b.mul(self._index, number(CORE_WIDE)), number(AHEAD))
        fetch(b, at(b, b.add(address, b.mul(place, number(size))), number(line), I8, LINE), 2)
