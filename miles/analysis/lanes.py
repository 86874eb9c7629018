"""The innermost loop of the analysis, as explicit vectors of 16 tokens: one reading of 9 bytes a token gives every sum and the histogram.

Strict IEEE: which lane a token falls in and the order of additions are written here, so bits depend on the data alone, not on how
LLVM vectorises or on the width of the machine's vectors.

Differences and exponentials are fp32, as in training; 16 terms of a lane are added in fp32, then everything in fp64. With mu the
rollout's and o the trainer's log-prob, d = o - mu, c = d held to ±20, t = e^c - 1: k3 = t - c has its own polynomial where the
difference would cancel. Sums of the ratio 1 + t follow from those of t, so a token that does not count adds an exact 0 everywhere.
"""

from __future__ import annotations

import math
import struct
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

from miles.analysis.terms import (
    BINS,
    CORE,
    COUNTS,
    HUGE,
    LIMIT,
    MOMENTS,
    NEAR,
    NEAR_UNIT,
    RING,
    SUB_BINS,
    SUMS,
    TERM_ROW,
    TOKEN_VALUES,
    TURNS,
    VALUES,
    WIDE,
)

intrinsic: Any = _intrinsic  # its type says nothing of what the decorated function becomes

F32, F64, I8, I16, I32, I64 = ir.FloatType(), ir.DoubleType(), *(ir.IntType(bits) for bits in (8, 16, 32, 64))
VEC, IVEC, BYTES, SHORTS, DOUBLES = (ir.VectorType(kind, WIDE) for kind in (F32, I32, I8, I16, F64))
WAIT = 4  # columns of a slot that neighbouring tokens take in turn: an addition need not wait for the one before
STRIDE = WAIT * len(VALUES) * 4 // 8  # of a slot in such a table, in units of 8 bytes
# (e^r - 1 - r) / r^2 for |r| <= NEAR, interpolated at Chebyshev's nodes.
NEAREST = (0.5, 0.16666642420070918, 0.041666636365000086, 0.008348847788288706, 0.0013908278590313836)


def make_sums(terms: bool, every: bool) -> Any:
    """An intrinsic (mu, o, mask, n, lanes, counts, histogram, ring, terms, probable) -> greatest |d| of n tokens; all but n are addresses.

    mu, o f32 [n], mask u8 [n]; n a multiple of 16. Added to: lanes f64 [len(SUMS) + len(MOMENTS), 16], only the rows of CORE unless
    `every`; counts i64 [len(COUNTS) + 1], the last one turns of the ring; histogram u16 [BINS, SUB_BINS], COUNTED turns before it could
    overflow, where a token that does not count is a d of 0. ring u16 [RING, 16]: bins that wait to be counted, for the caller to count at the
    end; they begin as BINS, one past the last. terms: also written are terms f32 [n, len(VALUES)], zeros for a token that does not count,
    and probable f32 [n], e^mu. every: n is at most TERM_ROW.
    """
    names = (*SUMS, *MOMENTS) if every else CORE

    @intrinsic
    def sums(typingctx, mu, o, mask, n, lanes, counts, histogram, ring, terms_at, probable_at):
        def codegen(context, builder, signature, args):
            return _build(builder, args, names, terms)

        return types.float32(*([types.int64] * 10)), codegen

    return sums


def _const(kind: Any, value: float) -> ir.Constant:
    if kind.element == F32:
        value = struct.unpack("f", struct.pack("f", value))[0]  # llvmlite accepts only constants that fit
    return ir.Constant(kind, [ir.Constant(kind.element, value)] * kind.count)


def _call(builder: ir.IRBuilder, name: str, kind: Any, *values: ir.Value) -> ir.Value:
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [value.type for value in values]), name)
    return builder.call(function, values)


def _fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return _call(builder, f"llvm.fma.v{WIDE}f32", VEC, a, b, c)


def _select(builder: ir.IRBuilder, how: str, a: ir.Value, b: ir.Value) -> ir.Value:
    """The lesser (<) or greater (>) of two that are no NaN."""
    return builder.select(builder.fcmp_ordered(how, a, b), a, b)


def _series(builder: ir.IRBuilder, r: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(e^r - 1, e^r - 1 - r) for |r| <= ln2 / 2: r^2 (1/2! + r/3! + ... + r^6/8!), in pairs so that the chain is short."""
    square = builder.fmul(r, r)
    pairs = [_fma(builder, r, _const(VEC, 1 / math.factorial(k + 1)), _const(VEC, 1 / math.factorial(k))) for k in (2, 4, 6)]
    high = _fma(builder, square, _const(VEC, 1 / math.factorial(8)), pairs[2])
    low = _fma(builder, square, pairs[1], pairs[0])
    small = builder.fmul(square, _fma(builder, builder.fmul(square, square), high, low))
    return builder.fadd(r, small), small


def _short_series(builder: ir.IRBuilder, r: ir.Value) -> tuple[ir.Value, ir.Value]:
    """_series for |r| <= SMALL, by the polynomial of degree 4 that is nearest there (within 3e-8 of it)."""
    square = builder.fmul(r, r)
    first, second = (_fma(builder, r, _const(VEC, NEAREST[k + 1]), _const(VEC, NEAREST[k])) for k in (0, 2))
    rest = _fma(builder, square, _const(VEC, NEAREST[4]), second)
    small = builder.fmul(square, _fma(builder, square, rest, first))
    return builder.fadd(r, small), small


def _exp_terms(builder: ir.IRBuilder, c: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(e^c - 1, e^c - 1 - c) in fp32 for -87 < c < 88, each within some 1e-7 of itself; where |c| < ln2 / 2 the bits of _series.

    c = n ln2 + r with |r| <= ln2 / 2; for n = 0, r is c and nothing cancels.
    """
    magic = _const(VEC, 12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, in the low bits
    shifted = _fma(builder, c, _const(VEC, 1.4426950408889634), magic)
    n = builder.fsub(shifted, magic)
    r = _fma(builder, n, _const(VEC, -0.693359375), c)
    r = _fma(builder, n, _const(VEC, 2.12194440e-4), r)
    grown, small = _series(builder, r)
    power = builder.shl(builder.bitcast(shifted, IVEC), _const(IVEC, 23))
    scale = builder.bitcast(builder.add(power, _const(IVEC, 127 << 23)), VEC)  # 2^n
    t = _fma(builder, scale, grown, builder.fsub(scale, _const(VEC, 1.0)))  # for n = 0 grown itself
    near = builder.fcmp_ordered("==", n, _const(VEC, 0.0))
    return t, builder.select(near, small, builder.fsub(t, c))


class _Turn:
    """Of 16 tokens: which count, which have the same bits, d, |d|, e^c - 1 and k3, of a token that does not count 0. To the i64 at `lost` is added how many are under the mask and don't count."""

    def __init__(self, builder: ir.IRBuilder, mu: ir.Value, o: ir.Value, masked: ir.Value, lost: ir.Value) -> None:
        b = builder
        zero, huge = _const(VEC, 0.0), _const(VEC, HUGE)
        d = b.fsub(o, mu)
        size = _size(b, d)
        same = b.and_(masked, b.icmp_unsigned("==", b.bitcast(mu, IVEC), b.bitcast(o, IVEC)))
        # Nearly always every d is small and no number odd. Where mu is not huge, neither is an o so near to it; NaN fails the comparison.
        near = b.and_(b.fcmp_ordered("<=", size, _const(VEC, NEAR)), b.fcmp_ordered("<=", _size(b, mu), huge))
        rough = b.icmp_unsigned("!=", b.bitcast(near, I16), ir.Constant(I16, -1))
        with b.if_else(rough, likely=False) as (then, otherwise):
            with then:
                kept = b.and_(masked, b.and_(b.fcmp_ordered("<=", _size(b, mu), huge), b.fcmp_ordered("<=", _size(b, o), huge)))
                held = b.select(kept, d, zero)
                c = _select(b, "<", _select(b, ">", held, _const(VEC, -LIMIT)), _const(VEC, LIMIT))
                rest = (b.select(kept, mu, zero), _size(b, held), b.and_(same, kept))
                b.store(b.add(b.load(lost), _count(b, b.xor(masked, kept))), lost)
                slow = (kept, held, c, *_exp_terms(b, c), *rest)
                slow_end = b.block
            with otherwise:
                fast = (masked, d, d, *_short_series(b, d), mu, size, same)
                fast_end = b.block
        found = []
        for one, other in zip(slow, fast, strict=True):
            phi = b.phi(one.type)
            phi.add_incoming(one, slow_end)
            phi.add_incoming(other, fast_end)
            found.append(phi)
        self.kept, self.d, self.c, self.t, self.k3, self.mu, self.size, self.same = found


def _size(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return _call(builder, f"llvm.fabs.v{WIDE}f32", VEC, x)


def _count(builder: ir.IRBuilder, flags: ir.Value) -> ir.Value:
    return builder.zext(_call(builder, "llvm.ctpop.i16", I16, builder.bitcast(flags, I16)), I64)


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


def _build(builder: ir.IRBuilder, args: list[ir.Value], names: tuple[str, ...], keep: bool) -> ir.Value:
    mu_at, o_at, mask_at, n, lanes_at, counts_at, histogram_at, ring_at, terms_at, probable_at = args

    def number(value: int) -> ir.Constant:
        return ir.Constant(I64, value)

    def at(address: ir.Value, index: ir.Value, kind: Any, size: int) -> ir.Value:
        return builder.inttoptr(builder.add(address, builder.mul(index, number(size))), kind.as_pointer())

    def add_to(cell: ir.Value, value: ir.Value) -> None:
        builder.store(builder.add(builder.load(cell), value), cell)

    zero = _const(VEC, 0.0)
    cells = {name: cgutils.alloca_once_value(builder, zero) for name in names}
    masks, lost, equal = tallies = [cgutils.alloca_once_value(builder, number(0)) for _ in COUNTS]
    under = cgutils.alloca_once_value(builder, _const(BYTES, 0))  # of a block, under the mask
    greatest = cgutils.alloca_once_value(builder, zero)
    place = cgutils.alloca_once_value(builder, ir.Constant(VEC, [ir.Constant(F32, float(i)) for i in range(WIDE)]))
    turns = builder.sdiv(n, number(WIDE))
    turn_at = at(counts_at, number(len(COUNTS)), I64, 8)
    turn = builder.load(turn_at)
    counters = builder.inttoptr(histogram_at, I16.as_pointer())
    blocks = builder.sdiv(builder.add(turns, number(TURNS - 1)), number(TURNS))
    with cgutils.for_range(builder, blocks) as outer:
        done = builder.mul(outer.index, number(TURNS))
        left = builder.sub(turns, done)
        here = builder.select(builder.icmp_signed("<", left, number(TURNS)), left, number(TURNS))
        for cell in cells.values():
            builder.store(zero, cell)
        builder.store(_const(BYTES, 0), under)
        with cgutils.for_range(builder, here) as inner:
            index = builder.mul(builder.add(done, inner.index), number(WIDE))
            # The bins of this turn wait in the ring while those of RING turns ago are counted: loads that follow the store at once would wait for it.
            slot = builder.and_(builder.add(turn, builder.add(done, inner.index)), number(RING - 1))
            waiting = at(ring_at, builder.mul(slot, number(WIDE)), I32, 2)
            for i in range(WIDE):
                if i % 2 == 0:  # two with one load: loads are what there are most of
                    two = builder.load(builder.gep(waiting, [number(i // 2)]), align=4)
                one = builder.lshr(two, ir.Constant(I32, 16)) if i % 2 else builder.and_(two, ir.Constant(I32, 0xFFFF))
                which = builder.mul(builder.zext(one, I64), number(SUB_BINS))
                spot = builder.gep(counters, [builder.add(which, number(i % SUB_BINS))])
                builder.store(builder.add(builder.load(spot), ir.Constant(I16, 1)), spot)
            mask = builder.load(at(mask_at, index, BYTES, 1), align=1)
            masked = builder.icmp_unsigned("!=", mask, _const(BYTES, 0))
            few = builder.load(under)
            builder.store(builder.add(few, _call(builder, f"llvm.umin.v{WIDE}i8", BYTES, mask, _const(BYTES, 1))), under)
            mu, o = (builder.select(masked, builder.load(at(address, index, VEC, 4), align=4), zero) for address in (mu_at, o_at))
            it = _Turn(builder, mu, o, masked, lost)
            add_to(equal, _count(builder, it.same))
            factors = {
                "d": (it.d,), "abs": (it.size,), "d2": (it.d, it.d), "k3": (it.k3,), "t": (it.t,), "t2": (it.t, it.t),
                "td": (it.t, it.c), "mu": (it.mu,), "mu2": (it.mu, it.mu), "mud": (it.mu, it.d),
            }  # fmt: skip
            if keep:
                one, same = (builder.select(flags, _const(VEC, 1.0), zero) for flags in (it.kept, it.same))
                x = builder.load(place)
                builder.store(builder.fadd(x, _const(VEC, WIDE)), place)
                held = builder.select(it.kept, x, zero)
                factors |= {"place": (held,), "place2": (held, held), "place_abs": (x, it.size)}
                probable = builder.fadd(_exp_terms(builder, _select(builder, ">", it.mu, _const(VEC, -80.0)))[0], _const(VEC, 1.0))
                columns = [one, it.d, it.size, builder.fmul(it.d, it.d), it.k3, it.t, builder.fmul(it.t, it.t), same]
                _store_rows(builder, columns, at(terms_at, builder.mul(index, number(len(VALUES))), F32, 4))
                builder.store(probable, at(probable_at, index, VEC, 4), align=4)
            for name, cell in cells.items():
                old, (first, *second) = builder.load(cell), factors[name]
                builder.store(_fma(builder, first, second[0], old) if second else builder.fadd(old, first), cell)
            builder.store(_select(builder, ">", it.size, builder.load(greatest)), greatest)
            bins = builder.trunc(builder.lshr(builder.bitcast(it.d, IVEC), _const(IVEC, 32 - (BINS - 1).bit_length())), SHORTS)
            builder.store(bins, builder.bitcast(waiting, SHORTS.as_pointer()), align=8)
        wide = builder.zext(builder.load(under), SHORTS)
        add_to(masks, builder.zext(_call(builder, f"llvm.vector.reduce.add.v{WIDE}i16", I16, wide), I64))
        for row, name in enumerate((*SUMS, *MOMENTS)):
            if name in cells:
                spot = at(lanes_at, number(row * WIDE), DOUBLES, 8)
                builder.store(builder.fadd(builder.load(spot, align=8), builder.fpext(builder.load(cells[name]), DOUBLES)), spot, align=8)
    builder.store(builder.sub(builder.load(masks), builder.load(lost)), lost)
    for index, cell in enumerate(tallies):
        add_to(at(counts_at, number(index), I64, 8), builder.load(cell))
    builder.store(builder.add(turn, turns), turn_at)
    return _call(builder, f"llvm.vector.reduce.fmax.v{WIDE}f32", F32, builder.load(greatest))


def make_scatter(kinds: int) -> Any:
    """An intrinsic (rows, n, bins, table): each of f32 [n, 8] rows is added to `kinds` rows of the table; all but n are addresses.

    bins u16 [kinds, TERM_ROW]: STRIDE times the slot of each row. table f32 [slots, WAIT, 8]: neighbours take its columns in turn. n is
    rounded up to a multiple of WAIT; the rows added are zeros, and their bins any slot.
    """

    @intrinsic
    def scatter(typingctx, rows, n, bins, table):
        def codegen(context, builder, signature, args):
            rows, n, bins, table = args
            b = builder
            turns = b.sdiv(b.add(n, ir.Constant(I64, WAIT - 1)), ir.Constant(I64, WAIT))
            with cgutils.for_range(b, turns) as loop:
                for column in range(WAIT):
                    j = b.add(b.mul(loop.index, ir.Constant(I64, WAIT)), ir.Constant(I64, column))
                    row = _load(b, b.add(rows, b.mul(j, ir.Constant(I64, 4 * len(VALUES)))), ROW)
                    for kind in range(kinds):
                        at = b.add(b.add(bins, ir.Constant(I64, 2 * TERM_ROW * kind)), b.mul(j, ir.Constant(I64, 2)))
                        slot = b.zext(b.load(b.inttoptr(at, I16.as_pointer()), align=2), I64)
                        place = b.add(b.mul(slot, ir.Constant(I64, 8)), ir.Constant(I64, 4 * len(VALUES) * column))
                        spot = b.inttoptr(b.add(table, place), ROW.as_pointer())
                        b.store(b.fadd(b.load(spot, align=32), row), spot, align=32)
            return context.get_dummy_value()

        return types.void(*([types.int64] * 4)), codegen

    return scatter


@intrinsic
def gather(typingctx, hot, slot, table, row):
    """The WAIT columns of a slot of f32 [slots, WAIT, 8] are added to a row of f64 [rows, 8], and are 0 then; both tables are addresses."""

    def codegen(context, builder, signature, args):
        hot, slot, table, row = args
        b = builder
        first = b.add(hot, b.mul(slot, ir.Constant(I64, 8 * STRIDE)))
        spots = [b.inttoptr(b.add(first, ir.Constant(I64, 4 * len(VALUES) * column)), ROW.as_pointer()) for column in range(WAIT)]
        parts = [b.load(spot, align=32) for spot in spots]
        while len(parts) > 1:
            parts = [b.fadd(one, other) for one, other in zip(parts[::2], parts[1::2], strict=True)]
        _add_to(b, table, row, b.fpext(parts[0], DOUBLE_ROW))
        for spot in spots:
            b.store(ir.Constant(ROW, [ir.Constant(F32, 0.0)] * len(VALUES)), spot, align=32)
        return context.get_dummy_value()

    return types.void(*([types.int64] * 4)), codegen


@intrinsic
def add_sum(typingctx, table, slot, row):
    """table f64 [slots, 8] at an address: row `slot` += f64 [8] at the address `row`."""

    def codegen(context, builder, signature, args):
        _add_to(builder, args[0], args[1], _load(builder, args[2], DOUBLE_ROW))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def add_near(typingctx, table, slot, row):
    """table i64 [slots, 4] at an address: row `slot` += the tokens, |d|, d and k3 of f32 [8] at the address `row`, in units of NEAR_UNIT; |d| <= NEAR."""

    def codegen(context, builder, signature, args):
        kind, whole = ir.VectorType(F64, 4), ir.VectorType(I64, 4)
        values = _load(builder, args[2], ROW)
        places = ir.Constant(ir.VectorType(I32, 4), [VALUES.index(name) for name in TOKEN_VALUES])
        wide = builder.fpext(builder.shuffle_vector(values, values, places), kind)
        units = ir.Constant(kind, [ir.Constant(F64, 1 / NEAR_UNIT[name]) for name in TOKEN_VALUES])
        magic = ir.Constant(kind, [ir.Constant(F64, 1.5 * 2.0**52)] * 4)  # adding it rounds to an integer, in the low bits
        shifted = _call(builder, "llvm.fma.v4f64", kind, wide, units, magic)
        _add_to(builder, args[0], args[1], builder.sub(builder.bitcast(shifted, whole), builder.bitcast(magic, whole)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def touch(typingctx, ids, count, table, slots):
    """Begin to fetch the rows of i64 [slots, 4] at the address `table` that `count` i32 ids at an address name."""

    def codegen(context, builder, signature, args):
        ids, count, table, slots = args
        fetch = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32]), "llvm.prefetch.p0")
        with cgutils.for_range(builder, count) as loop:
            address = builder.add(ids, builder.mul(loop.index, ir.Constant(I64, 4)))
            row = builder.zext(builder.load(builder.inttoptr(address, I32.as_pointer()), align=4), I64)
            known = builder.select(builder.icmp_unsigned("<", row, slots), row, ir.Constant(I64, 0))
            spot = builder.inttoptr(builder.add(table, builder.mul(known, ir.Constant(I64, 32))), I8.as_pointer())
            builder.call(fetch, [spot, *(ir.Constant(I32, value) for value in (0, 2, 1))])
        return context.get_dummy_value()

    return types.void(*([types.int64] * 4)), codegen


@intrinsic
def sum_rows(typingctx, rows, count, out):
    """out f64 [8] at an address = the sum of `count` f32 [8] rows; 16 in turn are added in fp32."""

    def codegen(context, builder, signature, args):
        cell, part = cgutils.alloca_once(builder, DOUBLE_ROW), cgutils.alloca_once(builder, ROW)
        builder.store(ir.Constant(DOUBLE_ROW, [ir.Constant(F64, 0.0)] * len(VALUES)), cell)
        blocks = builder.sdiv(builder.add(args[1], ir.Constant(I64, TURNS - 1)), ir.Constant(I64, TURNS))
        with cgutils.for_range(builder, blocks) as outer:
            done = builder.mul(outer.index, ir.Constant(I64, TURNS))
            left = builder.sub(args[1], done)
            here = builder.select(builder.icmp_signed("<", left, ir.Constant(I64, TURNS)), left, ir.Constant(I64, TURNS))
            builder.store(ir.Constant(ROW, [ir.Constant(F32, 0.0)] * len(VALUES)), part)
            with cgutils.for_range(builder, here) as inner:
                at = builder.add(args[0], builder.mul(builder.add(done, inner.index), ir.Constant(I64, 4 * len(VALUES))))
                builder.store(builder.fadd(builder.load(part), _load(builder, at, ROW)), part)
            builder.store(builder.fadd(builder.load(cell), builder.fpext(builder.load(part), DOUBLE_ROW)), cell)
        builder.store(builder.load(cell), builder.inttoptr(args[2], DOUBLE_ROW.as_pointer()), align=8)
        return context.get_dummy_value()

    return types.void(*([types.int64] * 3)), codegen


ROW, DOUBLE_ROW = ir.VectorType(F32, len(VALUES)), ir.VectorType(F64, len(VALUES))


def _load(builder: ir.IRBuilder, address: ir.Value, kind: Any) -> ir.Value:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)


def _add_to(builder: ir.IRBuilder, table: ir.Value, slot: ir.Value, value: ir.Value) -> None:
    """Add a vector of 64-bit numbers to its row of a table."""
    spot = builder.inttoptr(builder.add(table, builder.mul(slot, ir.Constant(I64, 8 * value.type.count))), value.type.as_pointer())
    add = builder.fadd if value.type.element == F64 else builder.add
    builder.store(add(builder.load(spot, align=8), value), spot, align=8)
