"""Compiled CPU kernel for FP8 weights in blocks, as explicit vectors of 32 codes: bfloat16 of the float32 product of code and scale.

Generic vector operations, so every processor has them. A code's eight bits become a float32 number without an operation on denormal ones, which
is slow on some processors and flushed to zero on others that were told so; the rounding is by the product's bits.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.core import cgutils

from miles.precision.compiled import f32, kernel
from miles.precision.llvm import F32, I32, I64, const, intrinsic, pointer, take

WIDE = 32
I8, I16 = ir.IntType(8), ir.IntType(16)
MAGNITUDE, SIGN = 0x7F, 0x80  # of a code: three bits of mantissa below four of exponent, whose bias is 7; all ones is NaN, and there is no infinity
LEAST_NORMAL, LEAST_EXPONENT = 8, 2.0**-6
ONE_EXPONENT = 120  # float32's of a code's exponent 0, if it were that of normal numbers: 127 - 7
QUIET = 0x7FC0  # bfloat16's NaN


def _values(builder: ir.IRBuilder, codes: ir.Value, scale: ir.Value) -> ir.Value:
    """The bits of bfloat16 values; codes and scale are a number each, or vectors."""
    b, byte = builder, codes.type
    short, whole, single = (ir.VectorType(each, byte.count) if isinstance(byte, ir.VectorType) else each for each in (I16, I32, F32))
    magnitude = b.and_(codes, const(byte, MAGNITUDE))
    moved = b.shl(b.zext(magnitude, whole), const(whole, 23 - 3))
    normal, twice = (b.bitcast(b.add(moved, const(whole, exponent << 23)), single) for exponent in (ONE_EXPONENT, ONE_EXPONENT + 1))
    # Below the normal ones no 1 is meant before the point, and the exponent is that of 1: (1 + m / 8) 2^-6 - 2^-6.
    tiny = b.fsub(twice, const(single, LEAST_EXPONENT))
    size = b.select(b.icmp_unsigned("<", magnitude, const(byte, LEAST_NORMAL)), tiny, normal)
    bits = b.bitcast(b.fmul(size, scale), whole)
    odd = b.and_(b.lshr(bits, const(whole, 16)), const(whole, 1))
    half = b.add(b.add(bits, const(whole, 0x7FFF)), odd)  # to nearest, ties to even
    rounded = b.trunc(b.lshr(half, const(whole, 16)), short)
    known = b.select(b.icmp_unsigned("==", magnitude, const(byte, MAGNITUDE)), const(short, QUIET), rounded)
    return b.xor(known, b.shl(b.zext(b.and_(codes, const(byte, SIGN)), short), const(short, 8)))


@intrinsic
def _dequantize_run(typingctx, codes, n, scale, out):
    """out[i] = codes[i] * scale for n codes at an address, out u16 at another."""

    def codegen(context, builder, signature, args):
        codes, n, scale, out = args
        # A NaN whose low bits are 0, so that rounding does not carry into its sign.
        scale = builder.select(builder.fcmp_unordered("uno", scale, scale), const(F32, float("nan")), scale)
        single = ir.VectorType(F32, WIDE)
        one = builder.insert_element(ir.Constant(single, ir.Undefined), scale, const(I32, 0))
        scales = builder.shuffle_vector(one, ir.Constant(single, ir.Undefined), const(ir.VectorType(I32, WIDE), 0))

        def step(first: ir.Value, kind: Any, scale: ir.Value) -> None:
            values = _values(builder, builder.load(pointer(builder, builder.add(codes, first), kind), align=1), scale)
            builder.store(values, pointer(builder, builder.add(out, builder.shl(first, const(I64, 1))), values.type), align=2)

        turns = builder.sdiv(n, const(I64, WIDE))
        with cgutils.for_range(builder, turns) as loop:
            step(builder.mul(loop.index, const(I64, WIDE)), ir.VectorType(I8, WIDE), scales)
        done = builder.mul(turns, const(I64, WIDE))
        with cgutils.for_range(builder, builder.sub(n, done)) as loop:
            step(builder.add(done, loop.index), I8, scale)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.int64), codegen


@kernel
def dequantize(block):
    """out[i, j] = codes[i, j] * scales[(first + i) // side, j // side], rounded to float32 and then to bfloat16. A task is a row.

    args: codes u8 [N, K], scales f32 [blocks from that of row `first`, ceil(K / side)], out u16 [N, K], N, K, first, side.
    """
    b = carray(block, 9)
    columns, first, side = b[6], b[7], b[8]
    blocks = (columns + side - 1) // side
    begin = first // side
    while True:
        row = take(b.ctypes.data)
        if row >= b[1]:
            break
        codes, out = b[2] + row * columns, b[4] + row * columns * 2
        scales = f32(b[3] + ((first + row) // side - begin) * blocks * 4, blocks)
        for j in range(blocks):
            _dequantize_run(codes + j * side, min(side, columns - j * side), scales[j], out + j * side * 2)
