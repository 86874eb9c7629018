"""Compiled CPU kernel for matrix products in fixed pieces, each one serial call of the BLAS that torch brings (MKL)."""

from __future__ import annotations

from numba import carray

from miles.precision.compiled import i64, kernel
from miles.precision.llvm import call_set_threads, call_sgemm, take


@kernel
def linear_blocks(block):
    """out[r] = x[r] weight[e].T for rows r of a block, e the block's expert; tasks: (panel of columns, block), blocks fastest.

    args: x [blocks rows, K], weight [E, N, K], out [blocks rows, N], expert of a block i64 [blocks] (0: all of weight[0]), rows a block, K, N,
    columns a panel, address of sgemm_, address of MKL_Set_Num_Threads_Local, number of blocks.
    """
    b = carray(block, 13)
    rows, k, n, panel, sgemm, blocks = b[6], b[7], b[8], b[9], b[10], b[12]
    before = call_set_threads(b[11], 1)  # of this thread alone: a product split over threads would add in another order
    while True:
        task = take(b.ctypes.data)
        if task >= b[1]:
            break
        column = task // blocks * panel
        at = task % blocks
        weight = b[3]
        if b[5] != 0:
            weight += i64(b[5], blocks)[at] * n * k * 4
        wide = min(panel, n - column)
        call_sgemm(sgemm, rows, wide, k, b[2] + at * rows * k * 4, k, weight + column * k * 4, k, b[4] + (at * rows * n + column) * 4, n)
    call_set_threads(b[11], before)
