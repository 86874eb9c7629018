"""A hash of 64 bits: what is drawn by it depends on the data alone, never on who reads it."""

from __future__ import annotations

import numpy as np

from miles.analysis.compiled import kernel


@kernel
def mix(z):
    """A hash of a u64: splitmix64's finaliser (Steele, Lea, Flood 2014)."""
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
