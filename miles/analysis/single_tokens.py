"""Single tokens of a piece, where one by one is fast enough: those at the end of a sequence, of pieces not all of whose tokens count, and the few that matter by themselves."""

from __future__ import annotations

import numpy as np

from miles.analysis.compiled import kernel
from miles.analysis.terms import HUGE, ROW_UNIT, TOKEN_VALUES, VALUES, WIDE

TOKEN_UNITS = tuple(ROW_UNIT[name] for name in TOKEN_VALUES)
LAST = 6  # cache lines of an end: mu, o, mask, entropy, miss, token


@kernel
def any_set(mask):
    """Whether any is set."""
    found = np.uint8(0)
    for value in mask:
        found |= value
    return found != 0


@kernel
def end_of(last, mu, o, mask, entropy, miss, token, a, b, n):
    """The last n < 16 tokens as a whole turn, 64 bytes of each array; the rest does not count."""
    last[:] = 0.0
    floats, whole, under = last.reshape(-1).view(np.float32), last.reshape(-1).view(np.int32), last.reshape(-1).view(np.uint8)
    for i in range(n):
        floats[i], floats[WIDE + i], under[128 + i], whole[80 + i] = mu[a + i], o[b + i], mask[a + i], token[a + i]
        if len(entropy):
            floats[48 + i] = entropy[b + i]
        if len(miss):
            under[256 + i] = miss[b + i]


@kernel
def size_of(mu, o, mask, a, b):
    """|d| of a token, 0 where it does not count."""
    return abs(o[b] - mu[a]) if mask[a] and abs(mu[a]) <= HUGE and abs(o[b]) <= HUGE else np.float32(0.0)


@kernel
def places_of(mu, o, mask, a, b, n, all_count, all_finite):
    """Sum of the places in a piece of tokens that count, and of their squares."""
    if all_count:
        return np.int32((n - 1) * n // 2), np.int32((n - 1) * n * (2 * n - 1) // 6)
    places, squares = np.int32(0), np.int32(0)
    if all_finite:
        for i in range(n):
            place = np.int32(i) if mask[a + i] else np.int32(0)
            places += place
            squares += place * place
    else:
        for i in range(n):
            place = np.int32(i) if mask[a + i] and abs(mu[a + i]) <= HUGE and abs(o[b + i]) <= HUGE else np.int32(0)
            places += place
            squares += place * place
    return places, squares


@kernel
def add_tokens(token, rows, near, table, far_token, far, listed):
    """Add rows of terms to their token ids; tokens that are not near are listed. Returns how many are."""
    for j in range(len(token)):
        name = np.int64(token[j])
        if not 0 <= name < len(table):
            continue
        small = rows[j * len(VALUES) + 1] * np.float32(TOKEN_UNITS[1]) <= near
        for k in range(len(TOKEN_VALUES)):
            term = rows[j * len(VALUES) + k]
            if small:
                table[name, k] += np.int64(np.rint(term))
            else:
                far[listed, k] = term * TOKEN_UNITS[k]
        if not small:
            far_token[listed] = name
            listed += 1
    return listed
