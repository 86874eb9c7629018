"""Words of LLVM's intermediate language that the explicit vectors of the analysis share: constants, bounds, e^c - 1 and e^c - 1 - c in fp32.

Strict IEEE: no flag allows the compiler to change the order or the number of roundings.
"""

from __future__ import annotations

import math
import struct
from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.core import config as _config
from numba.core.codegen import get_host_cpu_features

from miles.analysis.terms import WIDE

F32, F64, I8, I16, I32, I64 = ir.FloatType(), ir.DoubleType(), *(ir.IntType(bits) for bits in (8, 16, 32, 64))
VEC, IVEC, BYTES, DOUBLES = (ir.VectorType(kind, WIDE) for kind in (F32, I32, I8, F64))
# (e^r - 1 - r) / r^2 for |r| <= NEAR, interpolated at Chebyshev's nodes.
NEAREST = (0.5, 0.16666642420070918, 0.041666636365000086, 0.008348847788288706, 0.0013908278590313836)


config: Any = _config  # its type says nothing of its names
# Whether a vector of 16 is one register of the processors that numba compiles for, which its variables can make others than this one.
FEATURES = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
WHOLE_VECTORS = "+avx512f" in FEATURES.split(",")


def number(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def const(kind: Any, value: float) -> ir.Constant:
    """The same in all lanes."""
    if kind.element == F32:
        value = struct.unpack("f", struct.pack("f", value))[0]  # llvmlite accepts only constants that fit
    return ir.Constant(kind, [ir.Constant(kind.element, value)] * kind.count)


def splat(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """A number in all lanes."""
    kind = ir.VectorType(value.type, WIDE)
    one = b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return b.shuffle_vector(one, one, ir.Constant(IVEC, [0] * WIDE))


def tree(b: ir.IRBuilder, lanes: ir.Value) -> ir.Value:
    """Their sum: i with i + 8, then + 4, + 2, + 1."""
    while lanes.type.count > 1:
        half = lanes.type.count // 2
        kind = ir.VectorType(I32, half)
        low, high = (b.shuffle_vector(lanes, lanes, ir.Constant(kind, list(range(start, start + half)))) for start in (0, half))
        lanes = b.fadd(low, high)
    return b.extract_element(lanes, ir.Constant(I32, 0))


def call(builder: ir.IRBuilder, name: str, kind: Any, *values: ir.Value) -> ir.Value:
    """One of LLVM's own functions."""
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [value.type for value in values]), name)
    return builder.call(function, values)


def fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return call(builder, f"llvm.fma.v{WIDE}f32", VEC, a, b, c)


def absolute(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return call(builder, f"llvm.fabs.v{WIDE}f32", VEC, x)


def select(builder: ir.IRBuilder, how: str, a: ir.Value, b: ir.Value) -> ir.Value:
    """The lesser (<) or greater (>) of two that are no NaN."""
    return builder.select(builder.fcmp_ordered(how, a, b), a, b)


def counted(builder: ir.IRBuilder, flags: ir.Value) -> ir.Value:
    """How many of a vector of flags are set, as i64."""
    whole = ir.IntType(flags.type.count)
    found = call(builder, f"llvm.ctpop.i{flags.type.count}", whole, builder.bitcast(flags, whole))
    return found if whole == I64 else builder.zext(found, I64)


def pinned(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The same value, of which the compiler thinks that it is made here, between the reads and writes of memory before and after."""
    if not WHOLE_VECTORS:
        return value
    kind = ir.FunctionType(value.type, [value.type])
    return builder.asm(kind, "", "=v,0,~{memory}", [value], side_effect=True)


def at(builder: ir.IRBuilder, address: ir.Value, index: ir.Value, kind: Any, size: int) -> ir.Value:
    """Where the index-th of things of `size` bytes from an address lies, as a pointer to `kind`."""
    return builder.inttoptr(builder.add(address, builder.mul(index, number(size))), kind.as_pointer())


def fetch(b: ir.IRBuilder, spot: ir.Value, near: int) -> None:
    """Begin to fetch a cache line: near 3 into the first cache, 1 or 2 into the second."""
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0"), [spot, *(ir.Constant(I32, value) for value in (0, near, 1))])


def short_series(builder: ir.IRBuilder, r: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """(r^2, e^r - 1, e^r - 1 - r) for |r| <= NEAR, by the polynomial of degree 4 that is nearest there (within 3e-8 of it)."""
    square = builder.fmul(r, r)
    first, second = (fma(builder, r, const(VEC, NEAREST[k + 1]), const(VEC, NEAREST[k])) for k in (0, 2))
    rest = fma(builder, square, const(VEC, NEAREST[4]), second)
    small = builder.fmul(square, fma(builder, square, rest, first))
    return square, builder.fadd(r, small), small


def exp_terms(builder: ir.IRBuilder, c: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(e^c - 1, e^c - 1 - c) in fp32 for -87 < c < 88, each within some 1e-7 of itself; where |c| < ln2 / 2 the bits of _series.

    c = n ln2 + r with |r| <= ln2 / 2; for n = 0, r is c and nothing cancels.
    """
    magic = const(VEC, 12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, in the low bits
    shifted = fma(builder, c, const(VEC, 1.4426950408889634), magic)
    n = builder.fsub(shifted, magic)
    r = fma(builder, n, const(VEC, -0.693359375), c)
    r = fma(builder, n, const(VEC, 2.12194440e-4), r)
    grown, small = _series(builder, r)
    power = builder.shl(builder.bitcast(shifted, IVEC), const(IVEC, 23))
    scale = builder.bitcast(builder.add(power, const(IVEC, 127 << 23)), VEC)  # 2^n
    t = fma(builder, scale, grown, builder.fsub(scale, const(VEC, 1.0)))  # for n = 0 grown itself
    near = builder.fcmp_ordered("==", n, const(VEC, 0.0))
    return t, builder.select(near, small, builder.fsub(t, c))


def _series(builder: ir.IRBuilder, r: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(e^r - 1, e^r - 1 - r) for |r| <= ln2 / 2: r^2 (1/2! + r/3! + ... + r^6/8!), in pairs so that the chain is short."""
    square = builder.fmul(r, r)
    pairs = [fma(builder, r, const(VEC, 1 / math.factorial(k + 1)), const(VEC, 1 / math.factorial(k))) for k in (2, 4, 6)]
    high = fma(builder, square, const(VEC, 1 / math.factorial(8)), pairs[2])
    low = fma(builder, square, pairs[1], pairs[0])
    small = builder.fmul(square, fma(builder, builder.fmul(square, square), high, low))
    return builder.fadd(r, small), small
