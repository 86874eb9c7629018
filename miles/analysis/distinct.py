"""Which of a few distinct values each number is: a hash table, since sorting tens of thousands of sequences by each of their labels takes longer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from miles.analysis.compiled import kernel


def distinct(keys: NDArray[np.int64]) -> tuple[list[list[int]], NDArray[np.int64]]:
    """Of keys i64 [K, n] the distinct ones of each row, in the order met; and each one's place among those of all rows, i64 [K, n]."""
    first, place = np.empty(keys.size, np.int64), np.empty_like(keys)
    ends = np.empty(len(keys), np.int64)
    _distinct(keys, first, place, ends)
    starts = [0, *ends.tolist()]
    return [row[first[start:end]].tolist() for row, start, end in zip(keys, starts[:-1], starts[1:], strict=True)], place


@kernel
def _distinct(keys, first, place, ends):
    """first[p]: where the p-th distinct key was met first in its row; ends [K]: how many there are up to each row's end."""
    size = 2
    while size < 2 * keys.shape[1]:
        size *= 2
    met = np.empty(size, np.int64)
    count = 0
    for k in range(len(keys)):
        row, met[:] = keys[k], -1
        for i in range(len(row)):
            key = row[i]
            if i and key == row[i - 1]:
                place[k, i] = place[k, i - 1]
                continue
            at = np.int64((np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)) & (size - 1)
            while met[at] >= 0 and row[first[met[at]]] != key:
                at = (at + 1) & (size - 1)
            if met[at] < 0:
                met[at], first[count] = count, i
                count += 1
            place[k, i] = met[at]
        ends[k] = count
