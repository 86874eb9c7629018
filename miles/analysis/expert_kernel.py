"""Loops over recorded routes: of each layer and expert, how far the tokens are off whose route contains it."""

from __future__ import annotations

import numpy as np

from miles.analysis.compiled import kernel
from miles.analysis.terms import HUGE

# Sums over sequences, with n tokens that count in one and their Σ|d| a; capitals: all of the sequence, others: those whose route contains the expert.
BY_EXPERT = ("n", "a", "nn", "na", "aa", "nN", "nA", "aN", "aA")
WHOLE = ("sequences", "N", "A", "NN", "NA", "AA")


@kernel
def add_tokens(expert, mu, mask, o, table, latest, stamp):
    """table f64 [layers, experts, 2] += (1, |d|) of each token that counts, at every expert of its route, once.

    expert u8 or u16 [rows, layers, top_k]: row r is what the pass went through that gave token r its log-prob; mu, o f32, mask u8 [rows]: of those tokens.
    latest i64 [layers, experts]: the last token counted there, numbered from `stamp` on. Returns tokens, Σ|d|.
    """
    count, total = 0, 0.0
    rows, layers, each = expert.shape
    for r in range(rows):
        u, v = mu[r], o[r]
        if not (mask[r] and abs(u) <= HUGE and abs(v) <= HUGE):
            continue
        size = np.float64(abs(v - u))
        count += 1
        total += size
        stamp += 1
        for layer in range(layers):
            for k in range(each):
                e = expert[r, layer, k]
                if latest[layer, e] != stamp:
                    latest[layer, e] = stamp
                    table[layer, e, 0] += 1.0
                    table[layer, e, 1] += size
    return count, total


@kernel
def end_sequence(table, count, total, found, whole):
    """A sequence's table into found f64 [layers, experts, len(BY_EXPERT)] and whole f64 [len(WHOLE)]; the table is 0 then."""
    for layer in range(table.shape[0]):
        for e in range(table.shape[1]):
            n, a = table[layer, e, 0], table[layer, e, 1]
            if n:
                row = found[layer, e]
                row[0] += n
                row[1] += a
                row[2] += n * n
                row[3] += n * a
                row[4] += a * a
                row[5] += n * count
                row[6] += n * total
                row[7] += a * count
                row[8] += a * total
                table[layer, e, 0] = 0.0
                table[layer, e, 1] = 0.0
    whole[0] += 1
    whole[1] += count
    whole[2] += total
    whole[3] += count * count
    whole[4] += count * total
    whole[5] += total * total
