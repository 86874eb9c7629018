"""Addresses, aligned tables and padded ends: what the compiled loops need around the explicit vectors."""

from __future__ import annotations

import numpy as np

from miles.analysis.compiled import kernel
from miles.analysis.terms import WIDE


@kernel
def of(array):
    return array.ctypes.data


@kernel
def at4(array, index):
    return array.ctypes.data + 4 * index


@kernel
def at1(array, index):
    return array.ctypes.data + index


@kernel
def table(count, width):
    """f64 [count, width], zeros, at the beginning of a cache line: no row of 8 lies across two."""
    held = np.zeros(count * width + 8)
    skip = (-(held.ctypes.data // 8)) % 8
    return held[skip : skip + count * width].reshape(count, width)


@kernel
def pad(padded, wide, mu, o, mask, a, b, n):
    """The last n < `wide` tokens as a whole turn: mu, then o, then the mask in bytes; the rest does not count."""
    padded[:] = 0.0
    under = padded[2 * wide :].view(np.uint8)
    for i in range(n):
        padded[i] = mu[a + i]
        padded[wide + i] = o[b + i]
        under[i] = mask[a + i]


@kernel
def reduced(lanes, out):
    """Lanes to sums [rows wanted], in a fixed tree: i with i + 8, then + 4, + 2, + 1. The lanes are 0 then."""
    for k in range(len(out)):
        width = WIDE // 2
        while width:
            for i in range(width):
                lanes[k, i] += lanes[k, i + width]
            width //= 2
        out[k] = lanes[k, 0]
    lanes[:] = 0.0
