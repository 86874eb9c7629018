"""A loaded chunk into the state: tables that the fused pass fills, then folded into exact sums."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from miles.analysis import exact, fused
from miles.analysis.core_pass import core
from miles.analysis.distinct import distinct
from miles.analysis.load import Buffers, Loaded
from miles.analysis.sequences import described, slots_of, version_runs
from miles.analysis.slices import TOKEN_SLICES, VERSIONS
from miles.analysis.state import SEEN, WORST_FIELDS, State
from miles.analysis.terms import BINS, COUNTS, REPLICATES, SEQUENCE_SUMS, SUMS, TOKEN_VALUES, VALUES, WORST

LAST = np.iinfo(np.int64).max
SLOT_NAMES: list[tuple[str, int | str]] = [(name, slot) for name, count in TOKEN_SLICES.items() for slot in range(count)]


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

    def __init__(self) -> None:
        self._buffers = Buffers()

    def add(self, state: State, loaded: Loaded) -> None:
        """Add a chunk to the state."""
        columns, chunk = loaded.columns, loaded.chunk
        sequences = described(loaded)
        labels, slots = slots_of(loaded, sequences.keys)
        run_first, run_start, run_version = version_runs(loaded.rows, loaded.at)
        (versions,), (run_slot,) = distinct(run_version[None])
        tokens, near = state.tokens.table(chunk.tokens)
        far_token = self._buffers.take("token", np.int64, chunk.tokens)
        far = self._buffers.take("values", np.float64, chunk.tokens * len(TOKEN_VALUES)).reshape(-1, len(TOKEN_VALUES))
        sums, table, by_sequence = np.zeros(len(SUMS)), np.zeros((VERSIONS + len(versions), len(VALUES))), np.zeros((len(labels), len(VALUES)))
        sequence_sums, bootstrap = np.zeros(len(SEQUENCE_SUMS)), np.zeros((len(VALUES), REPLICATES))
        worst, worst_at = np.zeros(WORST, np.float32), np.zeros((WORST, 3), np.int64)
        worst_at[:, 0] = LAST
        top, listed = fused.scan(
            columns["rollout_logprob"], columns["loss_mask"], columns["flags"], columns["token_id"], columns["train_logprob"], columns["entropy"],
            columns["advantage"], columns["used"], columns["route_miss"], loaded.shard_start, loaded.train_start, loaded.length,
            sequences.prompt, sequences.sign, sequences.identity, sequences.order, run_first, run_start, run_slot, slots, near,
            sums, state.counts, state.odd, state.histogram, table, by_sequence, tokens, far_token, far, sequence_sums, state.sequence_histogram,
            state.divergence, bootstrap, worst, worst_at,
        )  # fmt: skip
        for mine, more in ((state.sums, sums), (state.bootstrap, bootstrap.T), (state.sequence_sums, sequence_sums)):
            exact.add(mine, more)
        state.greatest = max(state.greatest, float(top))
        names, now = SLOT_NAMES + [("weight_version", version) for version in versions], chunk.step.manifest.policy.weight_version
        filled = np.flatnonzero(table[:, 0]).tolist()
        of_version = [slot for slot in filled if slot >= VERSIONS]
        labels += [names[slot] for slot in filled] + [("lag", now - versions[slot - VERSIONS]) for slot in of_version]
        state.slices.add(labels, np.concatenate([by_sequence, table[filled + of_version]]))
        state.tokens.added(sums[SUMS.index("abs")], sums[SUMS.index("k3")])
        state.tokens.add(far_token[:listed], far[:listed])
        _add_worst(state, chunk.step.step, worst, worst_at)
        for name in ("entropy", "advantage", "used", "route_miss"):
            if len(columns[name]):
                state.recorded.add(name)
        _seen(state, loaded)


def _add_worst(state: State, step: int, worst: NDArray[np.float32], worst_at: NDArray[np.int64]) -> None:
    """worst, worst_at of fused.scan(): the greatest |d| first."""
    full = len(state.worst) == WORST
    found = np.flatnonzero(worst >= state.worst["abs"][-1] if full else worst)
    if len(found):
        rows = np.zeros(len(found), WORST_FIELDS)
        where = worst_at[found]
        rows["abs"], rows["step"], rows["shard"], rows["row"], rows["place"] = worst[found], step, where[:, 0] >> 32, where[:, 0] & 0xFFFFFFFF, where[:, 1]
        state.add_worst(rows)


def _seen(state: State, loaded: Loaded) -> None:
    for name, count in (("sequences", len(loaded.row)), ("all_tokens", loaded.length.sum()), ("record_bytes", loaded.bytes)):
        state.seen[SEEN.index(name)] += count
