"""The innermost loop of the pass with slices, as explicit vectors of 16 tokens: every sum, the histogram, and the terms of each token as a row.

Strict IEEE: which lane a token falls in and the order of additions are written here, so bits depend on the data alone, not on how
LLVM vectorises or on the width of the machine's vectors.

Differences and exponentials are fp32, as in training; 16 terms of a lane are added in fp32, then everything in fp64. With mu the
rollout's and o the trainer's log-prob, d = o - mu, c = d held to ±20, t = e^c - 1: k3 = t - c has its own polynomial where the
difference would cancel. Sums of the ratio 1 + t follow from those of t, so a token that does not count adds an exact 0 everywhere.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

from miles.analysis.bin_lanes import count_bins, store_bins
from miles.analysis.terms import COUNTS, HUGE, LIMIT, MOMENTS, NEAR, RING, SUMS, TURNS, VALUES, WIDE
from miles.analysis.vectors import (
    BYTES,
    DOUBLES,
    F32,
    I16,
    I32,
    I64,
    IVEC,
    SHORTS,
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
NAMES = (*SUMS, *MOMENTS)


@intrinsic
def row_sums(typingctx, mu, o, mask, n, lanes, counts, histogram, ring, terms, probable):
    """-> greatest |d| of n tokens; all but n are addresses.

    mu, o f32 [n], mask u8 [n]; n a multiple of 16, at most TERM_ROW. Added to: lanes f64 [len(SUMS) + len(MOMENTS), 16]; counts i64
    [len(COUNTS) + 1], the last one turns; histogram u16 [BINS, SUB_BINS], where a token that does not count is a d of 0. ring u16 [RING, 16]:
    places in the histogram that wait to be counted, for the caller to count at the end; they begin as 0. Written: terms f32
    [n, len(VALUES)], zeros for a token that does not count, and probable f32 [n], e^mu.
    """
    return types.float32(*([types.int64] * 10)), lambda context, builder, signature, args: _build(builder, args)


class _Turn:
    """Of 16 tokens: which count, which have the same bits, d, |d|, e^c - 1 and k3, of a token that does not count 0. To the i64 at `lost` is added how many are under the mask and don't count."""

    def __init__(self, builder: ir.IRBuilder, mu: ir.Value, o: ir.Value, masked: ir.Value, lost: ir.Value) -> None:
        b = builder
        zero, huge = const(VEC, 0.0), const(VEC, HUGE)
        d = b.fsub(o, mu)
        size = absolute(b, d)
        same = b.and_(masked, b.icmp_unsigned("==", b.bitcast(mu, IVEC), b.bitcast(o, IVEC)))
        # Nearly always every d is small and no number odd. Where mu is not huge, by 1, neither is an o so near to it; NaN fails the comparison.
        near = b.and_(b.fcmp_ordered("<=", size, const(VEC, NEAR)), b.fcmp_ordered("<=", absolute(b, mu), const(VEC, HUGE - 1)))
        rough = b.icmp_unsigned("!=", b.bitcast(near, I16), ir.Constant(I16, -1))
        with b.if_else(rough, likely=False) as (then, otherwise):
            with then:
                kept = b.and_(masked, b.and_(b.fcmp_ordered("<=", absolute(b, mu), huge), b.fcmp_ordered("<=", absolute(b, o), huge)))
                held = b.select(kept, d, zero)
                c = select(b, "<", select(b, ">", held, const(VEC, -LIMIT)), const(VEC, LIMIT))
                rest = (b.select(kept, mu, zero), absolute(b, held), b.and_(same, kept))
                b.store(b.add(b.load(lost), counted(b, b.xor(masked, kept))), lost)
                slow = (kept, held, c, *exp_terms(b, c), *rest)
                slow_end = b.block
            with otherwise:
                fast = (masked, d, d, *short_series(b, d)[1:], mu, size, same)
                fast_end = b.block
        found = []
        for one, other in zip(slow, fast, strict=True):
            phi = b.phi(one.type)
            phi.add_incoming(one, slow_end)
            phi.add_incoming(other, fast_end)
            found.append(phi)
        self.kept, self.d, self.c, self.t, self.k3, self.mu, self.size, self.same = found


def _store_rows(builder: ir.IRBuilder, columns: list[ir.Value], first: ir.Value) -> None:
    """Eight vectors of 16 tokens as 16 rows of eight, by three rounds of interleaving halves."""
    assert len(columns) == 8, "three rounds"
    vectors = columns
    for _ in range(3):
        half = len(vectors) // 2
        woven = []
        for a, b in zip(vectors[:half], vectors[half:], strict=True):
            for start in (0, WIDE // 2):
                lanes = [which for i in range(start, start + WIDE // 2) for which in (i, WIDE + i)]
                woven.append(builder.shuffle_vector(a, b, ir.Constant(IVEC, lanes)))
        vectors = woven
    # Each round doubles the run of columns that lie together; the order of vectors follows the bits of their index.
    for place, vector in enumerate(vectors):
        spot = builder.gep(first, [ir.Constant(I32, place * WIDE)])
        builder.store(vector, builder.bitcast(spot, VEC.as_pointer()), align=4)


def _build(builder: ir.IRBuilder, args: list[ir.Value]) -> ir.Value:
    mu_at, o_at, mask_at, n, lanes_at, counts_at, histogram_at, ring_at, terms_at, probable_at = args

    def add_to(cell: ir.Value, value: ir.Value) -> None:
        builder.store(builder.add(builder.load(cell), value), cell)

    zero = const(VEC, 0.0)
    cells = {name: cgutils.alloca_once_value(builder, zero) for name in NAMES}
    masks, lost, equal = tallies = [cgutils.alloca_once_value(builder, number(0)) for _ in COUNTS]
    under = cgutils.alloca_once_value(builder, const(BYTES, 0))  # of a block, under the mask
    greatest = cgutils.alloca_once_value(builder, zero)
    place = cgutils.alloca_once_value(builder, ir.Constant(VEC, [ir.Constant(F32, float(i)) for i in range(WIDE)]))
    turns = builder.sdiv(n, number(WIDE))
    turn_at = at(builder, counts_at, number(len(COUNTS)), I64, 8)
    turn = builder.load(turn_at)
    counters = builder.inttoptr(histogram_at, I16.as_pointer())
    blocks = builder.sdiv(builder.add(turns, number(TURNS - 1)), number(TURNS))
    with cgutils.for_range(builder, blocks) as outer:
        done = builder.mul(outer.index, number(TURNS))
        left = builder.sub(turns, done)
        here = builder.select(builder.icmp_signed("<", left, number(TURNS)), left, number(TURNS))
        for cell in cells.values():
            builder.store(zero, cell)
        builder.store(const(BYTES, 0), under)
        with cgutils.for_range(builder, here) as inner:
            index = builder.mul(builder.add(done, inner.index), number(WIDE))
            # The bins of this turn wait in the ring while those of RING turns ago are counted: loads that follow the store at once would wait for it.
            slot = builder.and_(builder.add(turn, builder.add(done, inner.index)), number(RING - 1))
            waiting = at(builder, ring_at, builder.mul(slot, number(WIDE)), I16, 2)
            count_bins(builder, waiting, counters, range(WIDE))
            mask = builder.load(at(builder, mask_at, index, BYTES, 1), align=1)
            masked = builder.icmp_unsigned("!=", mask, const(BYTES, 0))
            few = builder.load(under)
            builder.store(builder.add(few, call(builder, f"llvm.umin.v{WIDE}i8", BYTES, mask, const(BYTES, 1))), under)
            mu, o = (builder.select(masked, builder.load(at(builder, address, index, VEC, 4), align=4), zero) for address in (mu_at, o_at))
            it = _Turn(builder, mu, o, masked, lost)
            add_to(equal, counted(builder, it.same))
            factors = {
                "d": (it.d,), "abs": (it.size,), "d2": (it.d, it.d), "k3": (it.k3,), "t": (it.t,), "t2": (it.t, it.t),
                "td": (it.t, it.c), "mu": (it.mu,), "mu2": (it.mu, it.mu), "mud": (it.mu, it.d),
            }  # fmt: skip
            one, same = (builder.select(flags, const(VEC, 1.0), zero) for flags in (it.kept, it.same))
            x = builder.load(place)
            builder.store(builder.fadd(x, const(VEC, WIDE)), place)
            held = builder.select(it.kept, x, zero)
            factors |= {"place": (held,), "place2": (held, held), "place_abs": (x, it.size)}
            probable = builder.fadd(exp_terms(builder, select(builder, ">", it.mu, const(VEC, -80.0)))[0], const(VEC, 1.0))
            columns = [one, it.d, it.size, builder.fmul(it.d, it.d), it.k3, it.t, builder.fmul(it.t, it.t), same]
            _store_rows(builder, columns, at(builder, terms_at, builder.mul(index, number(len(VALUES))), F32, 4))
            builder.store(probable, at(builder, probable_at, index, VEC, 4), align=4)
            for name, cell in cells.items():
                old, (first, *second) = builder.load(cell), factors[name]
                builder.store(fma(builder, first, second[0], old) if second else builder.fadd(old, first), cell)
            builder.store(select(builder, ">", it.size, builder.load(greatest)), greatest)
            store_bins(builder, [it.d], waiting)
        wide = builder.zext(builder.load(under), SHORTS)
        add_to(masks, builder.zext(call(builder, f"llvm.vector.reduce.add.v{WIDE}i16", I16, wide), I64))
        for row, name in enumerate(NAMES):
            spot = at(builder, lanes_at, number(row * WIDE), DOUBLES, 8)
            builder.store(builder.fadd(builder.load(spot, align=8), builder.fpext(builder.load(cells[name]), DOUBLES)), spot, align=8)
    builder.store(builder.sub(builder.load(masks), builder.load(lost)), lost)
    for index, cell in enumerate(tallies):
        add_to(at(builder, counts_at, number(index), I64, 8), builder.load(cell))
    builder.store(builder.add(turn, turns), turn_at)
    return call(builder, f"llvm.vector.reduce.fmax.v{WIDE}f32", F32, builder.load(greatest))
