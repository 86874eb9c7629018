"""Sums of rows of terms, and those into the tables of slices: explicit vectors of the eight values of a token, so that the order of additions is written here."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

from miles.analysis.terms import ROW, ROW_UNIT, TURNS, VALUES
from miles.analysis.token_lanes import ROW_VECTOR, STRIDE, WAIT
from miles.analysis.vectors import F32, F64, I32, I64

intrinsic: Any = _intrinsic  # its type says nothing of what the decorated function becomes

WIDE_ROW = ir.VectorType(F64, len(VALUES))


@intrinsic
def gather(typingctx, hot, slot, table, row):
    """The WAIT columns of a slot of f32 [slots, WAIT, 8], each as ROW, are added to a row of f64 [rows, 8], VALUES, and are 0 then; both tables are addresses."""

    def codegen(context, builder, signature, args):
        hot, slot, table, row = args
        b = builder
        first = b.add(hot, b.mul(slot, ir.Constant(I64, 8 * STRIDE)))
        spots = [b.inttoptr(b.add(first, ir.Constant(I64, 4 * len(ROW) * column)), ROW_VECTOR.as_pointer()) for column in range(WAIT)]
        parts = [b.load(spot, align=32) for spot in spots]
        while len(parts) > 1:
            parts = [b.fadd(one, other) for one, other in zip(parts[::2], parts[1::2], strict=True)]
        _add_to(b, table, row, _values(b, b.fpext(parts[0], WIDE_ROW)))
        for spot in spots:
            b.store(ir.Constant(ROW_VECTOR, [ir.Constant(F32, 0.0)] * len(ROW)), spot, align=32)
        return context.get_dummy_value()

    return types.void(*([types.int64] * 4)), codegen


@intrinsic
def add_sum(typingctx, table, slot, row):
    """table f64 [slots, 8] at an address: row `slot` += f64 [8] at the address `row`."""

    def codegen(context, builder, signature, args):
        _add_to(builder, args[0], args[1], _load(builder, args[2], WIDE_ROW))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def sum_rows(typingctx, rows, count, out):
    """out f64 [8], VALUES, at an address = the sum of `count` rows f32 [8], ROW: in fp32 16 of every fourth, those of four, and up to three at the end."""

    def codegen(context, builder, signature, args):
        b, zero = builder, ir.Constant(ROW_VECTOR, [ir.Constant(F32, 0.0)] * len(ROW))
        cell = cgutils.alloca_once_value(b, ir.Constant(WIDE_ROW, [ir.Constant(F64, 0.0)] * len(ROW)))
        b.store(ir.Constant(WIDE_ROW, [ir.Constant(F64, 0.0)] * len(ROW)), cell)
        parts = [cgutils.alloca_once_value(b, zero) for _ in range(WAIT)]
        size = ir.Constant(I64, WAIT * TURNS)
        blocks = b.sdiv(b.add(args[1], ir.Constant(I64, WAIT * TURNS - 1)), size)

        def add(part: ir.Value, row: ir.Value) -> None:
            at = b.add(args[0], b.mul(row, ir.Constant(I64, 4 * len(ROW))))
            b.store(b.fadd(b.load(part), _load(b, at, ROW_VECTOR)), part)

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
            b.store(b.fadd(b.load(cell), b.fpext(found[0], WIDE_ROW)), cell)
        b.store(_values(b, b.load(cell)), b.inttoptr(args[2], WIDE_ROW.as_pointer()), align=8)
        return context.get_dummy_value()

    return types.void(*([types.int64] * 3)), codegen


def _values(b: ir.IRBuilder, row: ir.Value) -> ir.Value:
    """ROW in its units as VALUES."""
    order = ir.Constant(ir.VectorType(I32, len(VALUES)), [ROW.index(name) for name in VALUES])
    units = ir.Constant(WIDE_ROW, [ir.Constant(F64, ROW_UNIT[name]) for name in VALUES])
    return b.fmul(b.shuffle_vector(row, row, order), units)


def _load(builder: ir.IRBuilder, address: ir.Value, kind: Any) -> ir.Value:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)


def _add_to(builder: ir.IRBuilder, table: ir.Value, slot: ir.Value, value: ir.Value) -> None:
    """Add a vector of fp64 numbers to its row of a table."""
    spot = builder.inttoptr(builder.add(table, builder.mul(slot, ir.Constant(I64, 8 * value.type.count))), value.type.as_pointer())
    builder.store(builder.fadd(builder.load(spot, align=8), value), spot, align=8)
