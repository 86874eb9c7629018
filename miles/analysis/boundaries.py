"""Tokens beside a boundary of the loss mask: the first ones after a prompt, a tool's output or other text that was given, the last ones before it."""

from __future__ import annotations

import math

import numpy as np

from miles.analysis.compiled import kernel
from miles.analysis.load import Loaded, numbers_of
from miles.analysis.slices import BESIDE, BOUNDARY_SLICES
from miles.analysis.state import State
from miles.analysis.terms import HUGE, LIMIT, VALUES
from miles.data.sample import Flag

TOOL, GENERATED = np.uint8(Flag.TOOL_OUTPUT), np.uint8(Flag.GENERATED)
ALL_ON = np.uint64(0x0101010101010101)
KINDS = tuple(BOUNDARY_SLICES.values())
AFTER = 2 * len(KINDS[0])  # slots of the first slice, each kind with the nearest token and the others; then those of the second


def add_boundaries(state: State, loaded: Loaded) -> None:
    """Add a chunk's tokens that lie at most BESIDE from where the loss mask turns on or off; the others are in none of these slices."""
    columns = loaded.columns
    table = np.zeros((AFTER + 2 * len(KINDS[1]), len(VALUES)))
    near_boundaries(
        columns["rollout_logprob"], columns["loss_mask"], columns["flags"], columns["train_logprob"], loaded.shard_start, loaded.train_start, loaded.length,
        numbers_of(loaded, "prompt_length"), table,
    )  # fmt: skip
    first, second = BOUNDARY_SLICES
    filled = np.flatnonzero(table[:, 0]).tolist()
    state.slices.add([(first, slot) if slot < AFTER else (second, slot - AFTER) for slot in filled], table[filled])


@kernel
def near_boundaries(mu, mask, flags, o, mu_start, o_start, length, prompt, table):
    """table f64 [slots, len(VALUES)] is added to. mu f32, mask and flags u8: sequence i begins at mu_start[i]; o f32: at o_start[i]; length, prompt tokens.

    A span is a run of tokens under the mask; a span shorter than both sides has tokens in both slices.
    """
    words = mask[: len(mask) // 8 * 8].view(np.uint64)
    for i in range(len(length)):
        first, past, shift = mu_start[i], mu_start[i] + length[i], o_start[i] - mu_start[i]
        start = _turn(mask, words, first, past, True)
        while start < past:
            end = _turn(mask, words, start, past, False)
            before = _kind(flags, start - 1) if start > first + prompt[i] else 0
            for at in range(start, min(start + BESIDE, end)):
                _add(table[2 * before + (at > start)], mu[at], o[at + shift])
            after = _kind(flags, end) if end < past else 0
            for at in range(max(start, end - BESIDE), end):
                _add(table[AFTER + 2 * after + (at < end - 1)], mu[at], o[at + shift])
            start = _turn(mask, words, end, past, True)


@kernel
def _turn(mask, words, at, past, on):
    """The first token from `at` on that is under the mask (on) or isn't; `past` where there is none. Eight are looked at together."""
    alike = np.uint64(0) if on else ALL_ON
    while at < past:
        if at % 8 == 0 and at + 8 <= past and words[at // 8] == alike:
            at += 8
        elif (mask[at] != 0) == on:
            return at
        else:
            at += 1
    return past


@kernel
def _kind(flags, at):
    """Of a token that is not under the mask: 1 a tool's output, 2 other text that wasn't generated, 3 generated."""
    return 1 if flags[at] & TOOL else 3 if flags[at] & GENERATED else 2


@kernel
def _add(row, u, v):
    if not (abs(u) <= HUGE and abs(v) <= HUGE):
        return
    d = np.float64(v - u)
    c = min(max(d, -LIMIT), LIMIT)
    t = math.expm1(c)
    row[0] += 1
    row[1] += d
    row[2] += abs(d)
    row[3] += d * d
    row[4] += t - c if abs(c) > 1e-3 else c * c * (1 / 2 + c * (1 / 6 + c / 24))
    row[5] += t
    row[6] += t * t
    row[7] += u == v
