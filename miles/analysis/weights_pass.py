"""A pass over a chunk for what corrections would do: ratios by the bins of corrections.py, by class of sequence; and p_train against p_rollout."""

from __future__ import annotations

import math

import numpy as np

from miles.analysis.compiled import kernel
from miles.analysis.corrections import DENSITY, HIGHS, LOWS, SAMPLED, TOKEN_COLUMNS, VETO_BINS, VETOES, WEIGHT_BINS, WIDTHS
from miles.analysis.lane_sum import LANES, lane_sum
from miles.analysis.terms import HUGE, LIMIT

SEGMENT = 512  # tokens at a time, in the first cache; what lies past the end of a sequence is 0, up to a multiple of LANES
NEAR = 0.095  # nats: a smaller |d| lies within all bounds of a token's weight
COLUMNS = len(TOKEN_COLUMNS)
HIGH, LOW, WIDTH = np.array(HIGHS), np.array(LOWS), np.array(WIDTHS)
HIGH32, LOW32 = HIGH.astype(np.float32), LOW.astype(np.float32)
VETO = np.log(np.array(VETOES))
# Loops below are simple on purpose, one array at a time: so the compiler makes vectors of them, with no sum whose order it could choose.


@kernel
def weigh(mu, mask, o, mu_start, o_start, length, classes, weights, density, values):
    """Added to: classes f64 [CLASSES, CLASS_COLUMNS], weights f64 [WEIGHT_BINS, 5] of sequences, density i64 [DENSITY, DENSITY] (rollout, train).
    Filled: values f64 [S, 3], of each sequence its tokens and their sums of d and |d|.

    mu f32, mask u8: sequence i begins at mu_start[i]; o f32: at o_start[i]; length[i] tokens. A token counts when its mask is on and both are finite.
    """
    rows, whole_which, place = np.zeros((6, SEGMENT), np.float32), np.zeros(SEGMENT, np.uint8), np.zeros(SEGMENT, np.int64)
    bins = np.zeros((WEIGHT_BINS, COLUMNS))
    for i in range(len(length)):
        a, b, n = mu_start[i], o_start[i], length[i]
        tokens, lost, lowest = np.int64(0), np.int64(0), np.uint32(0)
        total, absolute = 0.0, 0.0
        bins[:] = 0.0
        for start in range(0, n, SEGMENT):
            count = min(SEGMENT, n - start)
            at, bt = a + start, b + start
            room = (count + LANES - 1) // LANES * LANES
            d, t, near, size, scale, spare = rows[0, :room], rows[1, :room], rows[2, :room], rows[3, :room], rows[4, :room], rows[5, :room]
            which = whole_which[:room]
            some, gone = _differences(mu[at : at + count], mask[at : at + count], o[bt : bt + count], d)
            if not some:
                lost += gone
                continue
            d[count:] = np.float32(0.0)
            tokens, lost = tokens + some, lost + gone
            away = _sizes(d, size)
            lowest = max(lowest, _greatest(d.view(np.uint32)))
            total += lane_sum(d.ctypes.data, room)
            absolute += lane_sum(size.ctypes.data, room)
            _exponentials(d, t, scale, spare)
            _near(size, t, near)
            bins[0, 0] += some - away
            bins[0, 1] += lane_sum(near.ctypes.data, room)
            _squares(near, spare)
            bins[0, 2] += lane_sum(spare.ctypes.data, room)
            _absolutes(near, spare)
            bins[0, 3] += lane_sum(spare.ctypes.data, room)
            if away:
                _which(t, which)
                found = np.int64(0)
                for j in range(count):  # without a branch, which would often be guessed wrongly
                    place[found] = j
                    found += np.int64(size[j] > np.float32(NEAR))
                for k in range(found):
                    j = place[k]
                    one, way = np.float64(t[j]), np.int64(which[j])
                    bins[way, 0] += 1
                    bins[way, 1] += one
                    bins[way, 2] += one * one
                    bins[way, 3] += abs(one)
            for j in range(0, count, SAMPLED):
                u, v = mu[at + j], o[bt + j]
                if mask[at + j] and abs(u) <= np.float32(HUGE) and abs(v) <= np.float32(HUGE):
                    density[_cell(u), _cell(v)] += 1
        values[i, 0], values[i, 1], values[i, 2] = tokens, total, absolute
        if not tokens:
            continue
        mean = np.float64(min(max(total / tokens, -LIMIT), LIMIT))
        row = _mean_bin(math.expm1(mean)) * VETO_BINS + (_veto_bin(lowest) if not lost else VETO_BINS - 1)
        for k in range(WEIGHT_BINS):
            for c in range(COLUMNS):
                classes[row, COLUMNS * k + c] += bins[k, c]
        classes[row, COLUMNS * WEIGHT_BINS] += 1
        classes[row, COLUMNS * WEIGHT_BINS + 1] += tokens
        weight = math.exp(min(max(total, -LIMIT), LIMIT))
        bin, more = _bin(weight), weight - 1.0
        weights[bin, 0] += 1
        weights[bin, 1] += tokens
        weights[bin, 2] += more
        weights[bin, 3] += more * more
        weights[bin, 4] += abs(more)


@kernel
def _differences(mu, mask, o, d):
    """d of each token, 0 where it does not count. Returns how many count, and how many have a train probability of 0."""
    huge, zero = np.float32(HUGE), np.float32(0.0)
    some, gone = np.int32(0), np.int32(0)
    for j in range(len(mu)):
        known = (mask[j] != 0) & (abs(mu[j]) <= huge)
        counts = known & (abs(o[j]) <= huge)
        d[j] = o[j] - mu[j] if counts else zero
        some += np.int32(counts)
        gone += np.int32(known & (o[j] < -huge))
    return np.int64(some), np.int64(gone)


@kernel
def _sizes(d, size):
    """|d|; how many are not small."""
    away = np.int32(0)
    for j in range(len(d)):
        size[j] = abs(d[j])
        away += np.int32(abs(d[j]) > np.float32(NEAR))
    return np.int64(away)


@kernel
def _greatest(bits):
    """Of float32 as their bits: those of the least negative number, if there is one."""
    top = np.uint32(0)
    for j in range(len(bits)):
        top = max(top, bits[j])
    return top


@kernel
def _exponentials(d, t, scale, shifted):
    """t = e^c - 1 with c = d held to ±LIMIT: c = n ln2 + r, and the series of r; for n = 0 nothing cancels."""
    magic, limit = np.float32(12582912.0), np.float32(LIMIT)  # 1.5 * 2^23: adding it rounds to an integer, in the low bits
    for j in range(len(d)):
        c = min(max(d[j], -limit), limit)
        shifted[j] = c * np.float32(1.4426950408889634) + magic
    bits, powers = shifted.view(np.int32), scale.view(np.int32)
    for j in range(len(d)):
        powers[j] = (bits[j] << np.int32(23)) + np.int32(127 << 23)
    for j in range(len(d)):
        c = min(max(d[j], -limit), limit)
        n = shifted[j] - magic
        r = (c - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)
        tail = np.float32(1 / 120) + r * (np.float32(1 / 720) + r * np.float32(1 / 5040))
        grown = r + r * r * (np.float32(1 / 2) + r * (np.float32(1 / 6) + r * (np.float32(1 / 24) + r * tail)))
        t[j] = scale[j] * grown + (scale[j] - np.float32(1.0))


@kernel
def _near(size, t, near):
    for j in range(len(size)):
        near[j] = t[j] if size[j] <= np.float32(NEAR) else np.float32(0.0)


@kernel
def _squares(x, out):
    for j in range(len(x)):
        out[j] = x[j] * x[j]


@kernel
def _absolutes(x, out):
    for j in range(len(x)):
        out[j] = abs(x[j])


@kernel
def _which(t, which):
    """Bins of ratios 1 + t; bounds belong to the side of 1."""
    which[:] = 0
    for k in range(len(HIGH32)):
        high = HIGH32[k]
        for j in range(len(t)):
            which[j] += np.uint8(t[j] + np.float32(1.0) > high)
    for k in range(len(LOW32)):
        low, first = LOW32[k], np.uint8(len(HIGH32) if k == 0 else 0)
        for j in range(len(t)):
            under = np.uint8(t[j] + np.float32(1.0) < low)
            which[j] += under + under * first


@kernel
def _bin(weight):
    """Of a sequence's weight."""
    for k in range(len(HIGH) - 1, -1, -1):
        if weight > HIGH[k]:
            return 1 + k
    for k in range(len(LOW) - 1, -1, -1):
        if weight < LOW[k]:
            return 1 + len(HIGH) + k
    return 0


@kernel
def _mean_bin(more):
    """Of a geometric mean less 1."""
    for k in range(len(WIDTH) - 1, -1, -1):
        if more > WIDTH[k]:
            return 1 + k
        if more < -WIDTH[k]:
            return 1 + len(WIDTH) + k
    return 0


@kernel
def _veto_bin(lowest):
    """Of the bits of the least d."""
    one = np.empty(1, np.uint32)
    one[0] = lowest
    least = min(one.view(np.float32)[0], np.float32(0.0))
    for k in range(len(VETO) - 1, -1, -1):
        if least < VETO[k]:
            return 1 + k
    return 0


@kernel
def _cell(logprob):
    """A quarter of a nat below 0."""
    return np.int64(min(max(logprob * np.float32(-4.0), np.float32(0.0)), np.float32(DENSITY - 1)))
