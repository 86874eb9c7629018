"""The totals of sequences in memory: no slices, as fast as memory is read or nearly so."""

from __future__ import annotations

import numpy as np

from miles.analysis.compiled import kernel
from miles.analysis.core_lanes import NEAR_ROWS, core_sums
from miles.analysis.counters import COUNTERS, ROOM, finish, flush
from miles.analysis.memory import at1, at4, of, pad, reduced, table
from miles.analysis.terms import CORE, CORE_RING, CORE_WIDE, COUNTS, WIDE

# (e^d - 1 - d) / d^2 and (e^d - 1)^2 / d^2 for |d| <= NEAR by powers of d: their value at 0, and from there interpolated at Chebyshev's
# nodes; within 1e-9 and 1.2e-7 of themselves.
K3_SERIES = (0.5, 1 / 6, 0.04166663636499816, 0.008333329967012703, 0.0013908278590718753, 0.00019862811233089611)
T2_SERIES = (1.0, 1.0, 0.5833256164781598, 0.2499982794993621, 0.08660464523232549, 0.02511004934671932)
PIECE = ROOM // 2 // CORE_WIDE * CORE_WIDE  # tokens between two looks at whether the counters could overflow


@kernel
def core(mu, o, mask, mu_start, o_start, length, sums, counts, histogram):
    """Sums f64 [len(SUMS)] (rows of CORE), counts i64 [len(COUNTS)] and histogram i64 [BINS] of some sequences are added to; returns the greatest |d|.

    mu f32, mask u8: sequence i begins at mu_start[i]; o f32: at o_start[i]; length[i] tokens.
    """
    lanes, tally, padded = table(len(CORE) + len(NEAR_ROWS), WIDE), np.zeros(len(COUNTS) + 1, np.int64), np.zeros(3 * CORE_WIDE, np.float32)
    counters, ring = table(COUNTERS // 4, 1).reshape(-1).view(np.uint16), table(CORE_RING * CORE_WIDE // 4, 1).reshape(-1).view(np.uint16)
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
    found = np.zeros(len(CORE) + len(NEAR_ROWS))
    reduced(lanes, found)
    _add_near(found)
    sums[: len(CORE)] += found[: len(CORE)]
    finish(tally, CORE_WIDE, counters, ring, counts, histogram)
    return greatest


@kernel
def _add_near(found):
    """To the sums of CORE add those that follow from the sums of d, |d|, d^2, ..., d^7 behind them, of tokens with a small d."""
    first, absolute, power = found[len(CORE)], found[len(CORE) + 1], found[len(CORE) + 2 :]
    k3, t2 = 0.0, 0.0
    for k in range(len(power)):
        k3 += K3_SERIES[k] * power[k]
        t2 += T2_SERIES[k] * power[k]
    found[0] += first
    found[1] += absolute
    found[2] += power[0]
    found[3] += k3
    found[4] += first + k3
    found[5] += t2
