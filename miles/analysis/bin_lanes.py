"""Counting into the log-histogram from vectors: bins leave them by way of memory, where they wait until a load need not wait for the store.

A place is that of a bin's first counter: the upper half of a float32 without the bits that are no part of its bin. Neighbouring tokens count
in different columns, so that equal ones need not wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llvmlite import ir

from miles.analysis.terms import BINS, SUB_BINS, WIDE
from miles.analysis.vectors import I16, I32, I64, const, number

assert BINS * SUB_BINS == 1 << 16, "a place is 16 bits of a float32"


def count_bins(b: ir.IRBuilder, waiting: ir.Value, counters: ir.Value, which: Iterable[int]) -> None:
    """Count some of the places u16 at `waiting` in the counters u16 [BINS, SUB_BINS]; both are pointers."""
    for i in which:
        place = b.zext(b.load(b.gep(waiting, [number(i)]), align=2), I64)
        spot = b.gep(counters, [b.add(place, number(i % SUB_BINS))])
        b.store(b.add(b.load(spot), ir.Constant(I16, 1)), spot)


def store_bins(b: ir.IRBuilder, vectors: Sequence[ir.Value], waiting: ir.Value) -> None:
    """The places of one or two vectors of d, to a pointer to u16."""
    halves, count = ir.VectorType(I16, 2 * WIDE), len(vectors) * WIDE
    odd = ir.Constant(ir.VectorType(I32, count), [2 * i + 1 for i in range(count)])
    upper = b.shuffle_vector(b.bitcast(vectors[0], halves), b.bitcast(vectors[-1], halves), odd)
    b.store(b.and_(upper, const(upper.type, 65536 - SUB_BINS)), b.bitcast(waiting, upper.type.as_pointer()), align=8)
