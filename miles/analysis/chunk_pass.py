"""A loaded chunk into the state: tables that the fused pass fills, then folded into exact sums."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from miles.analysis import exact, fused
from miles.analysis.core_pass import core
from miles.analysis.load import Loaded, numbers_of
from miles.analysis.slices import TOKEN_SLICES, VERSIONS
from miles.analysis.state import ODD, SEEN, WORST_FIELDS, State
from miles.analysis.terms import BINS, COUNTS, REPLICATES, SEQUENCE_HISTOGRAMS, SEQUENCE_SUMS, SUMS, TOKEN_VALUES, VALUES, WORST
from miles.data.sample import Status

VOCABULARY = 1 << 20  # token ids beyond it have no slice
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def add_core(state: State, loaded: Loaded) -> None:
    """The core sums, counts and histogram of a chunk alone."""
    columns = loaded.columns
    sums, counts, histogram = np.zeros(len(SUMS)), np.zeros(len(COUNTS), np.int64), np.zeros(BINS, np.int64)
    top = core(
        columns["rollout_logprob"], columns["train_logprob"], columns["loss_mask"],
        loaded.shard_start, loaded.train_start, loaded.length, sums, counts, histogram,
    )  # fmt: skip
    exact.add(state.sums, sums)
    state.counts += counts
    state.histogram += histogram
    state.greatest = max(state.greatest, float(top))
    if counts[COUNTS.index("masked")] != counts[COUNTS.index("tokens")]:
        fused.classify(columns["rollout_logprob"], columns["train_logprob"], columns["loss_mask"], loaded.shard_start, loaded.train_start, loaded.length, state.odd)
    _seen(state, loaded)


class ChunkPass:
    """Everything of a chunk."""

    def add(self, state: State, loaded: Loaded) -> None:
        """Add a chunk to the state."""
        columns, chunk = loaded.columns, loaded.chunk
        versions, run_first, run_start, run_slot = _runs(loaded)
        slots, labels = _sequence_slots(loaded)
        token = columns["token_id"]
        vocabulary = min(int(token.max()) + 1, VOCABULARY) if len(token) else 0
        tokens, near = state.tokens.table(vocabulary, chunk.tokens)
        far_token, far = np.empty(chunk.tokens, np.int64), np.empty((chunk.tokens, len(TOKEN_VALUES)))
        reward = numbers_of(loaded, "reward", np.float64)
        sign = np.select([reward < 0, reward == 0, reward > 0], [0, 1, 2], 3)
        sums, counts, odd, histogram = np.zeros(len(SUMS)), np.zeros(len(COUNTS), np.int64), np.zeros(len(ODD), np.int64), np.zeros(BINS, np.int64)
        table, by_sequence = np.zeros((VERSIONS + len(versions), len(VALUES))), np.zeros((len(labels), len(VALUES)))
        sequence_sums, sequence_histogram = np.zeros(len(SEQUENCE_SUMS)), np.zeros((len(SEQUENCE_HISTOGRAMS), BINS), np.int64)
        divergence, bootstrap = np.zeros_like(state.divergence), np.zeros((REPLICATES, len(VALUES)))
        worst, worst_at = np.zeros(WORST, np.float32), np.zeros((WORST, 3), np.int64)
        worst_at[:, 0] = np.iinfo(np.int64).max
        order = chunk.record.shard[chunk.first : chunk.last] << 32 | loaded.row
        top, listed = fused.scan(
            columns["rollout_logprob"], columns["loss_mask"], columns["flags"], token, columns["train_logprob"], columns["entropy"],
            columns["advantage"], columns["used"], columns["route_miss"], loaded.shard_start, loaded.train_start, loaded.length,
            numbers_of(loaded, "prompt_length", np.int64), sign, _identity(loaded), order, run_first, run_start, run_slot, slots, near,
            sums, counts, odd, histogram, table, by_sequence, tokens, far_token, far, sequence_sums, sequence_histogram, divergence, bootstrap,
            worst, worst_at,
        )  # fmt: skip
        for mine, more in ((state.sums, sums), (state.bootstrap, bootstrap), (state.sequence_sums, sequence_sums)):
            exact.add(mine, more)
        for total, part in (
            (state.counts, counts), (state.odd, odd), (state.histogram, histogram), (state.sequence_histogram, sequence_histogram),
            (state.divergence, divergence),
        ):  # fmt: skip
            total += part
        state.greatest = max(state.greatest, float(top))
        names = [(name, slot) for name, count in TOKEN_SLICES.items() for slot in range(count)]
        filled = np.flatnonzero(table[:VERSIONS, 0])
        state.slices.add([(names[i][0], names[i][1]) for i in filled], table[filled])
        now = loaded.chunk.step.manifest.policy.weight_version
        used = [(version, table[VERSIONS + i]) for i, version in enumerate(versions) if table[VERSIONS + i, 0]]
        state.slices.add([("weight_version", version) for version, _ in used], np.array([row for _, row in used]))
        state.slices.add([("lag", now - version) for version, _ in used], np.array([row for _, row in used]))
        state.slices.add(labels, by_sequence)
        state.tokens.added(sums[SUMS.index("abs")], sums[SUMS.index("k3")])
        state.tokens.add(far_token[:listed], far[:listed])
        found = np.flatnonzero(worst)
        where = worst_at[found]
        rows = zip(worst[found].tolist(), (where[:, 0] >> 32).tolist(), (where[:, 0] & 0xFFFFFFFF).tolist(), where[:, 1].tolist(), strict=True)
        state.add_worst(np.array([(size, chunk.step.step, *rest) for size, *rest in rows], WORST_FIELDS))
        for name in ("entropy", "advantage", "used", "route_miss"):
            if len(columns[name]):
                state.recorded.add(name)
        _seen(state, loaded)


def _seen(state: State, loaded: Loaded) -> None:
    for name, count in (("sequences", len(loaded.row)), ("all_tokens", loaded.length.sum()), ("record_bytes", loaded.bytes)):
        state.seen[SEEN.index(name)] += count


def _runs(loaded: Loaded) -> tuple[list[int], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Weight versions in the chunk; of each sequence first and past-last run; of each run start and place among the versions."""
    first, start, version = version_runs(loaded, np.arange(len(loaded.row)))
    versions, slot = np.unique(version, return_inverse=True)
    return versions.tolist(), first, start, slot.astype(np.int64)


def version_runs(loaded: Loaded, sequences: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Of these sequences: the first run of each and past the last, [S + 1]; and of each run its start (tokens) and weight version."""
    low, count = np.zeros(len(sequences), np.int64), np.zeros(len(sequences), np.int64)
    before, start, version = 0, [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    part_of, row = loaded.part_of[sequences], loaded.row[sequences]
    for index, part in enumerate(loaded.parts):
        mine = np.flatnonzero(part_of == index)
        low[mine], high = (np.searchsorted(part.run_sequence, row[mine], side) for side in ("left", "right"))
        count[mine] = high - low[mine]
        low[mine] += before
        before += len(part.run_sequence)
        start.append(part.run_start)
        version.append(part.run_version)
    first = np.concatenate([[0], np.cumsum(count)])
    which = np.arange(first[-1]) + np.repeat(low - first[:-1], count)
    return first, np.concatenate(start)[which], np.concatenate(version)[which]


def _sequence_slots(loaded: Loaded) -> tuple[NDArray[np.int64], list[tuple[str, int | str]]]:
    """Of each slice of whole sequences the place among the labels, [slices, S]; and the labels."""
    chunk = loaded.chunk
    one = np.zeros(len(loaded.row), np.int64)

    def listed(which: str) -> Callable[[int], str]:
        lists = [getattr(part, which) for part in loaded.parts]
        return lambda key: lists[key >> 32][key & 0xFFFFFFFF] if key & 0xFFFFFFFF < len(lists[key >> 32]) else "unknown"

    keys: dict[str, tuple[NDArray[np.int64], Callable[[int], int | str]]] = {
        "step": (one, lambda _: chunk.step.step),
        "node": (one, lambda _: chunk.record.node),
        "train_rank": (chunk.record.rank[chunk.first : chunk.last], int),
        "prefix_cache": (np.sign(numbers_of(loaded, "cached_tokens", np.int64)), lambda cached: "hit" if cached else "no hit"),
        "status": (numbers_of(loaded, "status", np.int64), lambda value: Status(value).name.lower() if value < len(Status) else str(value)),
        "engine": (loaded.part_of << 32 | numbers_of(loaded, "engine", np.int64), listed("engines")),
        "source": (loaded.part_of << 32 | numbers_of(loaded, "source", np.int64), listed("sources")),
    }
    labels: dict[tuple[str, int | str], int] = {}
    slots = np.zeros((len(keys), len(loaded.row)), np.int64)
    for row, (name, (key, named)) in zip(slots, keys.items(), strict=True):
        values, which = np.unique(key, return_inverse=True)
        row[:] = np.array([labels.setdefault((name, named(value)), len(labels)) for value in values.tolist()], np.int64)[which]
    return slots, list(labels)


def _identity(loaded: Loaded) -> NDArray[np.uint64]:
    """A hash of (step, draw, sample): the bootstrap draws by it, so that its bits depend on the data alone."""
    draw, sample = (numbers_of(loaded, name, np.uint64) for name in ("draw", "sample"))
    with np.errstate(over="ignore"):
        return mixed((np.uint64(loaded.chunk.step.step) * GOLDEN + draw) * GOLDEN + sample)


def group_hash(loaded: Loaded) -> NDArray[np.uint64]:
    """A hash of (step, draw) of each sequence: siblings share it."""
    with np.errstate(over="ignore"):
        return mixed(np.uint64(loaded.chunk.step.step) * GOLDEN + numbers_of(loaded, "draw", np.uint64))


def mixed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A hash of 64 bits (splitmix64)."""
    with np.errstate(over="ignore"):
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            value = (value ^ (value >> np.uint64(shift))) * np.uint64(factor)
    return value ^ (value >> np.uint64(31))
