"""One pass over a chunk: the innermost loop of each sequence, and from its terms every slice, drift, first divergence and the worst tokens."""

from __future__ import annotations

import math

import numpy as np

from miles.analysis.bootstrap import resample
from miles.analysis.compiled import kernel
from miles.analysis.counters import COUNTERS, ROOM, finish, flush
from miles.analysis.memory import at1, at4, of, pad, reduced
from miles.analysis.memory import table as aligned
from miles.analysis.row_lanes import row_sums
from miles.analysis.slice_lanes import STRIDE, WAIT, add_near, add_sum, gather, make_scatter, sum_rows, touch
from miles.analysis.slices import BASE, ENTROPIES, MISSES, PROBABILITIES, VERSIONS
from miles.analysis.terms import (
    CORE,
    COUNTS,
    HUGE,
    INFINITE,
    LIMIT,
    MOMENTS,
    REPLICATES,
    RING,
    SEQUENCE_SUMS,
    SUMS,
    TAUS,
    TERM_ROW,
    TOKEN_VALUES,
    VALUES,
    WIDE,
)

scatter1, scatter2, scatter3 = (make_scatter(kinds) for kinds in (1, 2, 3))

WAYS = len(VALUES)
POSITION, PROBABILITY, ENTROPY, TURN = BASE["position"], BASE["rollout_probability"], BASE["entropy"], BASE["turn"]
SPECULATIVE, MISS, SIGNS, USED = (BASE[name] for name in ("speculative", "layers_routed_differently", "reward_and_advantage", "used"))
NEAR_COLUMNS = tuple(VALUES.index(name) for name in TOKEN_VALUES)
HOT_SLOTS = PROBABILITIES + ENTROPIES + MISSES  # what is scattered token by token, in this order


@kernel
def scan(
    mu, mask, flags, token, o, entropy, advantage, used, miss, mu_start, o_start, length, prompt, reward_sign, identity, order,
    run_first, run_start, run_slot, sequence_slots, near, sums, counts, odd, histogram, table, sequence_table, token_table, far_token, far,
    sequence_sums, sequence_histogram, divergence, bootstrap, worst, worst_at,
):  # fmt: skip
    """All there is of some sequences; everything from `sums` on is added to. Returns the greatest |d|, and how many rows `far` has.

    Of shards: mu f32, mask u8, flags u8, token i32, sequence i from mu_start[i]; of train records: o, entropy, advantage f32, used,
    miss u8, from o_start[i]; arrays that weren't recorded have no elements. Of sequences [S]: length, prompt tokens, reward_sign
    (0 to 3), identity (a hash, for the bootstrap), order (breaks ties among worst tokens). Runs of one weight version: those of
    sequence i are run_first[i] to run_first[i + 1], each with its start (tokens) and slot. sequence_slots i64 [K, S] rows of
    sequence_table f64 [., 8]. bootstrap f64 [8, REPLICATES]. token_table i64 [V, 4] in units of NEAR_UNIT, of tokens with |d| <= near;
    the others are listed: far_token i64 [tokens], far f64 [tokens, 4]. odd i64 [6]: NaN, infinite and absurd log-probs of the rollout, then of the trainer, under the mask.
    """
    lanes, tally, padded = np.zeros((len(SUMS) + len(MOMENTS), WIDE)), np.zeros(len(COUNTS) + 1, np.int64), np.zeros(3 * WIDE, np.float32)
    counters, ring = np.zeros(COUNTERS, np.uint16), np.zeros(RING * WIDE, np.uint16)
    rows, probable = aligned(TERM_ROW // 2, WAYS).reshape(-1).view(np.float32), np.zeros(TERM_ROW, np.float32)
    greatest = np.float32(0.0)
    listed, counted = 0, WIDE
    here, part, before = np.zeros(len(SUMS)), np.zeros(len(SUMS) + len(MOMENTS)), np.zeros(len(COUNTS), np.int64)
    value = np.zeros(WAYS)
    found = np.zeros(len(TAUS), np.int64)
    kinds = len(sequence_slots)
    code, bins, segment = np.zeros(TERM_ROW, np.uint8), np.zeros((3, TERM_ROW), np.uint16), np.zeros(WAYS)
    block = np.zeros(WAYS)
    words, times = code.view(np.uint64), np.empty(REPLICATES)
    hot = aligned(WAIT * HOT_SLOTS // 2, WAYS).reshape(-1).view(np.float32)
    for i in range(len(length)):
        a, b, n = mu_start[i], o_start[i], length[i]
        here[:] = 0.0
        for k in range(len(COUNTS)):
            before[k] = tally[k]
        run, last_run = run_first[i], run_first[i + 1]
        slot = np.int64(-1)
        bucket, bucket_end = np.int64(0), np.int64(0)
        turn = -(1 << 40)
        found[:] = -1
        line, square, product = 0.0, 0.0, 0.0  # sums of position, its square, and position times |d|
        for start in range(0, n, TERM_ROW):
            size = min(TERM_ROW, n - start)
            body = size - size % WIDE
            at, bt = a + start, b + start
            if counted + size + WIDE > ROOM:
                flush(counters, histogram)
                counted = WIDE
            counted += size + WIDE
            if len(token_table):
                touch(at4(token, at), size, of(token_table), len(token_table))
            tokens, alike, base = tally[1], tally[2], np.float64(start - prompt[i])
            top = row_sums(at4(mu, at), at4(o, bt), at1(mask, at), body, of(lanes), of(tally), of(counters), of(ring), of(rows), of(probable))
            reduced(lanes, part)
            count = tally[1] - tokens
            line, square, product = _moments(part, count, base, line, square, product)
            here += part[: len(SUMS)]
            block[1 : 1 + len(CORE)] = part[: len(CORE)]
            if body < size:
                pad(padded, WIDE, mu, o, mask, at + body, bt + body, size - body)
                p = of(padded)
                more, chance = of(rows) + 4 * WAYS * body, at4(probable, body)
                tail = row_sums(p, p + 4 * WIDE, p + 8 * WIDE, WIDE, of(lanes), of(tally), of(counters), of(ring), more, chance)
                top = max(top, tail)
                reduced(lanes, part)
                line, square, product = _moments(part, tally[1] - tokens - count, base + body, line, square, product)
                here += part[: len(SUMS)]
                block[1 : 1 + len(CORE)] += part[: len(CORE)]
            block[0], block[-1] = tally[1] - tokens, tally[2] - alike
            greatest = max(greatest, top)
            for k in range(len(TAUS)):
                if found[k] < 0 and top > TAUS[k]:
                    for j in range(size):
                        if rows[j * WAYS + 2] > TAUS[k]:
                            found[k] = start + j - prompt[i]
                            break
            if top > 0.0 and top >= worst[-1]:
                for j in range(size):
                    if rows[j * WAYS + 2] >= worst[-1] and rows[j * WAYS + 2] > 0.0:
                        _insert(worst, worst_at, rows[j * WAYS + 2], order[i], start + j, i)
            _codes(code, flags[at : at + size], _part(used, bt, size), _part(advantage, bt, size))
            j = 0
            while j < size:
                place = start + j
                x = place - prompt[i]
                if x >= bucket_end:
                    bucket, bucket_end = _bucket(x)
                while run < last_run and run_start[run] <= place:
                    slot = run_slot[run]
                    run += 1
                stop = min(size, bucket_end + prompt[i] - start)
                if run < last_run:
                    stop = min(stop, run_start[run] - start)
                mark = code[j]
                if mark & 2:
                    turn = place
                since = place - turn
                if since < 8:
                    stop = min(stop, j + 1 if since == 0 else turn + 8 - start)
                end = j + 1
                eight = np.uint64(mark) * np.uint64(0x0101010101010101)
                while end < stop and code[end] == mark:
                    end += 1
                    while end % 8 == 0 and end + 8 <= stop and words[end // 8] == eight:
                        end += 8
                if end - j == size:
                    segment[:] = block
                else:
                    sum_rows(of(rows) + 4 * WAYS * j, end - j, of(segment))
                j = end
                if segment[0] == 0.0:
                    continue
                t, g = of(table), of(segment)
                add_sum(t, POSITION + bucket, g)
                add_sum(t, TURN + (0 if since == 0 else 1 if since < 8 else 2), g)
                add_sum(t, SPECULATIVE + (2 if mark & 16 else 1 if mark & 8 else 0), g)
                if len(advantage):
                    add_sum(t, SIGNS + 4 * reward_sign[i] + (mark >> 5), g)
                if len(used):
                    add_sum(t, USED + (mark & 1), g)
                if slot >= 0:
                    add_sum(t, VERSIONS + slot, g)
            if block[0] == 0.0:
                continue
            _scatter(rows, size, bins, hot, probable[:size], _part(entropy, bt, size), _part(miss, bt, size), table)
            if len(token_table):
                listed = _by_token(token[at : at + size], rows, top <= near, near, token_table, far_token, far, listed)
        sums += here
        count = tally[1] - before[1]
        if tally[0] - before[0] != count:
            _classify(mu, o, mask, a, b, n, odd)
        for k in range(6):
            value[1 + k] = here[k]
        value[0], value[7] = count, tally[2] - before[2]
        for k in range(kinds):
            add_sum(of(sequence_table), sequence_slots[k, i], of(value))
        if count:
            _sequence(here, count, line, square, product, sequence_sums, sequence_histogram)
            for k in range(len(TAUS)):
                divergence[k, 0 if found[k] < 0 else 1 + _bucket(found[k])[0]] += 1
            resample(identity[i], value, bootstrap, times)
    finish(tally, WIDE, counters, ring, counts, histogram)
    return greatest, listed


@kernel
def _moments(part, count, x, line, square, product):
    """Sums of position, its square, and position times |d|, with those of a row whose places count from x."""
    place, place2, place_abs = part[len(SUMS)], part[len(SUMS) + 1], part[len(SUMS) + 2]
    return line + place + x * count, square + place2 + 2 * x * place + x * x * count, product + place_abs + x * part[1]


@kernel
def _by_token(token, rows, all_near, near, table, far_token, far, listed):
    """Add a row of terms to its token ids; tokens that are not near are listed. Returns how many are."""
    first, size, names = of(rows), len(token), np.uint64(len(table))
    if all_near:
        for j in range(size):
            name = np.uint64(np.int64(token[j]))
            if name < names:  # no negative one is
                add_near(of(table), name, first + 4 * WAYS * j)
        return listed
    for j in range(size):
        name = np.uint64(np.int64(token[j]))
        if name >= names:
            continue
        if rows[j * WAYS + 2] <= near:
            add_near(of(table), name, first + 4 * WAYS * j)
        else:
            far_token[listed] = name
            for k, which in enumerate(NEAR_COLUMNS):
                far[listed, k] = rows[j * WAYS + which]
            listed += 1
    return listed


@kernel
def _codes(code, flags, used, advantage):
    """What neighbours must share to be added up together: bit 0 trained on, 1 first of a turn, 3 and 4 of the flags, 5 and 6 sign of the advantage."""
    for j in range(len(flags)):
        code[j] = flags[j] & 0x1A
    for j in range(len(used)):
        code[j] |= np.uint8(1 if used[j] else 0)
    for j in range(len(advantage)):
        value = advantage[j]
        code[j] |= np.uint8(64 if value > 0 else 32 if value == 0 else 0 if value < 0 else 96)


@kernel
def _scatter(rows, size, bins, hot, probable, entropy, miss, table):
    """Add a row of terms to the slices by e^mu, entropy and layers routed differently: in fp32 to `hot`, and that to the table, 0 then."""
    _probability_bins(probable, bins[0])
    kinds, last = 1, 0
    if len(entropy):
        _entropy_bins(entropy, bins[1])
        kinds = 2
    if len(miss):
        last = _miss_bins(miss, bins[kinds])
        kinds += 1
    if kinds == 3:
        scatter3(of(rows), size, of(bins), of(hot))
    elif kinds == 2:
        scatter2(of(rows), size, of(bins), of(hot))
    else:
        scatter1(of(rows), size, of(bins), of(hot))
    first, out = of(hot), of(table)
    for slot in range(PROBABILITIES):
        gather(first, slot, out, PROBABILITY + slot)
    for slot in range(ENTROPIES if len(entropy) else 0):
        gather(first, PROBABILITIES + slot, out, ENTROPY + slot)
    for slot in range(last + 1 if len(miss) else 0):
        gather(first, PROBABILITIES + ENTROPIES + slot, out, MISS + slot)


@kernel
def _probability_bins(probable, bins):
    """Slots of e^mu."""
    for j in range(len(probable)):
        slot = min(max(probable[j] * np.float32(PROBABILITIES), np.float32(0.0)), np.float32(PROBABILITIES - 1))
        bins[j] = np.uint16(np.int32(slot)) * np.uint16(STRIDE)


@kernel
def _entropy_bins(entropy, bins):
    """Slots of the entropy, behind those of e^mu."""
    for j in range(len(entropy)):
        value = entropy[j]
        known = min(max(value * np.float32(4.0), np.float32(0.0)), np.float32(ENTROPIES - 2)) if value == value else np.float32(ENTROPIES - 1)
        bins[j] = (np.uint16(np.int32(known)) + np.uint16(PROBABILITIES)) * np.uint16(STRIDE)


@kernel
def _miss_bins(miss, bins):
    """Slots of layers routed differently, behind those of the entropy; returns the last one, counted from 0."""
    for j in range(len(miss)):
        bins[j] = (min(np.uint16(miss[j]), np.uint16(MISSES - 1)) + np.uint16(PROBABILITIES + ENTROPIES)) * np.uint16(STRIDE)
    last = np.uint8(0)
    for j in range(len(miss)):
        last = max(last, miss[j])
    return min(np.int64(last), MISSES - 1)


@kernel
def _part(array, start, size):
    """Of an array that may not be recorded."""
    return array[start : start + size] if len(array) else array


@kernel
def _bucket(x):
    """(bucket of a position, first position beyond it); positions before the response count as its first."""
    if x < 8:
        x = max(x, 0)
        return x, x + 1
    bits = 0
    while x >> bits > 1:
        bits += 1
    return 5 + bits, np.int64(1) << (bits + 1)


@kernel
def classify(mu, o, mask, mu_start, o_start, length, odd):
    """odd i64 [6] of scan() is added to."""
    for i in range(len(length)):
        _classify(mu, o, mask, mu_start[i], o_start[i], length[i], odd)


@kernel
def _classify(mu, o, mask, a, b, n, odd):
    """Log-probs under the mask that can't be compared, by kind."""
    for i in range(n):
        if mask[a + i]:
            u, v = mu[a + i], o[b + i]
            for side, value in ((0, u), (3, v)):
                if value != value:
                    odd[side] += 1
                elif abs(value) > INFINITE:
                    odd[side + 1] += 1
                elif abs(value) > HUGE:
                    odd[side + 2] += 1


@kernel
def _signed_bin(x):
    value = np.empty(1, np.float32)
    value[0] = min(max(x, -1e30), 1e30)
    return value.view(np.uint32)[0] >> 19


@kernel
def _sequence(here, count, line, square, product, sums, histogram):
    """Statistics of one sequence with tokens that count, and their histograms."""
    total = here[0]
    held = min(max(total, -LIMIT), LIMIT)
    mean = total / count
    spread = square - line * line / count
    slope = (product - line * here[1] / count) / spread if spread > 0.25 else 0.0  # two neighbouring positions spread by 1/2
    values = (1.0, math.exp(held), math.exp(2 * held), math.exp(-min(max(mean, -LIMIT), LIMIT)), abs(mean), mean * mean, slope, abs(slope))
    for k in range(len(SEQUENCE_SUMS)):
        sums[k] += values[k]
    histogram[0, _signed_bin(total)] += 1
    histogram[1, _signed_bin(mean)] += 1
    histogram[2, _signed_bin(slope)] += 1


@kernel
def _insert(worst, worst_at, key, order, place, sequence):
    """Keep the greatest keys in falling order; equal ones by order and place. worst_at i64 [K, 3]: order, place, sequence."""
    last = len(worst) - 1
    if key == worst[last] and (order, place) > (worst_at[last, 0], worst_at[last, 1]):
        return
    k = last
    while k > 0 and (worst[k - 1] < key or (worst[k - 1] == key and (worst_at[k - 1, 0], worst_at[k - 1, 1]) > (order, place))):
        worst[k] = worst[k - 1]
        worst_at[k] = worst_at[k - 1]
        k -= 1
    worst[k] = key
    worst_at[k, 0], worst_at[k, 1], worst_at[k, 2] = order, place, sequence
