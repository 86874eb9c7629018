"""A chunk's sequences, out of the rows of its shards: what the fused pass takes of each, and its runs of one weight version."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from miles.analysis.compiled import kernel
from miles.analysis.distinct import distinct
from miles.analysis.hashing import mix
from miles.analysis.load import Loaded
from miles.analysis.rows import Rows
from miles.data.sample import Status

STEP = np.uint64(0x9E3779B97F4A7C15)  # of what is hashed: distinct for any step, draw and sample that a run has


class Described(NamedTuple):
    """Of each sequence: prompt tokens, sign of the reward (a place in SIGNS), order (shard and row as one number), and a hash of (step, draw, sample)."""

    prompt: NDArray[np.int64]
    sign: NDArray[np.int64]
    order: NDArray[np.int64]
    identity: NDArray[np.uint64]
    keys: NDArray[np.int64]  # [slices of whole sequences, S], as slots_of() takes them


def described(loaded: Loaded) -> Described:
    """What a chunk's sequences are, in one go: a pass over thousands of short ones for each number would take as long as their tokens."""
    numbers, record, which = loaded.rows.numbers, loaded.chunk.record, slice(loaded.chunk.first, loaded.chunk.last)
    return Described(*_describe(
        loaded.at, np.uint64(loaded.chunk.step.step), record.rank[which], record.shard[which], loaded.row, numbers["prompt_length"], numbers["reward"],
        numbers["draw"], numbers["sample"], numbers["cached_tokens"], numbers["status"], numbers["engine"], numbers["source"],
    ))  # fmt: skip


@kernel
def _describe(at, step, rank, shard, row, prompt_length, reward, draw, sample, cached, status, engine, source):
    n = len(at)
    prompt, sign, order, identity, keys = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.uint64), np.zeros((7, n), np.int64)
    for i in range(n):
        j = at[i]
        prompt[i], order[i] = prompt_length[j], shard[i] << 32 | row[i]
        sign[i] = 0 if reward[j] < 0 else 1 if reward[j] == 0 else 2 if reward[j] > 0 else 3
        identity[i] = mix((step * STEP + draw[j]) * STEP + sample[j])
        keys[2, i], keys[3, i], keys[4, i], keys[5, i], keys[6, i] = rank[i], cached[j] > 0, status[j], engine[j], source[j]
    return prompt, sign, order, identity, keys


def slots_of(loaded: Loaded, keys: NDArray[np.int64]) -> tuple[list[tuple[str, int | str]], NDArray[np.int64]]:
    """The labels of the slices of whole sequences, in the order met; and of each slice each sequence's place among them, i64 [slices, S]."""
    chunk, names = loaded.chunk, loaded.rows.names
    named: dict[str, Callable[[int], int | str]] = {
        "step": lambda _: chunk.step.step,
        "node": lambda _: chunk.record.node,
        "train_rank": int,
        "prefix_cache": lambda cached: "hit" if cached else "no hit",
        "status": lambda value: Status(value).name.lower() if value < len(Status) else str(value),
        "engine": names["engine"].__getitem__,
        "source": names["source"].__getitem__,
    }
    values, slots = distinct(keys)
    return [(name, label(value)) for (name, label), found in zip(named.items(), values, strict=True) for value in found], slots


def group_hash(loaded: Loaded) -> NDArray[np.uint64]:
    """A hash of (step, draw) of each sequence: siblings share it."""
    found: NDArray[np.uint64] = _group_hash(np.uint64(loaded.chunk.step.step), loaded.rows.numbers["draw"], loaded.at)
    return found


@kernel
def _group_hash(step, draw, at):
    found = np.empty(len(at), np.uint64)
    for i in range(len(at)):
        found[i] = mix(step * STEP + draw[at[i]])
    return found


def version_runs(rows: Rows, at: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Of the sequences in these rows: the first run of each and past the last, [S + 1]; and of each run its start (tokens) and weight version."""
    found: Any = _version_runs(at, rows.run_first, rows.run_start, rows.run_version)
    first, start, version = found
    return first, start, version


@kernel
def _version_runs(at, run_first, run_start, run_version):
    first = np.zeros(len(at) + 1, np.int64)
    for i in range(len(at)):
        first[i + 1] = first[i] + run_first[at[i] + 1] - run_first[at[i]]
    start, version = np.empty(first[-1], np.int64), np.empty(first[-1], np.int64)
    for i in range(len(at)):
        for k in range(first[i + 1] - first[i]):
            start[first[i] + k], version[first[i] + k] = run_start[run_first[at[i]] + k], run_version[run_first[at[i]] + k]
    return first, start, version
