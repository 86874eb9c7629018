"""Compiled CPU kernels of a program: a fixed list of kernel calls that threads walk through together, without Python in between.

Threads don't wait for each other, only for tasks: a group of calls is done when every task is taken and everyone who entered has left.
A thread that the system took off its core between tasks holds nobody up; it finds the work done and catches up.
"""

from __future__ import annotations

from llvmlite import ir
from numba import carray, types

from miles.precision.compiled import f32, i64, kernel
from miles.precision.llvm import I32, I64, intrinsic, pointer, take

FIELDS = 5  # of a call: kernel, block, first call of the group that ends here (-1: the group goes on), entered, left
SPINS = 2000  # looks at a counter before the core is offered to others


@intrinsic
def call_kernel(typingctx, function, block):
    """Calls the C function void(int64 *) at an address."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [I64.as_pointer()])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [pointer(builder, args[1], I64)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def call_yield(typingctx, function):
    """Calls sched_yield, at an address."""

    def codegen(context, builder, signature, args):
        result = builder.call(builder.inttoptr(args[0], ir.FunctionType(I32, []).as_pointer()), [])
        return builder.sext(result, I64)

    return types.int64(types.int64), codegen


@intrinsic
def bump(typingctx, address):
    """Atomic add 1 to the int64 at an address, in one order for all threads."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", pointer(builder, args[0], I64), ir.Constant(I64, 1), "seq_cst")

    return types.int64(types.int64), codegen


@intrinsic
def look(typingctx, address):
    """The int64 at an address, in one order for all threads."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(pointer(builder, args[0], I64), "seq_cst", 8)

    return types.int64(types.int64), codegen


@kernel
def run_program(block):
    """args: table i64 [calls, FIELDS], calls, address of sched_yield. Every thread of the team runs this."""
    b = carray(block, 5)
    calls = b[3]
    table = i64(b[2], calls * FIELDS)
    for call in range(calls):
        at = call * FIELDS
        if look(table[at + 1]) < look(table[at + 1] + 8):
            bump(b[2] + (at + 3) * 8)
            call_kernel(table[at], table[at + 1])
            bump(b[2] + (at + 4) * 8)
        if table[at + 2] < 0:
            continue
        for other in range(table[at + 2], call + 1):
            spot = other * FIELDS
            spins = 0
            while True:
                taken = look(table[spot + 1]) >= look(table[spot + 1] + 8)
                left = look(b[2] + (spot + 4) * 8)  # before `entered`: equal counts then mean that nobody is inside
                entered = look(b[2] + (spot + 3) * 8)
                if taken and left == entered:
                    break
                spins += 1
                if spins > SPINS:
                    call_yield(b[4])


@kernel
def add_rows(block):
    """x[r] += y[r * stride] (stride 0: one row y for all). args: x [rows, n], y, rows, n, stride of y, rows a task."""
    b = carray(block, 8)
    rows, n, per = b[4], b[5], b[7]
    while True:
        task = take(b.ctypes.data)
        if task >= b[1]:
            break
        for row in range(task * per, min(rows, (task + 1) * per)):
            x = f32(b[2] + row * n * 4, n)
            y = f32(b[3] + row * b[6] * 4, n)
            for i in range(n):
                x[i] = x[i] + y[i]


@kernel
def plan_experts(block):
    """Sizes of the experts' calls, known once rows are sorted. One task.

    args: first i64 [E + 1], E, owner i64 [blocks] (out: expert of each block), then the blocks of the calls whose sizes it sets: product to
    gate and up, its panels, SiLU, product down, its panels; rows a matrix block, rows a task.
    """
    b = carray(block, 12)
    if take(b.ctypes.data) > 0:
        return
    experts = b[3]
    first = i64(b[2], experts + 1)
    blocks = first[experts]
    owner = i64(b[4], blocks)
    for e in range(experts):
        for at in range(first[e], first[e + 1]):
            owner[at] = e
    gate_up, silu, down = i64(b[5], 13), i64(b[7], 10), i64(b[8], 13)
    gate_up[1], gate_up[12] = blocks * b[6], blocks
    down[1], down[12] = blocks * b[9], blocks
    rows = blocks * b[10]
    silu[1], silu[5] = (rows + b[11] - 1) // b[11], rows
