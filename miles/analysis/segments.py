"""Runs of neighbouring tokens that share their slices by position, turn, flags, use, advantage and weight version: they are added up together."""

from __future__ import annotations

import numpy as np

from miles.analysis.compiled import kernel

# Of a sequence, from piece to piece: bucket of the position and where it ends, next run of one weight version and past the last one, slot of this run, where the turn began.
BUCKET, BUCKET_END, RUN, LAST_RUN, VERSION, BEGAN = STATE = tuple(range(6))


@kernel
def begin(state, first_run, last_run):
    """The state i64 [len(STATE)] at the beginning of a sequence."""
    state[BUCKET], state[BUCKET_END], state[RUN], state[LAST_RUN], state[VERSION], state[BEGAN] = 0, 0, first_run, last_run, -1, -(1 << 40)


@kernel
def codes(code, flags, used, advantage):
    """What neighbours must share to be added up together: bit 0 trained on, 1 first of a turn, 3 and 4 of the flags, 5 and 6 sign of the advantage.

    Returns whether all do.
    """
    for j in range(len(flags)):
        code[j] = flags[j] & 0x1A
    for j in range(len(used)):
        code[j] |= np.uint8(1 if used[j] else 0)
    for j in range(len(advantage)):
        value = advantage[j]
        code[j] |= np.uint8(64 if value > 0 else 32 if value == 0 else 0 if value < 0 else 96)
    other = np.uint8(0)
    for j in range(len(flags)):
        other |= code[j] ^ code[0]
    return other == 0


@kernel
def segments(code, words, size, alike, start, prompt, state, run_start, run_slot, ends, slots):
    """Runs of neighbours that share their slices: where each ends, and its bucket of the position, part of the turn, code, weight version. Returns how many."""
    j, found = 0, 0
    while j < size:
        place = start + j
        x = place - prompt
        if x >= state[BUCKET_END]:
            state[BUCKET], state[BUCKET_END] = bucket(x)
        while state[RUN] < state[LAST_RUN] and run_start[state[RUN]] <= place:
            state[VERSION] = run_slot[state[RUN]]
            state[RUN] += 1
        stop = min(size, state[BUCKET_END] + prompt - start)
        if state[RUN] < state[LAST_RUN]:
            stop = min(stop, run_start[state[RUN]] - start)
        mark = code[j]
        if mark & 2:
            state[BEGAN] = place
        since = place - state[BEGAN]
        if since < 8:
            stop = min(stop, j + 1 if since == 0 else state[BEGAN] + 8 - start)
        end = j + 1
        if alike:
            end = stop
        eight = np.uint64(mark) * np.uint64(0x0101010101010101)
        while end < stop and code[end] == mark:
            end += 1
            while end % 8 == 0 and end + 8 <= stop and words[end // 8] == eight:
                end += 8
        ends[found] = j = end
        slots[found, 0], slots[found, 1], slots[found, 2], slots[found, 3] = state[BUCKET], 0 if since == 0 else 1 if since < 8 else 2, mark, state[VERSION]
        found += 1
    return found


@kernel
def bucket(x):
    """(bucket of a position, first position beyond it); positions before the response count as its first."""
    if x < 8:
        x = max(x, 0)
        return x, x + 1
    bits = 0
    while x >> bits > 1:
        bits += 1
    return 5 + bits, np.int64(1) << (bits + 1)
