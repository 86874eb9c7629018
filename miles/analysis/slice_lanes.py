"""Adding rows of terms to the tables of slices: explicit vectors of the eight values of a token, so that the order of additions is written here."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

from miles.analysis.terms import NEAR_UNIT, TERM_ROW, TOKEN_VALUES, TURNS, VALUES
from miles.analysis.vectors import F32, F64, I8, I16, I32, I64, call

intrinsic: Any = _intrinsic  # its type says nothing of what the decorated function becomes

ROW, DOUBLE_ROW = ir.VectorType(F32, len(VALUES)), ir.VectorType(F64, len(VALUES))
WAIT = 4  # columns of a slot that neighbouring tokens take in turn: an addition need not wait for the one before
STRIDE = WAIT * len(VALUES) * 4 // 8  # of a slot in such a table, in units of 8 bytes


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
        shifted = call(builder, "llvm.fma.v4f64", kind, wide, units, magic)
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
    """out f64 [8] at an address = the sum of `count` f32 [8] rows: in fp32 16 of every fourth, those of four, and up to three at the end."""

    def codegen(context, builder, signature, args):
        b, zero = builder, ir.Constant(ROW, [ir.Constant(F32, 0.0)] * len(VALUES))
        cell = cgutils.alloca_once_value(b, ir.Constant(DOUBLE_ROW, [ir.Constant(F64, 0.0)] * len(VALUES)))
        parts = [cgutils.alloca_once_value(b, zero) for _ in range(WAIT)]
        size = ir.Constant(I64, WAIT * TURNS)
        blocks = b.sdiv(b.add(args[1], ir.Constant(I64, WAIT * TURNS - 1)), size)

        def add(part: ir.Value, row: ir.Value) -> None:
            at = b.add(args[0], b.mul(row, ir.Constant(I64, 4 * len(VALUES))))
            b.store(b.fadd(b.load(part), _load(b, at, ROW)), part)

        with cgutils.for_range(b, blocks) as outer:
            done = b.mul(outer.index, size)
            left = b.sub(args[1], done)
            here = b.select(b.icmp_signed("<", left, size), left, size)
            for part in parts:
                b.store(zero, part)
            fours = b.sdiv(here, ir.Constant(I64, WAIT))
            with cgutils.for_range(b, fours) as inner:
                first = b.add(done, b.mul(inner.index, ir.Constant(I64, WAIT)))
                for k, part in enumerate(parts):
                    add(part, b.add(first, ir.Constant(I64, k)))
            last = b.mul(fours, ir.Constant(I64, WAIT))
            with cgutils.for_range(b, b.sub(here, last)) as inner:
                add(parts[0], b.add(b.add(done, last), inner.index))
            found = [b.load(part) for part in parts]
            while len(found) > 1:
                found = [b.fadd(one, other) for one, other in zip(found[::2], found[1::2], strict=True)]
            b.store(b.fadd(b.load(cell), b.fpext(found[0], DOUBLE_ROW)), cell)
        b.store(b.load(cell), b.inttoptr(args[2], DOUBLE_ROW.as_pointer()), align=8)
        return context.get_dummy_value()

    return types.void(*([types.int64] * 3)), codegen


def _load(builder: ir.IRBuilder, address: ir.Value, kind: Any) -> ir.Value:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)


def _add_to(builder: ir.IRBuilder, table: ir.Value, slot: ir.Value, value: ir.Value) -> None:
    """Add a vector of 64-bit numbers to its row of a table."""
    spot = builder.inttoptr(builder.add(table, builder.mul(slot, ir.Constant(I64, 8 * value.type.count))), value.type.as_pointer())
    add = builder.fadd if value.type.element == F64 else builder.add
    builder.store(add(builder.load(spot, align=8), value), spot, align=8)
