"""LLVM building blocks for the compiled kernels: explicit fused multiply-add, exponential, 16-lane reductions, a matrix tile.

Everything here is strict IEEE (no fast-math flags): the bits of a result depend on its operands and on the written order alone, not on
how LLVM vectorises a loop, on what lies beside it, or on the machine's vector width. fma is LLVM's intrinsic, one rounding.
"""

from __future__ import annotations

import struct
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

intrinsic: Any = _intrinsic  # its type says nothing of what the decorated function becomes

F32 = ir.FloatType()
I32 = ir.IntType(32)
I64 = ir.IntType(64)
LANES = 16
VEC = ir.VectorType(F32, LANES)
IVEC = ir.VectorType(I32, LANES)


def round_f32(value: float) -> float:
    """The nearest fp32 number: llvmlite accepts only constants that fit."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def const(kind: Any, value: float) -> ir.Constant:
    """A constant of a scalar or vector type."""
    if isinstance(kind, ir.VectorType):
        scalar = kind.element
        item = round_f32(value) if scalar == F32 else value
        return ir.Constant(kind, [ir.Constant(scalar, item)] * kind.count)
    return ir.Constant(kind, round_f32(value) if kind == F32 else value)


def splat(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    """A vector with the scalar in every lane."""
    one = builder.insert_element(ir.Constant(VEC, ir.Undefined), scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, ir.Constant(VEC, ir.Undefined), ir.Constant(IVEC, [0] * LANES))


def call_fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a * b + c with one rounding, scalar or vector."""
    name = "llvm.fma.f32" if a.type == F32 else f"llvm.fma.v{LANES}f32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(a.type, [a.type] * 3), name)
    return builder.call(function, [a, b, c])


def build_exp(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """exp(x), fp32, within 2 ulp; 0 below -87.33, inf above 88.72; NaN stays NaN.

    Cody-Waite: x = n ln2 + r, |r| <= ln2 / 2, a polynomial of degree 7 in r (Taylor; the remainder is below 3e-9), then 2^n by two
    exponent shifts (n may reach 128).
    """
    kind = x.type
    integer = IVEC if isinstance(kind, ir.VectorType) else I32
    magic = const(kind, 12582912.0)
    high = builder.fcmp_ordered(">", x, const(kind, 88.7228394))
    low = builder.fcmp_ordered("<", x, const(kind, -87.3365479))
    x = builder.select(high, const(kind, 88.7228394), x)
    clamped = builder.select(low, const(kind, -87.3365479), x)
    shifted = call_fma(builder, clamped, const(kind, 1.4426950408889634), magic)
    n = builder.fsub(shifted, magic)
    r = call_fma(builder, n, const(kind, -0.693359375), clamped)
    r = call_fma(builder, n, const(kind, 2.12194440e-4), r)
    poly = const(kind, 1.0 / 5040)
    for coefficient in (1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0):
        poly = call_fma(builder, poly, r, const(kind, coefficient))
    power = builder.sub(builder.bitcast(shifted, integer), const(integer, 0x4B400000))
    half = builder.ashr(power, const(integer, 1))
    rest = builder.sub(power, half)
    for part in (half, rest):
        scale = builder.shl(builder.add(part, const(integer, 127)), const(integer, 23))
        poly = builder.fmul(poly, builder.bitcast(scale, kind))
    poly = builder.select(high, const(kind, float("inf")), poly)
    return builder.select(low, const(kind, 0.0), poly)


def reduce(builder: ir.IRBuilder, vector: ir.Value, combine: Any) -> ir.Value:
    """Fixed tree over 16 lanes: i with i + 8, then + 4, + 2, + 1."""
    width = LANES // 2
    while width:
        mask = [i + width if i < width else i for i in range(LANES)]
        vector = combine(builder, vector, builder.shuffle_vector(vector, vector, ir.Constant(IVEC, mask)))
        width //= 2
    return builder.extract_element(vector, ir.Constant(I32, 0))


def _add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.fadd(a, b)


def _max(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_unordered(">", a, b), a, b)  # a NaN on the left stays


def pointer(builder: ir.IRBuilder, address: ir.Value, kind: Any) -> ir.Value:
    return builder.inttoptr(address, kind.as_pointer())


def at(builder: ir.IRBuilder, address: ir.Value, index: ir.Value) -> ir.Value:
    """Byte address of element index of an fp32 array."""
    return builder.add(address, builder.shl(index, ir.Constant(I64, 2)))


def load_vector(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.load(pointer(builder, address, VEC), align=4)


def load_part(builder: ir.IRBuilder, address: ir.Value, index: ir.Value, n: ir.Value, fill: float) -> ir.Value:
    """16 elements from index on; lanes at or beyond n are `fill` and are not read."""
    lanes = ir.Constant(IVEC, list(range(LANES)))
    left = builder.trunc(builder.sub(n, index), I32)
    one = builder.insert_element(ir.Constant(IVEC, ir.Undefined), left, ir.Constant(I32, 0))
    count = builder.shuffle_vector(one, ir.Constant(IVEC, ir.Undefined), ir.Constant(IVEC, [0] * LANES))
    mask = builder.icmp_signed("<", lanes, count)
    kind = ir.FunctionType(VEC, [VEC.as_pointer(), I32, ir.VectorType(ir.IntType(1), LANES), VEC])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.load.v{LANES}f32.p0")
    return builder.call(function, [pointer(builder, at(builder, address, index), VEC), ir.Constant(I32, 4), mask, const(VEC, fill)])


@intrinsic
def as_pointer(typingctx, address):
    """int64 address -> void pointer (for carray)."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@intrinsic
def take(typingctx, address):
    """Atomic fetch-and-add 1 of the int64 at the address: the next task."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", pointer(builder, args[0], I64), ir.Constant(I64, 1), "monotonic")

    return types.int64(types.int64), codegen


@intrinsic
def call_sgemm(typingctx, function, m, n, k, a, lda, b, ldb, c, ldc):
    """C [m, n] = A [m, k] B [n, k].T, row-major fp32, by the Fortran sgemm_ (32-bit integers) at the address `function`.

    Fortran reads the same memory by columns: C.T [n, m] = B [n, k] A.T [k, m].
    """

    def codegen(context, builder, signature, args):
        function, m, n, k, a, lda, b, ldb, c, ldc = args

        def integer(value):
            return cgutils.alloca_once_value(builder, builder.trunc(value, I32))

        def letter(which):
            return cgutils.alloca_once_value(builder, ir.Constant(ir.IntType(8), ord(which)))

        one, zero = (cgutils.alloca_once_value(builder, const(F32, value)) for value in (1.0, 0.0))
        values = [letter("T"), letter("N"), integer(n), integer(m), integer(k), one, pointer(builder, b, F32), integer(ldb)]
        values += [pointer(builder, a, F32), integer(lda), zero, pointer(builder, c, F32), integer(ldc)]
        entry = builder.inttoptr(function, ir.FunctionType(ir.VoidType(), [v.type for v in values]).as_pointer())
        builder.call(entry, values)
        return context.get_dummy_value()

    return types.void(*([types.int64] * 10)), codegen


@intrinsic
def call_set_threads(typingctx, function, n):
    """MKL_Set_Num_Threads_Local(n) at the address `function`; returns the setting before."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(I32, [I32])
        before = builder.call(builder.inttoptr(args[0], kind.as_pointer()), [builder.trunc(args[1], I32)])
        return builder.sext(before, I64)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c in fp32 with one rounding."""

    def codegen(context, builder, signature, args):
        return call_fma(builder, *args)

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def bits_of(typingctx, x):
    """The 32 bits of an fp32 number, as int32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], I32)

    return types.int32(types.float32), codegen


@intrinsic
def exp(typingctx, x):
    """exp(x) in fp32: see build_exp."""

    def codegen(context, builder, signature, args):
        return build_exp(builder, args[0])

    return types.float32(types.float32), codegen


def _lane_loop(builder: ir.IRBuilder, n: ir.Value, start: list[ir.Value], step: Any) -> list[ir.Value]:
    """Accumulators over i = 0, 16, 32, ... < n; step(index, accumulators) -> accumulators."""
    cells = [cgutils.alloca_once_value(builder, value) for value in start]
    count = builder.sdiv(builder.add(n, ir.Constant(I64, LANES - 1)), ir.Constant(I64, LANES))
    with cgutils.for_range(builder, count) as loop:
        index = builder.mul(loop.index, ir.Constant(I64, LANES))
        for cell, value in zip(cells, step(index, [builder.load(cell) for cell in cells]), strict=True):
            builder.store(value, cell)
    return [builder.load(cell) for cell in cells]


@intrinsic
def max_of(typingctx, address, n):
    """Greatest of n >= 1 fp32 at the address."""

    def codegen(context, builder, signature, args):
        def step(index, cells):
            return [_max(builder, load_part(builder, args[0], index, args[1], float("-inf")), cells[0])]

        return reduce(builder, _lane_loop(builder, args[1], [const(VEC, float("-inf"))], step)[0], _max)

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def dot(typingctx, a, b, n):
    """Sum of a[i] * b[i], i < n, by fma in 16 lanes, then the fixed tree."""

    def codegen(context, builder, signature, args):
        def step(index, cells):
            x, y = (load_part(builder, args[i], index, args[2], 0.0) for i in range(2))
            return [call_fma(builder, x, y, cells[0])]

        return reduce(builder, _lane_loop(builder, args[2], [const(VEC, 0.0)], step)[0], _add)

    return types.float32(types.int64, types.int64, types.int64), codegen


@intrinsic
def softmax_row(typingctx, address, n, top, padded):
    """In place x[i] = exp(x[i] - top) for i < n, 0 for n <= i < padded (a multiple of 16); returns the sum."""

    def codegen(context, builder, signature, args):
        address, n, top, padded = args
        top = splat(builder, top)

        def step(index, cells):
            x = load_part(builder, address, index, n, float("-inf"))
            e = build_exp(builder, builder.fsub(x, top))
            builder.store(e, pointer(builder, at(builder, address, index), VEC), align=4)
            return [builder.fadd(cells[0], e)]

        return reduce(builder, _lane_loop(builder, padded, [const(VEC, 0.0)], step)[0], _add)

    return types.float32(types.int64, types.int64, types.float32, types.int64), codegen


@intrinsic
def exp_sums(typingctx, address, n, temperature, top, out):
    """With y = x / temperature - top: out[0] = sum exp(y), out[1] = sum exp(y) y, over n (y exp(y) is 0 where exp(y) is 0)."""

    def codegen(context, builder, signature, args):
        address, n, temperature, top, out = args
        unit = builder.fcmp_ordered("==", temperature, const(F32, 1.0))
        temperature = splat(builder, temperature)
        top = splat(builder, top)

        def run(divide: bool) -> None:
            def step(index, cells):
                x = load_part(builder, address, index, n, float("-inf"))
                y = builder.fsub(builder.fdiv(x, temperature) if divide else x, top)
                e = build_exp(builder, y)
                safe = builder.select(builder.fcmp_ordered("==", e, const(VEC, 0.0)), const(VEC, 0.0), y)
                return [builder.fadd(cells[0], e), call_fma(builder, e, safe, cells[1])]

            total, moment = _lane_loop(builder, n, [const(VEC, 0.0), const(VEC, 0.0)], step)
            builder.store(reduce(builder, total, _add), pointer(builder, out, F32))
            builder.store(reduce(builder, moment, _add), pointer(builder, at(builder, out, ir.Constant(I64, 1)), F32))

        with builder.if_else(unit) as (then, otherwise):  # x / 1 is x: same bits, faster
            with then:
                run(False)
            with otherwise:
                run(True)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.float32, types.int64), codegen


def make_tile(rows: int, vectors: int) -> Any:
    """An intrinsic tile(a, a_row, a_k, b, b_k, c, c_row, k, accumulate) computing `rows` x 16 `vectors` elements of C = A B.

    Addresses in bytes, strides in elements: A[m, k] at a + m a_row + k a_k, B[k, n] at b + k b_k + n, C[m, n] at c + m c_row + n.
    Each element is one chain c = fma(A[m, k], B[k, n], c) over k = 0, 1, ...: the same bits whatever tile it falls in.
    """

    @intrinsic
    def tile(typingctx, a, a_row, a_k, b, b_k, c, c_row, k, accumulate):
        def codegen(context, builder, signature, args):
            a, a_row, a_k, b, b_k, c, c_row, k, accumulate = args
            spots = [
                at(builder, c, builder.add(builder.mul(c_row, ir.Constant(I64, m)), ir.Constant(I64, LANES * v)))
                for m in range(rows)
                for v in range(vectors)
            ]
            cells = [cgutils.alloca_once_value(builder, const(VEC, 0.0)) for _ in spots]
            for cell in cells:
                builder.store(const(VEC, 0.0), cell)
            with builder.if_then(builder.icmp_signed("!=", accumulate, ir.Constant(I64, 0))):
                for cell, spot in zip(cells, spots, strict=True):
                    builder.store(load_vector(builder, spot), cell)
            with cgutils.for_range(builder, k) as loop:
                line = at(builder, b, builder.mul(loop.index, b_k))
                right = [load_vector(builder, builder.add(line, ir.Constant(I64, 4 * LANES * v))) for v in range(vectors)]
                for m in range(rows):
                    offset = builder.add(builder.mul(a_row, ir.Constant(I64, m)), builder.mul(loop.index, a_k))
                    left = splat(builder, builder.load(pointer(builder, at(builder, a, offset), F32)))
                    for v in range(vectors):
                        cell = cells[m * vectors + v]
                        builder.store(call_fma(builder, left, right[v], builder.load(cell)), cell)
            for cell, spot in zip(cells, spots, strict=True):
                builder.store(builder.load(cell), pointer(builder, spot, VEC), align=4)
            return context.get_dummy_value()

        return types.void(*([types.int64] * 9)), codegen

    return tile
