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

from miles.analysis.terms import BINS, CORE, COUNTS, HUGE, LIMIT, RING, SUB_BINS, SUMS, TOKEN_VALUES, VALUES, WIDE

intrinsic: Any = _intrinsic  # its type says nothing of what the decorated function becomes

F32, F64, I8, I32, I64 = ir.FloatType(), ir.DoubleType(), *(ir.IntType(bits) for bits in (8, 32, 64))
VEC, IVEC, BYTES, DOUBLES = (ir.VectorType(kind, WIDE) for kind in (F32, I32, I8, F64))
SMALL = 0.34375  # below ln2 / 2: a log-ratio that needs no reduction before its exponential
TURNS = 16  # of the innermost loop, before its fp32 sums go to fp64


def make_sums(terms: bool, every: bool) -> Any:
    """An intrinsic (mu, o, mask, n, lanes, counts, histogram, ring, terms, probable) -> greatest |d| of n tokens; all but n are addresses.

    mu, o f32 [n], mask u8 [n]; n a multiple of 16. Added to: lanes f64 [len(SUMS), 16], only the rows of CORE unless `every`; counts
    i64 [len(COUNTS) + 1], the last one turns of the ring; histogram u32 [BINS, SUB_BINS], where a token that does not count is a d of 0.
    ring i32 [RING, 16]: bins that wait to be counted, for the caller to count at the end; they begin as BINS * SUB_BINS, one past the last.
    terms: also written are terms f32 [n, len(VALUES)], zeros for a token that does not count, and probable f32 [n], e^mu.
    """
    names = SUMS if every else CORE

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


def _ratio_terms(builder: ir.IRBuilder, d: ir.Value, size: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """c, t and k3 of these differences: where all 16 are small, as they mostly are, by the series alone."""
    far = builder.fcmp_ordered(">", size, _const(VEC, SMALL))
    some = builder.icmp_unsigned("!=", builder.bitcast(far, ir.IntType(WIDE)), ir.Constant(ir.IntType(WIDE), 0))
    with builder.if_else(some, likely=False) as (then, otherwise):
        with then:
            held = _select(builder, "<", _select(builder, ">", d, _const(VEC, -LIMIT)), _const(VEC, LIMIT))
            slow = (held, *_exp_terms(builder, held))
            slow_end = builder.block
        with otherwise:
            fast = (d, *_series(builder, d))
            fast_end = builder.block
    found = []
    for one, other in zip(slow, fast, strict=True):
        phi = builder.phi(VEC)
        phi.add_incoming(one, slow_end)
        phi.add_incoming(other, fast_end)
        found.append(phi)
    return found[0], found[1], found[2]


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

    zero, izero = _const(VEC, 0.0), _const(IVEC, 0)
    cells = {name: cgutils.alloca_once_value(builder, zero) for name in names}
    tallies = [cgutils.alloca_once_value(builder, izero) for _ in COUNTS]
    greatest = cgutils.alloca_once_value(builder, zero)
    turns = builder.sdiv(n, number(WIDE))
    turn_at = at(counts_at, number(len(COUNTS)), I64, 8)
    turn = builder.load(turn_at)
    lane = ir.Constant(IVEC, [i % SUB_BINS for i in range(WIDE)])
    blocks = builder.sdiv(builder.add(turns, number(TURNS - 1)), number(TURNS))
    with cgutils.for_range(builder, blocks) as outer:
        done = builder.mul(outer.index, number(TURNS))
        left = builder.sub(turns, done)
        here = builder.select(builder.icmp_signed("<", left, number(TURNS)), left, number(TURNS))
        for cell in cells.values():
            builder.store(zero, cell)
        for cell in tallies:
            builder.store(izero, cell)
        with cgutils.for_range(builder, here) as inner:
            index = builder.mul(builder.add(done, inner.index), number(WIDE))
            mu = builder.load(at(mu_at, index, VEC, 4), align=4)
            o = builder.load(at(o_at, index, VEC, 4), align=4)
            masked = builder.icmp_unsigned("!=", builder.load(at(mask_at, index, BYTES, 1), align=1), _const(BYTES, 0))
            kept = masked
            for value in (mu, o):
                size = _call(builder, f"llvm.fabs.v{WIDE}f32", VEC, value)
                kept = builder.and_(kept, builder.fcmp_ordered("<=", size, _const(VEC, HUGE)))
            same = builder.and_(kept, builder.icmp_unsigned("==", builder.bitcast(mu, IVEC), builder.bitcast(o, IVEC)))
            for cell, flags in zip(tallies, (masked, kept, same), strict=True):
                builder.store(builder.add(builder.load(cell), builder.zext(flags, IVEC)), cell)
            mu, o = builder.select(kept, mu, zero), builder.select(kept, o, zero)
            d = builder.fsub(o, mu)
            size = _call(builder, f"llvm.fabs.v{WIDE}f32", VEC, d)
            c, t, k3 = _ratio_terms(builder, d, size)
            factors = {
                "d": (d,), "abs": (size,), "d2": (d, d), "k3": (k3,), "t": (t,), "t2": (t, t),
                "td": (t, c), "mu": (mu,), "mu2": (mu, mu), "mud": (mu, d),
            }  # fmt: skip
            for name, cell in cells.items():
                old, (first, *second) = builder.load(cell), factors[name]
                builder.store(_fma(builder, first, second[0], old) if second else builder.fadd(old, first), cell)
            builder.store(_select(builder, ">", size, builder.load(greatest)), greatest)
            if keep:
                probable = builder.fadd(_exp_terms(builder, _select(builder, ">", mu, _const(VEC, -80.0)))[0], _const(VEC, 1.0))
                one = builder.select(kept, _const(VEC, 1.0), zero)
                equal = builder.select(same, _const(VEC, 1.0), zero)
                columns = [one, d, size, builder.fmul(d, d), k3, t, builder.fmul(t, t), equal]
                _store_rows(builder, columns, at(terms_at, builder.mul(index, number(len(VALUES))), F32, 4))
                builder.store(probable, at(probable_at, index, VEC, 4), align=4)
            bits = builder.lshr(builder.bitcast(d, IVEC), _const(IVEC, 32 - (BINS - 1).bit_length()))
            # The bins of this turn wait in the ring while those of RING turns ago are counted: loads that follow the store at once would wait for it.
            slot = builder.and_(builder.add(turn, builder.add(done, inner.index)), number(RING - 1))
            first = at(ring_at, builder.mul(slot, number(WIDE)), I32, 4)
            for i in range(WIDE):
                which = builder.zext(builder.load(builder.gep(first, [ir.Constant(I32, i)])), I64)
                spot = at(histogram_at, which, I32, 4)
                builder.store(builder.add(builder.load(spot), ir.Constant(I32, 1)), spot)
            columns = builder.add(builder.mul(bits, _const(IVEC, SUB_BINS)), lane)
            builder.store(columns, builder.bitcast(first, IVEC.as_pointer()), align=4)
        for row, name in enumerate(SUMS):
            if name in cells:
                spot = at(lanes_at, number(row * WIDE), DOUBLES, 8)
                builder.store(builder.fadd(builder.load(spot, align=8), builder.fpext(builder.load(cells[name]), DOUBLES)), spot, align=8)
        for index, cell in enumerate(tallies):
            spot = at(counts_at, number(index), I64, 8)
            count = _call(builder, f"llvm.vector.reduce.add.v{WIDE}i32", I32, builder.load(cell))
            builder.store(builder.add(builder.load(spot), builder.zext(count, I64)), spot)
    builder.store(builder.add(turn, turns), turn_at)
    return _call(builder, f"llvm.vector.reduce.fmax.v{WIDE}f32", F32, builder.load(greatest))


@intrinsic
def add_row(typingctx, table, slot, row):
    """table f64 [slots, 8] at an address: row `slot` += f32 [8] at the address `row`."""

    def codegen(context, builder, signature, args):
        _add_to(builder, args[0], args[1], builder.fpext(_load(builder, args[2], ROW), DOUBLE_ROW))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def add_sum(typingctx, table, slot, row):
    """table f64 [slots, 8] at an address: row `slot` += f64 [8] at the address `row`."""

    def codegen(context, builder, signature, args):
        _add_to(builder, args[0], args[1], _load(builder, args[2], DOUBLE_ROW))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def add_token(typingctx, table, slot, row):
    """table f64 [slots, 4] at an address: row `slot` += the tokens, |d|, d and k3 of f32 [8] at the address `row`."""

    def codegen(context, builder, signature, args):
        values = _load(builder, args[2], ROW)
        places = ir.Constant(ir.VectorType(I32, 4), [VALUES.index(name) for name in TOKEN_VALUES])
        _add_to(builder, args[0], args[1], builder.fpext(builder.shuffle_vector(values, values, places), ir.VectorType(F64, 4)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def sum_rows(typingctx, rows, count, first, out):
    """out f64 [3, 8] at an address = sums over j of f32 [8] rows, of j times them and of j^2 times them; j counts from `first`."""

    def codegen(context, builder, signature, args):
        cells = [cgutils.alloca_once(builder, DOUBLE_ROW) for _ in range(3)]
        for cell in cells:
            builder.store(ir.Constant(DOUBLE_ROW, [ir.Constant(F64, 0.0)] * len(VALUES)), cell)
        with cgutils.for_range(builder, args[1]) as loop:
            at = builder.add(args[0], builder.mul(loop.index, ir.Constant(I64, 4 * len(VALUES))))
            value = builder.fpext(_load(builder, at, ROW), DOUBLE_ROW)
            j = builder.sitofp(builder.add(loop.index, args[2]), F64)
            one = builder.insert_element(ir.Constant(DOUBLE_ROW, ir.Undefined), j, ir.Constant(I32, 0))
            factor = builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, len(VALUES)), [0] * len(VALUES)))
            for power, cell in enumerate(cells):
                if power:
                    value = builder.fmul(value, factor)
                builder.store(builder.fadd(builder.load(cell), value), cell)
        for power, cell in enumerate(cells):
            spot = builder.add(args[3], ir.Constant(I64, 8 * len(VALUES) * power))
            builder.store(builder.load(cell), builder.inttoptr(spot, DOUBLE_ROW.as_pointer()), align=8)
        return context.get_dummy_value()

    return types.void(*([types.int64] * 4)), codegen


ROW, DOUBLE_ROW = ir.VectorType(F32, len(VALUES)), ir.VectorType(F64, len(VALUES))


def _load(builder: ir.IRBuilder, address: ir.Value, kind: Any) -> ir.Value:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)


def _add_to(builder: ir.IRBuilder, table: ir.Value, slot: ir.Value, value: ir.Value) -> None:
    """Add a vector of fp64 to its row of a table."""
    spot = builder.inttoptr(builder.add(table, builder.mul(slot, ir.Constant(I64, 8 * value.type.count))), value.type.as_pointer())
    builder.store(builder.fadd(builder.load(spot, align=8), value), spot, align=8)
