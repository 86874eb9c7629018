"""The histogram's counters of 16 bits: until they could overflow, and to 64 bits."""

from __future__ import annotations

import numpy as np

from miles.analysis.compiled import kernel
from miles.analysis.terms import BINS, COUNTS, SUB_BINS

COUNTERS = BINS * SUB_BINS
ROOM = 65535 * SUB_BINS  # tokens that are counted before one could overflow


@kernel
def flush(counters, histogram):
    """Add the counters u16 [BINS / 2 * SUB_BINS * 2], by size, column and sign, to the histogram i64 [BINS]; they are 0 then."""
    words = counters.view(np.uint64)
    for i in range(BINS // 2):
        if words[4 * i] | words[4 * i + 1] | words[4 * i + 2] | words[4 * i + 3]:  # most bins are empty
            for k in range(2 * SUB_BINS):
                histogram[i + (k & 1) * BINS // 2] += counters[2 * SUB_BINS * i + k]
                counters[2 * SUB_BINS * i + k] = 0


@kernel
def finish(tally, wide, counters, ring, counts, histogram):
    """Count what waits in the ring, u16 [turns, wide]; take out of bin 0 the tokens that don't count and the ring's beginning."""
    flush(counters, histogram)
    for place in ring:
        histogram[place // (2 * SUB_BINS) + (place & 1) * (BINS // 2)] += 1
    for k in range(len(COUNTS)):
        counts[k] += tally[k]
    histogram[0] -= tally[len(COUNTS)] * wide + len(ring) - tally[1]
