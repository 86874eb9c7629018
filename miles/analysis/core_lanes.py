"""The innermost loop of the totals, 64 tokens at a time: the sums of CORE, counts, the greatest |d| and the histogram, from 9 bytes a token.

A token of the histogram is a load, an addition and a store, of which processors complete one a cycle: all else must fit beside them.
So bins leave the vectors by way of a ring in memory, with little arithmetic; looks at whether a token is odd or its d large are one for 64.

The processor looks some 64 stores ahead, so counting and arithmetic alternate every two or three tokens, which is written here, too: all of
one and then all of the other cost a quarter more. Where every d of a turn is small, what is wanted follows from the sums of powers of d
(core_pass.py).

Which lane a token falls in and the order of additions are written here, so bits depend on the data alone: 64 sums of 4 terms of a
lane are added in fp32 (of d in fp64), then everything in fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

from miles.analysis.bin_lanes import Counting, store_bins
from miles.analysis.terms import CORE, CORE_RING, CORE_TURNS, CORE_WIDE, HUGE, LIMIT, NEAR, WIDE
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
    pinned,
    select,
)

intrinsic: Any = _intrinsic  # its type says nothing of what the decorated function becomes
PARTS = CORE_WIDE // WIDE
# Tokens counted before the two steps of each part of a turn that load it, and before the four that add it to the sums; the rest is counted at the end.
BETWEEN_LOADS, BETWEEN_SUMS = 3, (2, 3, 2, 2)
# Sums of |d| and of the powers of d over turns in which every d is small; those of other turns are of CORE itself.
NEAR_ROWS = ("p1", "abs", "p2", "p3", "p4", "p5", "p6", "p7")


@intrinsic
def core_sums(typingctx, mu, o, mask, n, lanes, counts, histogram, ring):
    """-> greatest |d| of n tokens; all but n are addresses.

    mu, o f32 [n], mask u8 [n]; n a multiple of CORE_WIDE. Added to: lanes f64 [len(CORE) + len(NEAR_ROWS), 16]; counts i64 [len(COUNTS) + 1], the last
    one turns; histogram u16 [BINS / 2, SUB_BINS, 2], where a token that does not count is a d of 0. ring u16 [CORE_RING,
    CORE_WIDE]: places in the histogram that wait to be counted, for the caller to count at the end; they begin as 0.
    """
    return types.float32(*([types.int64] * 8)), lambda context, builder, signature, args: _Loop(builder, args).build()


class _Loop:
    """The code of core_sums(); cells are what it holds in registers."""

    def __init__(self, b: ir.IRBuilder, args: list[ir.Value]) -> None:
        self._b = b
        self._mu, self._o, self._mask, self._n, self._lanes, self._counts, self._histogram, self._ring = args
        # Sums of d itself cancel, so they go to fp64 turn by turn.
        self._cells = {name: cgutils.alloca_once_value(b, const(DOUBLES if name == "p1" else VEC, 0.0)) for name in NEAR_ROWS}
        self._tallies = [cgutils.alloca_once_value(b, number(0)) for _ in range(3)]
        self._greatest = cgutils.alloca_once_value(b, const(IVEC, 0))
        self._turn_at = at(b, self._counts, number(3), I64, 8)
        self._turn = b.load(self._turn_at)

    def build(self) -> ir.Value:
        b = self._b
        turns, whole = b.sdiv(self._n, number(CORE_WIDE)), number(CORE_TURNS)
        with cgutils.for_range(b, b.sdiv(b.add(turns, number(CORE_TURNS - 1)), whole)) as outer:
            first = b.mul(outer.index, whole)
            left = b.sub(turns, first)
            with cgutils.for_range(b, b.select(b.icmp_signed("<", left, whole), left, whole)) as inner:
                self._take(b.add(first, inner.index))
            for row, cell in enumerate(self._cells.values(), len(CORE)):
                found = b.load(cell)
                self._add_lanes(row, found)
                b.store(const(found.type, 0.0), cell)
        for k, cell in enumerate(self._tallies):
            spot = at(b, self._counts, number(k), I64, 8)
            b.store(b.add(b.load(spot), b.load(cell)), spot)
        b.store(b.add(self._turn, turns), self._turn_at)
        return b.bitcast(call(b, f"llvm.vector.reduce.umax.v{WIDE}i32", I32, b.load(self._greatest)), F32)

    def _take(self, index: ir.Value) -> None:
        """One turn."""
        b = self._b
        mask = b.load(at(b, self._mask, index, ir.VectorType(I8, CORE_WIDE), CORE_WIDE), align=1)
        masked = b.icmp_unsigned("!=", mask, ir.Constant(mask.type, [0] * CORE_WIDE))
        waiting = at(b, self._ring, b.and_(b.add(self._turn, index), number(CORE_RING - 1)), I16, 2 * CORE_WIDE)
        counting = Counting(b, [(self._mu, 4), (self._o, 4), (self._mask, 1)], index, b.inttoptr(self._histogram, I16.as_pointer()), waiting)
        for which in (0, 1):
            self._tally(which, counted(b, masked))
        parts, sizes, far = [], const(IVEC, 0), const(VEC, 0.0)
        for part in range(PARTS):
            counting.some(BETWEEN_LOADS)
            it = _Part(b, self._mu, self._o, index, part, masked)
            parts.append(it)
            counting.some(BETWEEN_LOADS)
            sizes = call(b, f"llvm.umax.v{WIDE}i32", IVEC, sizes, b.bitcast(absolute(b, it.d), IVEC))
            far = b.select(it.masked, fma(b, it.mu, it.mu, far), far)
        # Nearly always every d is small and no log-prob huge: where none of mu is, by 1, none of o so near to it is; NaN fails the comparisons.
        near = b.and_(b.icmp_unsigned("<=", sizes, b.bitcast(const(VEC, NEAR), IVEC)), b.fcmp_ordered("<=", far, const(VEC, (HUGE - 1) ** 2)))
        done = counting.done
        with b.if_else(b.icmp_unsigned("==", b.bitcast(near, I16), ir.Constant(I16, -1)), likely=True) as (small, otherwise):
            with small:
                self._tally(2, counted(b, _paired(lambda one, other: _joined(b, one, other), [it.same for it in parts])))
                self._add_powers([it.d for it in parts], counting)
                self._raise(sizes)
                fast, fast_end = [it.d for it in parts], b.block
            with otherwise:
                counting.done = done
                counting.some(PARTS * sum(BETWEEN_SUMS))
                slow, slow_end = self._add_carefully(parts), b.block
        held = []
        for one, other in zip(fast, slow, strict=True):
            d = b.phi(VEC)
            d.add_incoming(one, fast_end)
            d.add_incoming(other, slow_end)
            held.append(d)
        for pair in range(0, PARTS, 2):
            counting.some((CORE_WIDE - counting.done) // (PARTS - pair) * 2)
            store_bins(b, held[pair : pair + 2], b.gep(waiting, [number(pair * WIDE)]))
        assert counting.done == CORE_WIDE, "every token of a turn is counted once"

    def _add_powers(self, parts: list[ir.Value], counting: Counting) -> None:
        """Sums of powers of d, in steps with counting between them. Of those that count most, the terms of a turn are added to each other first."""
        b, sizes, squares = self._b, [], []
        for part in parts:
            d = self._step(part, 0, counting)
            sizes.append(absolute(b, d))
            second = self._step(b.fmul(d, d), 1, counting)
            squares.append(second)
            self._add("p3", second, d)
            fourth = self._step(b.fmul(second, second), 2, counting)
            self._add("p4", fourth)
            self._add("p5", fourth, d)
            sixth = self._step(b.fmul(fourth, second), 3, counting)
            self._add("p6", sixth)
            self._add("p7", sixth, d)
        self._add("p1", b.fpext(_paired(b.fadd, parts), DOUBLES))
        self._add("abs", _paired(b.fadd, sizes))
        self._add("p2", _paired(b.fadd, squares))

    def _step(self, value: ir.Value, step: int, counting: Counting) -> ir.Value:
        counting.some(BETWEEN_SUMS[step])
        return pinned(self._b, value)

    def _add(self, name: str, value: ir.Value, factor: ir.Value | None = None) -> None:
        cell = self._cells[name]
        old = self._b.load(cell)
        self._b.store(fma(self._b, factor, value, old) if factor else self._b.fadd(old, value), cell)

    def _add_carefully(self, parts: list[_Part]) -> list[ir.Value]:
        """The terms of CORE to the lanes at once; returns d of each part, 0 where a token does not count."""
        b, found = self._b, []
        for it in parts:
            kept, same, terms = it.careful()
            self._tally(1, b.sub(counted(b, kept), counted(b, it.masked)))
            self._tally(2, counted(b, same))
            self._raise(b.bitcast(terms["abs"], IVEC))
            found.append(terms)
        for terms in found:  # a large d, of which most cancels, goes to fp64 at once
            self._add_lanes(CORE.index("d"), terms["d"])
        for row, name in enumerate(CORE):
            if name != "d":
                self._add_lanes(row, _paired(b.fadd, [terms[name] for terms in found]))
        return [terms["d"] for terms in found]

    def _add_lanes(self, row: int, values: ir.Value) -> None:
        b, spot = self._b, at(self._b, self._lanes, number(row * WIDE), DOUBLES, 8)
        b.store(b.fadd(b.load(spot, align=8), values if values.type == DOUBLES else b.fpext(values, DOUBLES)), spot, align=8)

    def _tally(self, which: int, more: ir.Value) -> None:
        self._b.store(self._b.add(self._b.load(self._tallies[which]), more), self._tallies[which])

    def _raise(self, sizes: ir.Value) -> None:
        self._b.store(call(self._b, f"llvm.umax.v{WIDE}i32", IVEC, self._b.load(self._greatest), sizes), self._greatest)


class _Part:
    """16 of the tokens: d, 0 where the mask is off, and which have the same bits in both."""

    def __init__(self, b: ir.IRBuilder, mu_at: ir.Value, o_at: ir.Value, index: ir.Value, part: int, masked: ir.Value) -> None:
        self._b, self._place, self._arrays = b, b.add(b.mul(index, number(CORE_WIDE)), number(part * WIDE)), (mu_at, o_at)
        self.mu, o = self._load()
        self.masked = b.shuffle_vector(masked, masked, ir.Constant(IVEC, list(range(part * WIDE, (part + 1) * WIDE))))
        self.same = b.and_(self.masked, b.icmp_unsigned("==", b.bitcast(self.mu, IVEC), b.bitcast(o, IVEC)))
        self.d = b.select(self.masked, b.fsub(o, self.mu), const(VEC, 0.0))

    def _load(self) -> list[ir.Value]:
        return [self._b.load(at(self._b, address, self._place, VEC, 4), align=4) for address in self._arrays]

    def careful(self) -> tuple[ir.Value, ir.Value, dict[str, ir.Value]]:
        """Which count, which of them have the same bits, and the terms of CORE, 0 of a token that does not count."""
        b, huge = self._b, const(VEC, HUGE)
        mu, o = self._load()  # again, so that nearly always no register holds them till here
        finite = b.and_(b.fcmp_ordered("<=", absolute(b, mu), huge), b.fcmp_ordered("<=", absolute(b, o), huge))
        kept = b.and_(self.masked, finite)
        d = b.select(kept, self.d, const(VEC, 0.0))
        t, k3 = exp_terms(b, select(b, "<", select(b, ">", d, const(VEC, -LIMIT)), const(VEC, LIMIT)))
        return kept, b.and_(self.same, kept), {"d": d, "abs": absolute(b, d), "d2": b.fmul(d, d), "k3": k3, "t": t, "t2": b.fmul(t, t)}


def _joined(b: ir.IRBuilder, one: ir.Value, other: ir.Value) -> ir.Value:
    lanes = list(range(2 * one.type.count))
    return b.shuffle_vector(one, other, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def _paired(both: Callable[[ir.Value, ir.Value], ir.Value], values: list[ir.Value]) -> ir.Value:
    """All of them in one, by pairs of neighbours."""
    while len(values) > 1:
        values = [both(*values[i : i + 2]) for i in range(0, len(values), 2)]
    return values[0]
