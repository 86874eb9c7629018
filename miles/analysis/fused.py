"""One pass over a chunk: the innermost loop of each sequence, and from its terms every slice, drift, first divergence and the worst tokens."""

from __future__ import annotations

import math

import numpy as np

from miles.analysis.compiled import kernel
from miles.analysis.lanes import add_row, add_sum, add_token, make_sums, sum_rows
from miles.analysis.slices import BASE, ENTROPIES, MISSES, PROBABILITIES, VERSIONS
from miles.analysis.terms import BINS, COUNTS, HUGE, LIMIT, RING, SEQUENCE_SUMS, SUB_BINS, SUMS, TAUS, TERM_ROW, VALUES, WIDE

core_sums = make_sums(terms=False, every=False)
all_sums = make_sums(terms=True, every=True)

WAYS = len(VALUES)
POSITION, PROBABILITY, ENTROPY, TURN = BASE["position"], BASE["rollout_probability"], BASE["entropy"], BASE["turn"]
SPECULATIVE, MISS, SIGNS, USED = (BASE[name] for name in ("speculative", "layers_routed_differently", "reward_and_advantage", "used"))
WAIT = 4  # columns of a slot that neighbouring tokens take in turn: an addition need not wait for the one before
SCRATCH = (BINS + 1) * SUB_BINS  # u32 counters of the histogram, one bin past the last for the ring's beginning


@kernel
def core(mu, o, mask, mu_start, o_start, length, sums, counts, histogram):
    """Sums f64 [len(SUMS)] (rows of CORE), counts i64 [len(COUNTS)] and histogram i64 [BINS] of some sequences are added to; returns the greatest |d|.

    mu f32, mask u8: sequence i begins at mu_start[i]; o f32: at o_start[i]; length[i] tokens.
    """
    lanes, tally, scratch, ring, padded, _, _ = _working()
    greatest = 0.0
    here = np.zeros(len(SUMS))
    for i in range(len(length)):
        a, b, n = mu_start[i], o_start[i], length[i]
        body = n - n % WIDE
        lanes[:] = 0.0
        top = core_sums(_at4(mu, a), _at4(o, b), _at1(mask, a), body, _of(lanes), _of(tally), _of(scratch), _of(ring), 0, 0)
        if body < n:
            _pad(padded, mu, o, mask, a + body, b + body, n - body)
            at = _of(padded)
            top = max(top, core_sums(at, at + 4 * WIDE, at + 8 * WIDE, WIDE, _of(lanes), _of(tally), _of(scratch), _of(ring), 0, 0))
        _reduce(lanes, here)
        sums += here
        greatest = max(greatest, top)
        if i & 0xFFFF == 0xFFFF:
            _flush(scratch, histogram)
    _finish(tally, scratch, ring, counts, histogram)
    return greatest


@kernel
def scan(
    mu, mask, flags, token, o, entropy, advantage, used, miss, mu_start, o_start, length, prompt, reward_sign, identity, order,
    run_first, run_start, run_slot, sequence_slots, sums, counts, odd, histogram, table, sequence_table, token_table, touched,
    sequence_sums, sequence_histogram, divergence, bootstrap, worst, worst_at,
):  # fmt: skip
    """All there is of some sequences; everything from `sums` on is added to. Returns the greatest |d|.

    Of shards: mu f32, mask u8, flags u8, token i32, sequence i from mu_start[i]; of train records: o, entropy, advantage f32, used,
    miss u8, from o_start[i]; arrays that weren't recorded have no elements. Of sequences [S]: length, prompt tokens, reward_sign
    (0 to 3), identity (a hash, for the bootstrap), order (breaks ties among worst tokens). Runs of one weight version: those of
    sequence i are run_first[i] to run_first[i + 1], each with its start (tokens) and slot. sequence_slots i64 [K, S] rows of
    sequence_table f64 [., 8]. token_table f64 [V, 4], touched u8 [V]: 1 where it was added to. odd i64 [4]: NaN and infinite log-probs of the rollout, then of the trainer, under the mask.
    """
    lanes, tally, scratch, ring, padded, rows, probable = _working()
    greatest = 0.0
    here, before = np.zeros(len(SUMS)), np.zeros(len(COUNTS), np.int64)
    value = np.zeros(WAYS)
    found = np.zeros(len(TAUS), np.int64)
    kinds = len(sequence_slots)
    code, probability_bin, entropy_bin = np.zeros(TERM_ROW, np.uint8), np.zeros(TERM_ROW, np.uint8), np.zeros(TERM_ROW, np.uint8)
    segment, hot = np.zeros((3, WAYS)), np.zeros((WAIT * (PROBABILITIES + ENTROPIES + MISSES), WAYS))
    for i in range(len(length)):
        a, b, n = mu_start[i], o_start[i], length[i]
        lanes[:] = 0.0
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
            top = all_sums(_at4(mu, at), _at4(o, bt), _at1(mask, at), body, _of(lanes), _of(tally), _of(scratch), _of(ring), _of(rows), _of(probable))
            if body < size:
                _pad(padded, mu, o, mask, at + body, bt + body, size - body)
                p = _of(padded)
                more, chance = _of(rows) + 4 * WAYS * body, _at4(probable, body)
                tail = all_sums(p, p + 4 * WIDE, p + 8 * WIDE, WIDE, _of(lanes), _of(tally), _of(scratch), _of(ring), more, chance)
                top = max(top, tail)
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
            _codes(code, flags, used, advantage, at, bt, size)
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
                alike = code[j]
                if alike & 2:
                    turn = place
                since = place - turn
                if since < 8:
                    stop = min(stop, j + 1 if since == 0 else turn + 8 - start)
                end = j + 1
                while end < stop and code[end] == alike:
                    end += 1
                sum_rows(_of(rows) + 4 * WAYS * j, end - j, j, _of(segment))
                j = end
                if segment[0, 0] == 0.0:
                    continue
                t, g = _of(table), _of(segment)
                add_sum(t, POSITION + bucket, g)
                add_sum(t, TURN + (0 if since == 0 else 1 if since < 8 else 2), g)
                add_sum(t, SPECULATIVE + (2 if alike & 16 else 1 if alike & 8 else 0), g)
                if len(advantage):
                    add_sum(t, SIGNS + 4 * reward_sign[i] + (alike >> 5), g)
                if len(used):
                    add_sum(t, USED + (alike & 1), g)
                if slot >= 0:
                    add_sum(t, VERSIONS + slot, g)
                base = np.float64(start - prompt[i])
                line += segment[1, 0] + base * segment[0, 0]
                square += segment[2, 0] + 2 * base * segment[1, 0] + base * base * segment[0, 0]
                product += segment[1, 2] + base * segment[0, 2]
            _bins(probability_bin, entropy_bin, probable, entropy, bt, size)
            first, chances, spreads = _of(rows), _of(hot), _of(hot) + 8 * WAYS * WAIT * PROBABILITIES
            for j in range(size):
                row, column = first + 4 * WAYS * j, j % WAIT
                add_row(chances, WAIT * np.int64(probability_bin[j]) + column, row)
                add_row(spreads, WAIT * np.int64(entropy_bin[j]) + column, row)
            if len(miss):
                missed = spreads + 8 * WAYS * WAIT * ENTROPIES
                for j in range(size):
                    add_row(missed, WAIT * min(int(miss[bt + j]), MISSES - 1) + j % WAIT, first + 4 * WAYS * j)
            if len(token_table):
                for j in range(size):
                    name = np.int64(token[at + j])
                    if name < 0 or name >= len(token_table):
                        continue
                    touched[name] = 1
                    add_token(_of(token_table), name, first + 4 * WAYS * j)
        _reduce(lanes, here)
        sums += here
        count = tally[1] - before[1]
        if tally[0] - before[0] != count:
            _classify(mu, o, mask, a, b, n, odd)
        for k in range(6):
            value[1 + k] = here[k]
        value[0], value[7] = count, tally[2] - before[2]
        for k in range(kinds):
            for w in range(WAYS):
                sequence_table[sequence_slots[k, i], w] += value[w]
        if count:
            _sequence(here, count, line, square, product, sequence_sums, sequence_histogram)
            for k in range(len(TAUS)):
                divergence[k, 0 if found[k] < 0 else 1 + _bucket(found[k])[0]] += 1
            _resample(identity[i], value, bootstrap)
        if i & 0xFFFF == 0xFFFF:
            _flush(scratch, histogram)
    _finish(tally, scratch, ring, counts, histogram)
    bases = (PROBABILITY, ENTROPY, MISS)
    row = 0
    for k, slots in enumerate((PROBABILITIES, ENTROPIES if len(entropy) else 0, MISSES if len(miss) else 0)):
        for bin in range(slots):
            for column in range(WAIT):
                for w in range(WAYS):
                    table[bases[k] + bin, w] += hot[row + WAIT * bin + column, w]
        row += WAIT * slots
    return greatest


@kernel
def _codes(code, flags, used, advantage, at, bt, size):
    """What neighbours must share to be added up together: bit 0 trained on, 1 first of a turn, 3 and 4 of the flags, 5 and 6 sign of the advantage."""
    for j in range(size):
        code[j] = flags[at + j] & 0x1A
    if len(used):
        for j in range(size):
            code[j] |= np.uint8(used[bt + j] != 0)
    if len(advantage):
        for j in range(size):
            value = advantage[bt + j]
            code[j] |= np.uint8(32 * (np.uint8(value >= 0) + np.uint8(value > 0) + 3 * np.uint8(value != value)))


@kernel
def _bins(probability_bin, entropy_bin, probable, entropy, bt, size):
    """Slots of e^mu and of the entropy."""
    for j in range(size):
        probability_bin[j] = np.uint8(min(max(probable[j] * np.float32(PROBABILITIES), np.float32(0.0)), np.float32(PROBABILITIES - 1)))
    for j in range(size if len(entropy) else 0):
        value = entropy[bt + j]
        known = min(max(value * np.float32(4.0), np.float32(0.0)), np.float32(ENTROPIES - 2)) if value == value else np.float32(ENTROPIES - 1)
        entropy_bin[j] = np.uint8(known)


@kernel
def _of(array):
    return array.ctypes.data


@kernel
def _at4(array, index):
    return array.ctypes.data + 4 * index


@kernel
def _at1(array, index):
    return array.ctypes.data + index


@kernel
def _working():
    """Zeroed: lanes, counts and turns, bins, the ring (its bins one past the last), a padded turn, rows of terms, e^mu."""
    ring = np.full(RING * WIDE, BINS * SUB_BINS, np.int32)
    lanes, tally = np.zeros((len(SUMS), WIDE)), np.zeros(len(COUNTS) + 1, np.int64)
    padded, rows, probable = np.zeros(3 * WIDE, np.float32), np.zeros(TERM_ROW * WAYS, np.float32), np.zeros(TERM_ROW, np.float32)
    return lanes, tally, np.zeros(SCRATCH, np.uint32), ring, padded, rows, probable


@kernel
def _pad(padded, mu, o, mask, a, b, n):
    """The last n < 16 tokens as a whole turn: mu, then o, then the mask in bytes; the rest does not count."""
    padded[:] = 0.0
    under = padded[2 * WIDE :].view(np.uint8)
    for i in range(n):
        padded[i] = mu[a + i]
        padded[WIDE + i] = o[b + i]
        under[i] = mask[a + i]


@kernel
def _reduce(lanes, out):
    """Lanes to sums, in a fixed tree: i with i + 8, then + 4, + 2, + 1."""
    for k in range(len(lanes)):
        width = WIDE // 2
        while width:
            for i in range(width):
                lanes[k, i] += lanes[k, i + width]
            width //= 2
        out[k] = lanes[k, 0]


@kernel
def _flush(scratch, histogram):
    """32-bit counters to 64 bits, before they could overflow."""
    for i in range(BINS):
        for k in range(SUB_BINS):
            histogram[i] += scratch[SUB_BINS * i + k]
            scratch[SUB_BINS * i + k] = 0


@kernel
def _finish(tally, scratch, ring, counts, histogram):
    """Count what waits in the ring; take the tokens that don't count out of bin 0."""
    for which in ring:
        scratch[which] += 1
    _flush(scratch, histogram)
    for k in range(len(COUNTS)):
        counts[k] += tally[k]
    histogram[0] -= tally[3] * WIDE - tally[1]


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
def _classify(mu, o, mask, a, b, n, odd):
    """Log-probs under the mask that can't be compared, by kind."""
    for i in range(n):
        if mask[a + i]:
            u, v = mu[a + i], o[b + i]
            if u != u:
                odd[0] += 1
            elif abs(u) > HUGE:
                odd[1] += 1
            if v != v:
                odd[2] += 1
            elif abs(v) > HUGE:
                odd[3] += 1


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


@kernel
def _mix(z):
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@kernel
def _resample(identity, value, bootstrap):
    """Each replicate takes the sequence 0, 1, 2, ... times (Poisson of mean 1), by a hash of the sequence and the replicate."""
    for k in range(len(bootstrap)):
        u = (_mix(identity + np.uint64(k + 1) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(11)) * 2.0**-53
        term = math.exp(-1.0)
        reach, times = term, 0
        while u >= reach and times < 12:
            times += 1
            term /= times
            reach += term
        if times:
            for w in range(WAYS):
                bootstrap[k, w] += times * value[w]
