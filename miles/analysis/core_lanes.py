"""The innermost loop of the totals, 64 tokens at a time: the sums of CORE, counts, the greatest |d| and the histogram, from 9 bytes a token.

A token of the histogram is a load, an addition and a store, of which processors complete one a cycle: all else must fit beside them.
So bins leave the vectors by way of a ring in memory, with little arithmetic; looks at whether a token is odd or its d large are one for 64.

Which lane a token falls in and the order of additions are written here, so bits depend on the data alone: 16 terms of a lane are added
in fp32, 16 such sums in fp32 again (of d in fp64), then everything in fp64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

from miles.analysis.bin_lanes import count_bins, store_bins
from miles.analysis.terms import CORE, CORE_BLOCKS, CORE_RING, CORE_TURNS, CORE_WIDE, HUGE, LIMIT, NEAR, WIDE
from miles.analysis.vectors import (
    DOUBLES,
    F32,
    I8,
    I16,
    I32,
    I64,
    IVEC,
    VEC,
    absolute,
    at,
    call,
    const,
    counted,
    exp_terms,
    fma,
    number,
    select,
    short_series,
)

intrinsic: Any = _intrinsic  # its type says nothing of what the decorated function becomes
AHEAD = 1024  # tokens
PARTS = CORE_WIDE // WIDE


@intrinsic
def core_sums(typingctx, mu, o, mask, n, lanes, counts, histogram, ring):
    """-> greatest |d| of n tokens; all but n are addresses.

    mu, o f32 [n], mask u8 [n]; n a multiple of CORE_WIDE. Added to: lanes f64 [len(CORE), 16]; counts i64 [len(COUNTS) + 1], the last one
    turns; histogram u16 [BINS, SUB_BINS], where a token that does not count is a d of 0. ring u16 [CORE_RING, CORE_WIDE]: places in the
    histogram that wait to be counted, for the caller to count at the end; they begin as 0.
    """
    return types.float32(*([types.int64] * 8)), lambda context, builder, signature, args: build(builder, args)


def build(b: ir.IRBuilder, args: list[ir.Value]) -> ir.Value:
    mu_at, o_at, mask_at, n, lanes_at, counts_at, histogram_at, ring_at = args
    zero = const(VEC, 0.0)
    cells = {name: cgutils.alloca_once_value(b, zero) for name in CORE}
    # Those of d cancel, so they go to fp64 first.
    wider = {name: cgutils.alloca_once_value(b, const(DOUBLES, 0.0) if name == "d" else zero) for name in CORE}
    masks, tokens, equal = tallies = [cgutils.alloca_once_value(b, number(0)) for _ in range(3)]
    greatest = cgutils.alloca_once_value(b, const(IVEC, 0))
    turn_at = at(b, counts_at, number(3), I64, 8)
    turn, turns = b.load(turn_at), b.sdiv(n, number(CORE_WIDE))
    counters = b.inttoptr(histogram_at, I16.as_pointer())

    def add_to(cell: ir.Value, value: ir.Value) -> None:
        b.store(b.add(b.load(cell), value), cell)

    with _pieces(b, turns, CORE_TURNS * CORE_BLOCKS) as (first_block, block_turns):
        with _pieces(b, block_turns, CORE_TURNS) as (first, here):
            with cgutils.for_range(b, here) as inner:
                index = b.add(b.add(first_block, first), inner.index)
                slot = b.and_(b.add(turn, index), number(CORE_RING - 1))
                waiting = at(b, ring_at, slot, I16, 2 * CORE_WIDE)
                mask = b.load(at(b, mask_at, index, ir.VectorType(I8, CORE_WIDE), CORE_WIDE), align=1)
                masked = b.icmp_unsigned("!=", mask, ir.Constant(mask.type, [0] * CORE_WIDE))
                add_to(masks, counted(b, masked))
                _fetch(b, index, [(mu_at, 4), (o_at, 4), (mask_at, 1)])
                sizes, same, far = const(IVEC, 0), [], zero
                turn_of = []

                def count(part: int, half: int, waiting: ir.Value = waiting) -> None:
                    first = part * WIDE + half * WIDE // 2
                    count_bins(b, waiting, counters, range(first, first + WIDE // 2))

                for part in range(PARTS):
                    count(part, 0)
                    it = _Part(b, mu_at, o_at, index, part, masked)
                    turn_of.append(it)
                    sizes = call(b, f"llvm.umax.v{WIDE}i32", IVEC, sizes, b.bitcast(it.size, IVEC))
                    far = b.select(it.masked, fma(b, it.mu, it.mu, far), far)
                    same.append(it.same)
                # Nearly always every d is small and no log-prob huge: where none of mu is, by 1, none of o so near to it is; NaN fails the comparisons.
                near = b.and_(
                    b.icmp_unsigned("<=", sizes, b.bitcast(const(VEC, NEAR), IVEC)), b.fcmp_ordered("<=", far, const(VEC, (HUGE - 1) ** 2))
                )
                rough = b.icmp_unsigned("!=", b.bitcast(near, I16), ir.Constant(I16, -1))
                add_to(tokens, counted(b, masked))
                with b.if_else(rough, likely=False) as (then, otherwise):
                    with then:
                        slow = []
                        for part, it in enumerate(turn_of):
                            count(part, 1)
                            kept, held, c = it.careful()
                            add_to(tokens, b.sub(counted(b, kept), counted(b, it.masked)))
                            add_to(equal, counted(b, b.and_(it.same, kept)))
                            _add(b, cells, held, b.fmul(held, held), *exp_terms(b, c))
                            size = b.bitcast(absolute(b, held), IVEC)
                            b.store(call(b, f"llvm.umax.v{WIDE}i32", IVEC, b.load(greatest), size), greatest)
                            slow.append(held)
                        slow_end = b.block
                    with otherwise:
                        whole = same
                        while len(whole) > 1:
                            whole = [_joined(b, *whole[i : i + 2]) for i in range(0, len(whole), 2)]
                        add_to(equal, counted(b, whole[0]))
                        for part, it in enumerate(turn_of):
                            count(part, 1)
                            _add(b, cells, it.d, *short_series(b, it.d))
                        b.store(call(b, f"llvm.umax.v{WIDE}i32", IVEC, b.load(greatest), sizes), greatest)
                        fast_end = b.block
                held = []
                for it, other in zip(turn_of, slow, strict=True):
                    d = b.phi(VEC)
                    d.add_incoming(it.d, fast_end)
                    d.add_incoming(other, slow_end)
                    held.append(d)
                for pair in range(0, PARTS, 2):
                    store_bins(b, held[pair : pair + 2], b.gep(waiting, [number(pair * WIDE)]))
            for name, cell in cells.items():
                here = b.load(cell)
                b.store(b.fadd(b.load(wider[name]), b.fpext(here, DOUBLES) if name == "d" else here), wider[name])
                b.store(zero, cell)
        for row, name in enumerate(CORE):
            spot = at(b, lanes_at, number(row * WIDE), DOUBLES, 8)
            found = b.load(wider[name])
            b.store(b.fadd(b.load(spot, align=8), found if found.type == DOUBLES else b.fpext(found, DOUBLES)), spot, align=8)
            b.store(const(found.type, 0.0), wider[name])
    for k, cell in enumerate(tallies):
        add_to(at(b, counts_at, number(k), I64, 8), b.load(cell))
    b.store(b.add(turn, turns), turn_at)
    return b.bitcast(call(b, f"llvm.vector.reduce.umax.v{WIDE}i32", I32, b.load(greatest)), F32)


class _Part:
    """16 of the tokens: d, 0 where the mask is off, and which have the same bits in both."""

    def __init__(self, b: ir.IRBuilder, mu_at: ir.Value, o_at: ir.Value, index: ir.Value, part: int, masked: ir.Value) -> None:
        place = b.add(b.mul(index, number(CORE_WIDE)), number(part * WIDE))
        self._b = b
        self.mu, self.o = (b.load(at(b, address, place, VEC, 4), align=4) for address in (mu_at, o_at))
        self.masked = b.shuffle_vector(masked, masked, ir.Constant(IVEC, list(range(part * WIDE, (part + 1) * WIDE))))
        self.same = b.and_(self.masked, b.icmp_unsigned("==", b.bitcast(self.mu, IVEC), b.bitcast(self.o, IVEC)))
        self.d = b.select(self.masked, b.fsub(self.o, self.mu), const(VEC, 0.0))
        self.size = absolute(b, self.d)

    def careful(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Which count, d where they do and 0 elsewhere, and that held to ±LIMIT."""
        b, huge = self._b, const(VEC, HUGE)
        finite = b.and_(b.fcmp_ordered("<=", absolute(b, self.mu), huge), b.fcmp_ordered("<=", absolute(b, self.o), huge))
        kept = b.and_(self.masked, finite)
        held = b.select(kept, self.d, const(VEC, 0.0))
        return kept, held, select(b, "<", select(b, ">", held, const(VEC, -LIMIT)), const(VEC, LIMIT))


def _add(b: ir.IRBuilder, cells: dict[str, ir.Value], d: ir.Value, square: ir.Value, t: ir.Value, k3: ir.Value) -> None:
    for name, factors in {"d": (d,), "abs": (absolute(b, d),), "d2": (square,), "k3": (k3,), "t": (t,), "t2": (t, t)}.items():
        old = b.load(cells[name])
        b.store(fma(b, factors[0], factors[1], old) if len(factors) > 1 else b.fadd(old, factors[0]), cells[name])


def _fetch(b: ir.IRBuilder, index: ir.Value, arrays: list[tuple[ir.Value, int]]) -> None:
    """Begin to fetch into the second cache what is read AHEAD tokens from now: the processor itself stops at the end of each page of memory."""
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    place = b.add(b.mul(index, number(CORE_WIDE)), number(AHEAD))
    for address, size in arrays:
        for line in range(0, size * CORE_WIDE, 64):
            spot = b.inttoptr(b.add(b.add(address, b.mul(place, number(size))), number(line)), I8.as_pointer())
            b.call(function, [spot, *(ir.Constant(I32, value) for value in (0, 2, 1))])


def _joined(b: ir.IRBuilder, one: ir.Value, other: ir.Value) -> ir.Value:
    lanes = list(range(2 * one.type.count))
    return b.shuffle_vector(one, other, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


@contextmanager
def _pieces(b: ir.IRBuilder, turns: ir.Value, size: int) -> Iterator[tuple[ir.Value, ir.Value]]:
    """A loop over pieces of `size` turns, the last one shorter: the first turn of each, and how many."""
    whole = number(size)
    with cgutils.for_range(b, b.sdiv(b.add(turns, number(size - 1)), whole)) as loop:
        first = b.mul(loop.index, whole)
        left = b.sub(turns, first)
        yield first, b.select(b.icmp_signed("<", left, whole), left, whole)
