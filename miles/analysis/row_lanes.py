"""The innermost loop of the pass with slices: every sum of 16 tokens at a time as explicit vectors, and meanwhile the 16 before, token by token, into the tables.

Vectors fill the arithmetic units, tables the load and store units: their instructions are interleaved here, so that both run side by side.
Terms stay in registers from one turn to the next; where they go waits in memory.

Strict IEEE: which lane a token falls in and the order of additions are written here, so bits depend on the data alone, not on how
LLVM vectorises or on the width of the machine's vectors.

Differences and exponentials are fp32, as in training; 16 terms of a lane are added in fp32, then everything in fp64. With mu the
rollout's and o the trainer's log-prob, d = o - mu, c = d held to ±20, t = e^c - 1: k3 = t - c has its own polynomial where the
difference would cancel. Sums of the ratio 1 + t follow from those of t, so a token that does not count adds an exact 0 everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

from miles.analysis.bin_lanes import upper_places
from miles.analysis.slices import ENTROPIES, MISSES, PROBABILITIES
from miles.analysis.terms import COUNTS, HUGE, LIMIT, MOMENTS, NEAR, ROW, ROW_UNIT, SUMS, TURNS, WIDE
from miles.analysis.token_lanes import ROW_VECTOR, STRIDE, Ahead, Tables, Waiting
from miles.analysis.transposition import COLUMNS, ORDER, fours, half, pair_of
from miles.analysis.vectors import (
    BYTES,
    DOUBLES,
    F32,
    F64,
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
    fetch,
    fma,
    number,
    select,
    short_series,
    splat,
    tree,
)

intrinsic: Any = _intrinsic  # its type says nothing of what the decorated function becomes
AHEAD = 1024  # tokens: what is read is fetched so long before
FETCHED, FETCHED_BYTES = ("mu", "o", "entropy", "token", "advantage"), ("mask", "miss", "flags", "used")
NAMES = (*SUMS, *MOMENTS)
# (PROBABILITIES e^x)^(1/4) between LEAST and 0, interpolated at Chebyshev's nodes; its fourth power is within 7e-7 of itself.
LEAST = -3.1  # below it lies the first slot alone
ROOT = (2.1147425174713135, 0.528685450553894, 0.06608477234840393, 0.00550525588914752, 0.0003423895686864853, 1.6314834283548407e-05, 4.902587988908635e-07)
ARGUMENTS = (
    "mu", "o", "mask", "entropy", "entropy_step", "miss", "miss_step", "token", "flags", "used", "advantage", "n", "ahead",
    "found", "counts", "histogram", "waiting", "hot", "token_table", "token_rows", "nowhere", "rows", "keep", "odd",
)  # fmt: skip


@intrinsic
def row_sums(
    typingctx, mu, o, mask, entropy, entropy_step, miss, miss_step, token, flags, used, advantage, n, ahead,
    found, counts, histogram, waiting, hot, token_table, token_rows, nowhere, rows, keep, odd,
):  # fmt: skip
    """-> greatest |d| of n tokens, a multiple of 16 and at most TERM_ROW; all are addresses but n, ahead, token_rows, keep and the steps.

    mu, o, entropy f32, mask, miss u8, token i32 [n]; a step is 1, or 0 where the array wasn't recorded and has 16 elements for all turns. flags,
    used, advantage: where the caller reads on. Token ids can be read for `ahead` turns from the first one on. Set: found f64
    [len(SUMS) + len(MOMENTS)], sums, with places counted from the first token. Added to: counts i64 [len(COUNTS) + 1], the last one turns;
    and, a turn late, histogram u16 [BINS / 2, SUB_BINS, 2], where a token that does not count is a d of 0, hot f32 [slots, WAIT, 8], and
    token_table i64 [token_rows, 4]. waiting: token_lanes.SIZE bytes, zeros at first, for what comes a turn late.

    odd u8 [n / 16]: 1 for turns that are not added to token_table, since some |d| is large or some id has no row. Of these, and with `keep` of
    all, rows f32 [n, 8] is written: terms in the order of ROW, in units of ROW_UNIT. nowhere: 32 bytes for what goes nowhere.
    """
    return types.float32(*([types.int64] * len(ARGUMENTS))), lambda context, builder, signature, args: _Loop(builder, args).build()


class _Loop:
    def __init__(self, b: ir.IRBuilder, args: list[ir.Value]) -> None:
        self._b, self._given = b, dict(zip(ARGUMENTS, args, strict=True))
        self._cells = {name: cgutils.alloca_once_value(b, const(VEC, 0.0)) for name in NAMES}
        self._wider = {name: cgutils.alloca_once_value(b, const(DOUBLES, 0.0)) for name in NAMES}
        self._fours = [cgutils.alloca_once_value(b, const(VEC, 0.0)) for _ in range(COLUMNS)]
        self._tallies = [cgutils.alloca_once_value(b, number(0)) for _ in COUNTS]
        self._bytes = cgutils.alloca_once(b, ir.ArrayType(I64, len(FETCHED_BYTES)))
        self._greatest = cgutils.alloca_once_value(b, const(IVEC, 0))

    def build(self) -> ir.Value:
        b, given = self._b, self._given
        for cell in self._wider.values():
            b.store(const(DOUBLES, 0.0), cell)
        for cell in self._tallies:
            b.store(number(0), cell)
        b.store(const(IVEC, 0), self._greatest)
        waiting = [at(b, given["waiting"], number(k), VEC, 4 * WIDE) for k in range(COLUMNS)]
        for cell, spot in zip(self._fours, waiting, strict=True):
            b.store(b.load(spot, align=64), cell)
        for k, name in enumerate(FETCHED_BYTES):
            b.store(given[name], b.gep(self._bytes, [number(0), number(k)]))
        turns = b.sdiv(given["n"], number(WIDE))
        turn_at = at(b, given["counts"], number(len(COUNTS)), I64, 8)
        first = b.load(turn_at)
        blocks = b.sdiv(b.add(turns, number(TURNS - 1)), number(TURNS))
        with cgutils.for_range(b, blocks) as outer:
            done = b.mul(outer.index, number(TURNS))
            left = b.sub(turns, done)
            here = b.select(b.icmp_signed("<", left, number(TURNS)), left, number(TURNS))
            for cell in self._cells.values():
                b.store(const(VEC, 0.0), cell)
            with cgutils.for_range(b, here) as inner:
                index = b.add(done, inner.index)
                self._turn(index, b.add(first, index))
            for name in NAMES:
                b.store(b.fadd(b.load(self._wider[name]), b.fpext(b.load(self._cells[name]), DOUBLES)), self._wider[name])
        for k, name in enumerate(NAMES):
            b.store(tree(b, b.load(self._wider[name])), at(b, given["found"], number(k), F64, 8))
        masks, lost, equal = (b.load(cell) for cell in self._tallies)
        for k, more in enumerate((masks, b.sub(masks, lost), equal)):
            cell = at(b, given["counts"], number(k), I64, 8)
            b.store(b.add(b.load(cell), more), cell)
        b.store(b.add(first, turns), turn_at)
        for cell, spot in zip(self._fours, waiting, strict=True):
            b.store(b.load(cell), spot, align=64)
        return b.bitcast(call(b, f"llvm.vector.reduce.umax.v{WIDE}i32", I32, b.load(self._greatest)), F32)

    def _turn(self, index: ir.Value, turn: ir.Value) -> None:
        b, given = self._b, self._given
        waiting, earlier = (Waiting(b, given["waiting"], which) for which in (turn, b.sub(turn, number(1))))
        tables, ids = Tables(b, earlier, self._fours, given), Ahead(b, given, index)
        vectors, streams = self._vectors(index, waiting), self._streams(index)
        for k in range(WIDE):
            ids.fetch(k)
            tables.add(k)
            next(vectors, None)
            next(streams, None)
        for _ in vectors:
            pass
        for cell, four in zip(self._fours, self._new, strict=True):
            b.store(four, cell)

    def _streams(self, index: ir.Value) -> Iterator[None]:
        """Begin to fetch what will be read: the processor itself stops at the end of each page of memory. Bytes are fetched 64 tokens at a time."""
        b, given = self._b, self._given
        place = b.add(b.mul(index, number(WIDE)), number(AHEAD))
        for name in FETCHED:
            step = given.get(f"{name}_step")
            fetch(b, at(b, given[name], b.mul(place, step) if step else place, I8, 4), 3)
            yield
        which = b.gep(self._bytes, [number(0), b.and_(index, number(len(FETCHED_BYTES) - 1))])
        fetch(b, at(b, b.load(which), place, I8, 1), 3)

    def _add(self, name: str, value: ir.Value, other: ir.Value | None = None) -> None:
        b, cell = self._b, self._cells[name]
        old = b.load(cell)
        b.store(b.fadd(old, value) if other is None else fma(b, value, other, old), cell)

    def _tally(self, which: int, more: ir.Value) -> None:
        self._b.store(self._b.add(self._b.load(self._tallies[which]), more), self._tallies[which])

    def _vectors(self, index: ir.Value, waiting: Waiting) -> Iterator[None]:
        """The vector work of a turn, in steps between which other work fits."""
        b, given, zero = self._b, self._given, const(VEC, 0.0)
        place = b.mul(index, number(WIDE))
        mask = b.load(at(b, given["mask"], place, BYTES, 1), align=1)
        masked = b.icmp_unsigned("!=", mask, const(BYTES, 0))
        mu, o = (b.select(masked, b.load(at(b, given[name], place, VEC, 4), align=4), zero) for name in ("mu", "o"))
        self._tally(0, counted(b, masked))
        yield
        probability = self._probability(mu)
        yield
        entropy = self._entropy(place)
        yield
        ids = b.load(at(b, given["token"], place, IVEC, 4), align=4)
        most = b.trunc(given["token_rows"], I32)
        known = b.icmp_unsigned("<", ids, splat(b, most))
        d = b.fsub(o, mu)
        size = absolute(b, d)
        same = b.and_(masked, b.icmp_unsigned("==", b.bitcast(mu, IVEC), b.bitcast(o, IVEC)))
        # Nearly always every d is small and no number odd. Where mu is not huge, by 1, neither is an o so near to it; NaN fails the comparison.
        near = b.and_(b.fcmp_ordered("<=", size, const(VEC, NEAR)), b.fcmp_ordered("<=", absolute(b, mu), const(VEC, HUGE - 1)))
        small = b.icmp_unsigned("==", b.bitcast(near, I16), ir.Constant(I16, -1))
        plain = b.and_(small, b.icmp_unsigned("==", b.bitcast(known, I16), ir.Constant(I16, -1)))
        waiting.set_ids(ids, plain)
        yield
        with b.if_else(small, likely=True) as (then, otherwise):
            with then:
                square, t, k3 = short_series(b, d)
                fast = (masked, d, d, square, d, t, k3, mu, size, same)
                fast_end = b.block
            with otherwise:
                huge = const(VEC, HUGE)
                kept = b.and_(masked, b.and_(b.fcmp_ordered("<=", absolute(b, mu), huge), b.fcmp_ordered("<=", absolute(b, o), huge)))
                held = b.select(kept, d, zero)
                c = select(b, "<", select(b, ">", held, const(VEC, -LIMIT)), const(VEC, LIMIT))
                self._tally(1, counted(b, b.xor(masked, kept)))
                # A large d, of which most cancels, goes to fp64 at once.
                b.store(b.fadd(b.load(self._wider["d"]), b.fpext(held, DOUBLES)), self._wider["d"])
                slow = (kept, zero, held, b.fmul(held, held), c, *exp_terms(b, c), b.select(kept, mu, zero), absolute(b, held), b.and_(same, kept))
                slow_end = b.block
        found = []
        for one, other in zip(fast, slow, strict=True):
            phi = b.phi(one.type)
            phi.add_incoming(one, fast_end)
            phi.add_incoming(other, slow_end)
            found.append(phi)
        kept, small_d, d, square, c, t, k3, mu, size, same = found
        low = b.or_(probability, b.shl(entropy, const(IVEC, 16)))
        waiting.set_words(low, b.or_(self._miss(place), upper_places(b, d)))
        yield
        self._tally(2, counted(b, same))
        b.store(call(b, f"llvm.umax.v{WIDE}i32", IVEC, b.bitcast(size, IVEC), b.load(self._greatest)), self._greatest)
        yield
        self._add("d", small_d)
        self._add("abs", size)
        self._add("d2", square)
        yield
        self._add("k3", k3)
        self._add("t", t)
        t2 = b.fmul(t, t)
        self._add("t2", t2)
        yield
        self._add("td", t, c)
        self._add("mu", mu)
        self._add("mu2", mu, mu)
        self._add("mud", mu, d)
        yield
        x = b.fadd(splat(b, b.sitofp(place, F32)), ir.Constant(VEC, [ir.Constant(F32, float(i)) for i in range(WIDE)]))
        self._add("place_abs", x, size)
        one, equal = (b.select(flags, const(VEC, 1.0), zero) for flags in (kept, same))
        terms = {"tokens": one, "abs": size, "d": d, "k3": k3, "d2": square, "t": t, "t2": t2, "equal_bits": equal}
        columns = [terms[name] if ROW_UNIT[name] == 1 else b.fmul(terms[name], const(VEC, 1 / ROW_UNIT[name])) for name in ROW]
        first = fours(b, columns[:4])
        yield
        second = fours(b, columns[4:])
        yield
        b.store(b.zext(b.not_(plain), I8), at(b, given["odd"], index, I8, 1))
        with b.if_then(b.or_(b.not_(plain), b.icmp_unsigned("!=", given["keep"], number(0))), likely=False):
            for k, token in enumerate(ORDER):
                pair = pair_of(b, first[k // 4], second[k // 4], k // 2 % 2)
                b.store(half(b, pair, k % 2), at(b, given["rows"], b.add(place, number(token)), ROW_VECTOR, 4 * len(ROW)), align=32)
        self._new = first + second

    def _probability(self, mu: ir.Value) -> ir.Value:
        b = self._b
        x = select(b, ">", mu, const(VEC, LEAST))
        root = const(VEC, ROOT[-1])
        for coefficient in ROOT[-2::-1]:
            root = fma(b, root, x, const(VEC, coefficient))
        half = b.fmul(root, root)
        return self._slots(select(b, "<", b.fmul(half, half), const(VEC, PROBABILITIES - 1)), 0)

    def _entropy(self, place: ir.Value) -> ir.Value:
        b, given = self._b, self._given
        value = b.load(at(b, given["entropy"], b.mul(place, given["entropy_step"]), VEC, 4), align=4)
        held = select(b, ">", select(b, "<", b.fmul(value, const(VEC, 4.0)), const(VEC, ENTROPIES - 2)), const(VEC, 0.0))
        return self._slots(b.select(b.fcmp_unordered("uno", value, value), const(VEC, ENTROPIES - 1), held), PROBABILITIES)

    def _miss(self, place: ir.Value) -> ir.Value:
        b, given = self._b, self._given
        count = b.load(at(b, given["miss"], b.mul(place, given["miss_step"]), BYTES, 1), align=1)
        slot = b.zext(call(b, f"llvm.umin.v{WIDE}i8", BYTES, count, const(BYTES, MISSES - 1)), IVEC)
        return b.mul(b.add(slot, const(IVEC, PROBABILITIES + ENTROPIES)), const(IVEC, STRIDE))

    def _slots(self, which: ir.Value, first: int) -> ir.Value:
        b = self._b
        return b.mul(b.add(b.fptosi(which, IVEC), const(IVEC, first)), const(IVEC, STRIDE))
