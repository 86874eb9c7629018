"""One pass over a chunk: the innermost loop of each sequence, and from its terms every slice, drift, first divergence and the worst tokens."""

from __future__ import annotations

import math

import numpy as np

from miles.analysis.bootstrap import resample
from miles.analysis.compiled import kernel
from miles.analysis.counters import COUNTERS, ROOM, finish, flush
from miles.analysis.memory import at1, at4, of
from miles.analysis.memory import table as aligned
from miles.analysis.row_lanes import row_sums
from miles.analysis.segments import STATE, begin, bucket, codes, segments
from miles.analysis.single_tokens import LAST, add_tokens, any_set, end_of, places_of, size_of
from miles.analysis.slice_lanes import add_sum, gather, sum_rows
from miles.analysis.slices import BASE, ENTROPIES, MISSES, PROBABILITIES, VERSIONS
from miles.analysis.terms import (
    CORE,
    COUNTS,
    GATHER,
    HUGE,
    INFINITE,
    LIMIT,
    MOMENTS,
    REPLICATES,
    SEQUENCE_SUMS,
    SUMS,
    TAUS,
    TERM_ROW,
    VALUES,
    WIDE,
)
from miles.analysis.token_lanes import SIZE, WAIT

WAYS = len(VALUES)
POSITION, PROBABILITY, ENTROPY, TURN = BASE["position"], BASE["rollout_probability"], BASE["entropy"], BASE["turn"]
SPECULATIVE, MISS, SIGNS, USED = (BASE[name] for name in ("speculative", "layers_routed_differently", "reward_and_advantage", "used"))
HOT_SLOTS = PROBABILITIES + ENTROPIES + MISSES  # what is added to token by token, in this order


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
    found, tally, part = np.zeros(len(SUMS) + len(MOMENTS)), np.zeros(len(COUNTS) + 1, np.int64), np.zeros(len(SUMS) + len(MOMENTS))
    counters, waiting = np.zeros(COUNTERS, np.uint16), aligned(SIZE // 64, WAYS)
    rows, hot = aligned(TERM_ROW // 2, WAYS).reshape(-1).view(np.float32), aligned(WAIT * HOT_SLOTS // 2, WAYS).reshape(-1).view(np.float32)
    nowhere, last, by_token = aligned(1, WAYS), aligned(LAST, WAYS), aligned(HOT_SLOTS, WAYS)
    greatest = np.float32(0.0)
    listed, counted, held = 0, WIDE, 0
    here, before = np.zeros(len(SUMS)), np.zeros(len(COUNTS), np.int64)
    value, block, segment = np.zeros(WAYS), np.zeros(WAYS), np.zeros(WAYS)
    beyond = np.zeros(len(TAUS), np.int64)
    kinds = len(sequence_slots)
    code, odd_turns = np.zeros(TERM_ROW, np.uint8), np.zeros(TERM_ROW // WIDE, np.uint8)
    ends, slots, state = np.zeros(TERM_ROW, np.int64), np.zeros((TERM_ROW, 4), np.int64), np.zeros(len(STATE), np.int64)
    words, times = code.view(np.uint64), np.empty(REPLICATES)
    given = (found, tally, counters, waiting, hot, token_table[: len(token_table) if near > 0 else 0], nowhere)
    p, zero = at1(last, 0), np.int64(0)
    for i in range(len(length)):
        a, b, n = mu_start[i], o_start[i], length[i]
        here[:] = 0.0
        for k in range(len(COUNTS)):
            before[k] = tally[k]
        begin(state, run_first[i], run_first[i + 1])
        beyond[:] = -1
        line, square, product = 0.0, 0.0, 0.0  # sums of position, its square, and position times |d|
        for start in range(0, n, TERM_ROW):
            size = min(TERM_ROW, n - start)
            at, bt = a + start, b + start
            alike = codes(code, flags[at : at + size], _part(used, bt, size), _part(advantage, bt, size))
            runs = segments(code, words, size, alike, start, prompt[i], state, run_start, run_slot, ends, slots)
            if not any_set(mask[at : at + size]):
                continue
            if counted + size + 2 * WIDE > ROOM:
                flush(counters, histogram)
                counted = WIDE
            counted += size + WIDE
            if held + size > GATHER:
                _gather(hot, by_token)
                held = 0
            held += size
            tokens, same, missing, body = tally[1], tally[2], tally[0] - tally[1], size - size % WIDE
            keep = np.int64(runs > 1)
            part[:] = 0.0
            top = np.float32(0.0)
            if body:
                h = at4(entropy, bt) if len(entropy) else at4(last, 0)
                m = at1(miss, bt) if len(miss) else at1(last, 0)
                h_step, m_step = np.int64(len(entropy) > 0), np.int64(len(miss) > 0)
                ahead = (len(token) - at) // WIDE - 1
                top = _sums(at4(mu, at), at4(o, bt), at1(mask, at), h, h_step, m, m_step, at4(token, at), at1(flags, at), at1(used, bt), at4(advantage, bt), body, ahead, given, at4(rows, 0), keep, at1(odd_turns, 0))
                part[:] = found
            if body < size:
                end_of(last, mu, o, mask, entropy, miss, token, at + body, bt + body, size - body)
                tail = _sums(p, p + 64, p + 128, p + 192, zero + 1, p + 256, zero + 1, p + 320, p, p, p, zero + WIDE, zero, given, at4(rows, WAYS * body), keep, at1(odd_turns, body // WIDE))
                top = max(top, tail)
                part += found
                part[len(SUMS)] += body * found[1]
            count = tally[1] - tokens
            base = np.float64(start - prompt[i])
            places, squares = places_of(mu, o, mask, at, bt, size, count == size, tally[0] - tally[1] == missing)
            line += places + base * count
            square += squares + 2 * base * places + base * base * count
            product += part[len(SUMS)] + base * part[1]
            here += part[: len(SUMS)]
            block[0], block[1 : 1 + len(CORE)], block[-1] = count, part[: len(CORE)], tally[2] - same
            greatest = max(greatest, top)
            for k in range(len(TAUS)):
                if beyond[k] < 0 and top > TAUS[k]:
                    j = 0
                    while size_of(mu, o, mask, at + j, bt + j) <= TAUS[k]:
                        j += 1
                    beyond[k] = start + j - prompt[i]
            if top > 0.0 and top >= worst[-1]:
                for j in range(size):
                    d = size_of(mu, o, mask, at + j, bt + j)
                    if d >= worst[-1] and d > 0.0:
                        _insert(worst, worst_at, d, order[i], start + j, i)
            if count:
                j = 0
                for k in range(runs):
                    if runs > 1:
                        sum_rows(of(rows) + 4 * WAYS * j, ends[k] - j, of(segment))
                        j = ends[k]
                    else:
                        segment[:] = block
                    if segment[0] == 0.0:
                        continue
                    t, g, mark = of(table), of(segment), slots[k, 2]
                    add_sum(t, POSITION + slots[k, 0], g)
                    add_sum(t, TURN + slots[k, 1], g)
                    add_sum(t, SPECULATIVE + (2 if mark & 16 else 1 if mark & 8 else 0), g)
                    if len(advantage):
                        add_sum(t, SIGNS + 4 * reward_sign[i] + (mark >> 5), g)
                    if len(used):
                        add_sum(t, USED + (mark & 1), g)
                    if slots[k, 3] >= 0:
                        add_sum(t, VERSIONS + slots[k, 3], g)
            for turn in range((size + WIDE - 1) // WIDE):
                if odd_turns[turn]:
                    j = turn * WIDE
                    listed = add_tokens(token[at + j : at + min(j + WIDE, size)], rows[j * WAYS :], near, token_table, far_token, far, listed)
        if held:  # tokens that don't count push out what waits: what is added in fp32 depends on this sequence alone, not on its neighbours
            last[:] = 0.0
            _sums(p, p, p, p, zero, p, zero, p, p, p, p, zero + WIDE, zero, given, at4(rows, 0), zero, at1(odd_turns, 0))
            counted += WIDE
            _gather(hot, by_token)
            held = 0
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
                divergence[k, 0 if beyond[k] < 0 else 1 + bucket(beyond[k])[0]] += 1
            resample(identity[i], value, bootstrap, times)
    table[PROBABILITY : PROBABILITY + PROBABILITIES] += by_token[:PROBABILITIES]
    if len(entropy):
        table[ENTROPY : ENTROPY + ENTROPIES] += by_token[PROBABILITIES : PROBABILITIES + ENTROPIES]
    if len(miss):
        table[MISS : MISS + MISSES] += by_token[PROBABILITIES + ENTROPIES :]
    finish(tally, WIDE, counters, np.zeros(0, np.uint16), counts, histogram)
    return greatest, listed


@kernel
def _sums(mu, o, mask, entropy, entropy_step, miss, miss_step, token, flags, used, advantage, n, ahead, given, rows, keep, odd):
    """row_sums(), compiled once for all its uses."""
    found, tally, counters, waiting, hot, token_table, nowhere = given
    return row_sums(
        mu, o, mask, entropy, entropy_step, miss, miss_step, token, flags, used, advantage, n, ahead, of(found), of(tally), of(counters), of(waiting), of(hot),
        of(token_table), len(token_table), of(nowhere), rows, keep, odd,
    )  # fmt: skip


@kernel
def _gather(hot, table):
    """What was added in fp32 to `hot` into a table f64 [HOT_SLOTS, 8]; 0 then."""
    words = hot.view(np.uint32)
    for slot in range(HOT_SLOTS):
        filled = np.uint32(0)
        for column in range(WAIT):
            filled |= words[WAYS * (WAIT * slot + column)]
        if filled:
            gather(of(hot), slot, of(table), slot)


@kernel
def _part(array, start, size):
    """Of an array that may not be recorded."""
    return array[start : start + size] if len(array) else array


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
