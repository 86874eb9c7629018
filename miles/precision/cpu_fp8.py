"""Compiled CPU kernel for FP8 weights in blocks: each code is looked up among the 256 values that it can have in its block."""

from __future__ import annotations

import numpy as np
from numba import carray

from miles.precision.compiled import kernel
from miles.precision.llvm import as_pointer, take


@kernel
def look_up(block):
    """out[i, j] = table[(first + i) // side, j // side, codes[i, j]]. A task is a row.

    args: codes u8 [N, K], table u16 [blocks from that of row `first`, ceil(K / side), 256], out u16 [N, K], N, K, first, side.
    """
    b = carray(block, 9)
    columns, first, side = b[6], b[7], b[8]
    blocks = (columns + side - 1) // side
    begin = first // side
    while True:
        row = take(b.ctypes.data)
        if row >= b[1]:
            break
        codes = carray(as_pointer(b[2] + row * columns), (columns,), np.uint8)
        out = carray(as_pointer(b[4] + row * columns * 2), (columns,), np.uint16)
        tables = carray(as_pointer(b[3] + ((first + row) // side - begin) * blocks * 512), (blocks, 256), np.uint16)
        for j in range(blocks):
            table = tables[j]
            for k in range(j * side, min(columns, (j + 1) * side)):
                out[k] = table[codes[k]]
