"""The totals of sequences in memory: no slices, as fast as memory is read or nearly so."""

from __future__ import annotations

import numpy as np

from miles.analysis.compiled import kernel
from miles.analysis.core_lanes import core_sums
from miles.analysis.counters import COUNTERS, ROOM, finish, flush
from miles.analysis.memory import at1, at4, of, pad, reduced
from miles.analysis.terms import CORE, CORE_RING, CORE_WIDE, COUNTS, WIDE

PIECE = ROOM // 2 // CORE_WIDE * CORE_WIDE  # tokens between two looks at whether the counters could overflow


@kernel
def core(mu, o, mask, mu_start, o_start, length, sums, counts, histogram):
    """Sums f64 [len(SUMS)] (rows of CORE), counts i64 [len(COUNTS)] and histogram i64 [BINS] of some sequences are added to; returns the greatest |d|.

    mu f32, mask u8: sequence i begins at mu_start[i]; o f32: at o_start[i]; length[i] tokens.
    """
    lanes, tally, padded = np.zeros((len(CORE), WIDE)), np.zeros(len(COUNTS) + 1, np.int64), np.zeros(3 * CORE_WIDE, np.float32)
    counters, ring = np.zeros(COUNTERS, np.uint16), np.zeros(CORE_RING * CORE_WIDE, np.uint16)
    greatest = np.float32(0.0)
    counted = CORE_WIDE
    for i in range(len(length)):
        a, b, n = mu_start[i], o_start[i], length[i]
        for start in range(0, n, PIECE):
            size = min(PIECE, n - start)
            if counted + size + CORE_WIDE > ROOM:
                flush(counters, histogram)
                counted = CORE_WIDE
            counted += size + CORE_WIDE
            at, bt, body = a + start, b + start, size - size % CORE_WIDE
            top = core_sums(at4(mu, at), at4(o, bt), at1(mask, at), body, of(lanes), of(tally), of(counters), of(ring))
            greatest = max(greatest, top)
            if body < size:
                pad(padded, CORE_WIDE, mu, o, mask, at + body, bt + body, size - body)
                p = of(padded)
                tail = core_sums(p, p + 4 * CORE_WIDE, p + 8 * CORE_WIDE, CORE_WIDE, of(lanes), of(tally), of(counters), of(ring))
                greatest = max(greatest, tail)
    found = np.zeros(len(CORE))
    reduced(lanes, found)
    sums[: len(CORE)] += found
    finish(tally, CORE_WIDE, counters, ring, counts, histogram)
    return greatest
