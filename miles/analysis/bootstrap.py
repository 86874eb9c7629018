"""The bootstrap over sequences: each replicate takes each of them 0, 1, 2, ... times (Poisson of mean 1), by a hash of the sequence and the replicate."""

from __future__ import annotations

import itertools
import math

import numpy as np

from miles.analysis.compiled import kernel
from miles.analysis.hashing import mix

MOST = 12  # times: one in 10^9 would be taken more often
# A hash of 53 bits takes a sequence as many times as there are entries that it reaches: the distribution's, of which 53 bits are all.
REACH = np.array([math.ceil(chance * 2.0**53) for chance in itertools.accumulate(itertools.accumulate(range(1, MOST), lambda term, n: term / n, initial=math.exp(-1.0)))], np.uint64)


@kernel
def resample(identity, value, bootstrap, times):
    """bootstrap f64 [len(value), replicates] += value f64 times how often each replicate takes the sequence of this hash; times f64 [replicates] is written over."""
    for k in range(len(times)):
        u = mix(identity + np.uint64(k + 1) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(11)
        taken = np.uint64(0)
        for reach in range(MOST):
            taken += np.uint64(u >= REACH[reach])
        times[k] = np.float64(taken)
    for w in range(len(value)):
        for k in range(len(times)):
            bootstrap[w, k] += times[k] * value[w]
