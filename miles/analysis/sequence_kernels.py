"""Loops of the attribution over tokens: what one sequence says of each possible cause. Two calls a chunk: before and after the slopes are known."""

from __future__ import annotations

import math

import numpy as np

from miles.analysis.compiled import kernel
from miles.analysis.terms import HUGE, LIMIT

FAR = 3.0  # nats: beyond it a difference is another token's or another model's, not noise
HELD = 2.0  # nats: a difference counts no more than this in a regression
CLEAR = 1e-3  # of unit noise: tokens surer than that say nothing of the noise's size
FLOOR = 1e-13  # below the rounding of float32: so that equal bits have a logarithm
EARLY = 16  # tokens that count: the beginning of a response
BITS = 24  # of a float32's mantissa
LOWEST = -30  # exponent of two below which a log-prob's rounding is taken for that of this one
SQUARES = 4.0 ** np.arange(LOWEST, 129)  # of powers of two
TERMS = 4  # of a token: d, x, s and its unit noise, kept from the first look for the second

# Of a sequence, before the slopes are known. held: d within ±HELD; x: mu + entropy; s: log of the kept mass (0 where not recorded).
FIRST = (
    "tokens", "missing", "missing_tail", "d2", "far", "onset", "here", "next", "previous", "early_here", "early_next", "early_previous",
    "xx", "xs", "ss", "xd", "sd", "t", "d2_above", "noise", "kept", "ulp_rollout", "ulp_train",
    "x2d2", "s2d2",
)  # fmt: skip
# After: r = d without what the slopes explain; noise: Σ of the variance that logits with unit noise would give; log: Σ log(r² / noise) of clear tokens.
PART = ("tokens", "r2", "noise", "clear", "log")
PARTS = ("all", "early", "late", "routed_alike", "routed_otherwise", "after_another_route")


@kernel
def unit_noise(mu, entropy):
    """Variance of d where every logit has independent noise of variance 1: (1-p)² + Σ q², the others' q estimated from the entropy."""
    p = min(math.exp(mu), 1 - 1e-7)
    rest = 1 - p
    spread = rest
    if entropy == entropy:
        own = -p * mu - rest * math.log(rest)
        spread = math.exp(-max(entropy - own, 0.0) / rest)
    return rest * rest * (1 + spread)


@kernel
def first_look(mu, mask, o, entropy, kept, mu_start, o_start, length, found, zeros, terms):
    """found f64 [S, len(FIRST)] is set, and terms f64 [tokens that count, TERMS]; zeros i64 [2, BITS] counts mantissas of mu and o by the
    zeros they end with. kept f16 or empty. Returns how many tokens count.
    """
    number = 0
    bits = np.empty(1, np.float32)
    for i in range(len(length)):
        row = found[i]
        row[:] = 0.0
        row[5] = -1
        last_mu = last_o = np.nan
        before = 0.0
        for j in range(length[i]):
            a, b = mu_start[i] + j, o_start[i] + j
            if not mask[a]:
                last_mu = np.nan
                continue
            u, v = mu[a], o[b]
            if not (abs(u) <= HUGE and abs(v) <= HUGE):
                row[1] += 1
                row[2] = row[2] + 1 if abs(u) <= HUGE else 0.0
                if last_mu == last_mu and abs(u) <= HUGE:
                    row[7] += min(abs(last_o - u), 1.0)
                    row[6] += before
                last_mu = np.nan
                continue
            row[2] = 0.0
            d = np.float64(v) - np.float64(u)
            here = min(abs(d), 1.0)
            if last_mu == last_mu:
                row[6] += before
                row[7] += min(abs(last_o - u), 1.0)
                row[8] += min(abs(v - last_mu), 1.0)
                if row[0] <= 8:
                    row[9] += before
                    row[10] += min(abs(last_o - u), 1.0)
                    row[11] += min(abs(v - last_mu), 1.0)
            last_mu, last_o, before = u, v, here
            if abs(d) > FAR:
                row[4] += 1
                if row[5] < 0:
                    row[5] = row[0]
            row[0] += 1
            size = min(d * d, 1e30)
            row[3] += size
            if d > 0:
                row[18] += size
            h = np.float64(entropy[b]) if len(entropy) else np.nan
            x = np.float64(u) + h if abs(h) <= HUGE else 0.0
            s = 0.0
            if len(kept):
                k = np.float64(kept[a])
                if k > 0:
                    s = math.log(min(k, 1.0))
                    row[20] += 1
            held = min(max(d, -HELD), HELD)
            row[12] += x * x
            row[13] += x * s
            row[14] += s * s
            row[15] += x * held
            row[16] += s * held
            row[23] += x * x * held * held
            row[24] += s * s * held * held
            row[17] += math.expm1(min(max(d, -LIMIT), LIMIT))
            g = unit_noise(u, h)
            row[19] += g
            terms[number, 0], terms[number, 1], terms[number, 2], terms[number, 3] = d, x, s, g
            number += 1
            for side in range(2):
                bits[0] = v if side else u
                whole = np.int64(bits.view(np.uint32)[0])
                power = max(int((whole >> 23) & 0xFF) - 127, LOWEST)
                row[21 + side] += SQUARES[power - LOWEST]
                if power >= -10:
                    fraction, count = whole & 0x7FFFFF, 0
                    while count < BITS - 1 and not (fraction >> count) & 1:
                        count += 1
                    zeros[side, count] += 1
    return number


@kernel
def second_look(mu, mask, o, miss, terms, mu_start, o_start, length, run_first, run_start, slopes, found, by_run):
    """found f64 [S, len(PARTS), len(PART)] and by_run f64 [V, len(PART)], by runs of one weight version, are set. miss u8 or empty; terms of first_look."""
    number = 0
    for i in range(len(length)):
        rows = found[i]
        rows[:] = 0.0
        seen, otherwise = 0, False
        run, last = run_first[i] - 1, run_first[i + 1]
        for j in range(length[i]):
            a, b = mu_start[i] + j, o_start[i] + j
            while run + 1 < last and run_start[run + 1] <= j:
                run += 1
            other = len(miss) > 0 and miss[b] > 0
            otherwise = otherwise or other
            if not (mask[a] and abs(mu[a]) <= HUGE and abs(o[b]) <= HUGE):
                continue
            r = terms[number, 0] - slopes[0] * terms[number, 1] - slopes[1] * terms[number, 2]
            g = terms[number, 3]
            number += 1
            r2 = min(r * r, 1e30)
            clear = g > CLEAR
            size = math.log(r2 / g + FLOOR) if clear else 0.0
            _add(rows[0], r2, g, clear, size)
            _add(rows[1 if seen < EARLY else 2], r2, g, clear, size)
            if len(miss):
                _add(rows[4 if other else 5 if otherwise else 3], r2, g, clear, size)
            if run >= run_first[i]:
                _add(by_run[run], r2, g, clear, size)
            seen += 1


@kernel
def _add(row, r2, g, clear, size):
    row[0] += 1
    row[1] += r2
    row[2] += g
    if clear:
        row[3] += 1
        row[4] += size
