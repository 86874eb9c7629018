"""Which rank trains on which sequences, in which micro-batches. Deterministic, whichever worker sealed what.

Sequences are taken in (draw, sample) order. Draws are divided over the optimizer steps in that order, siblings together.
Within a step, sequences are packed into micro-batches of about equal size, as few as the budget allows but a multiple of the
ranks; then every rank gets the same number, because each micro-batch of FSDP is a round of collectives for all ranks.
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from miles.config.schema import RunConfig
from miles.data.store.manifest import Assignment, MicroBatch

Bins = list[list[int]]  # micro-batches as lists of sequence positions


def data_parallel_size(config: RunConfig) -> int:
    """Ranks that train on different samples."""
    parallel = config.train.parallel
    return config.train.num_nodes * config.train.num_gpus_per_node // (parallel.tensor * parallel.pipeline * parallel.context)


def assign_by(config: RunConfig, steps: int, **sequences: Any) -> Assignment:
    """assign(**sequences) for the ranks and under the budget of a run."""
    train = config.train
    budget: dict[str, Any] = {"max_tokens": train.max_tokens_per_gpu} if train.use_dynamic_batch_size else {"micro_batch_size": train.micro_batch_size}
    return assign(**sequences, dp_size=data_parallel_size(config), steps=steps, balance=train.balance_data, **budget)


def assign(
    lengths: ArrayLike,
    draws: ArrayLike,
    samples: ArrayLike,
    shards: ArrayLike,
    rows: ArrayLike,
    *,
    dp_size: int,
    steps: int = 1,
    max_tokens: int | None = None,
    micro_batch_size: int | None = None,
    balance: bool = True,
) -> Assignment:
    """Assign S sequences: [optimizer step][rank][micro-batch] -> [(shard, first row, last row exclusive)], in (draw, sample) order.

    lengths [S] tokens, draws [S], samples [S], shards [S] (index of the shard), rows [S] (row in the shard), all integers, in any
    order. Exactly one of max_tokens (budget of a micro-batch [tokens]; a longer sequence is a micro-batch by itself) and
    micro_batch_size [sequences]. balance: even out the ranks' tokens; else sequences go to ranks round robin.

    In an optimizer step all ranks have the same number of micro-batches. Balanced, ranks differ by no more tokens than the
    largest micro-batch. A micro-batch is empty ([]) only where a step has fewer sequences than micro-batches must exist.
    Raises ValueError when there are fewer draws than optimizer steps.
    """
    assert (max_tokens is None) != (micro_batch_size is None), "one of max_tokens and micro_batch_size"
    assert dp_size >= 1, "at least one rank"
    assert steps >= 1, "at least one optimizer step"
    length, draw, sample, shard, row = (np.asarray(column, np.int64) for column in (lengths, draws, samples, shards, rows))
    order = np.lexsort((sample, draw))
    length, draw, sample, shard, row = (column[order] for column in (length, draw, sample, shard, row))
    again = (draw[1:] == draw[:-1]) & (sample[1:] == sample[:-1])
    assert not again.any(), "a (draw, sample) occurs once"
    found: Assignment = []
    for first, last in _divide_draws(draw, steps):
        per_rank = _step(length[first:last], dp_size, max_tokens, micro_batch_size, balance)
        found.append([[_ranges(np.array(sorted(bin), np.int64) + first, shard, row) for bin in bins] for bins in per_rank])
    return found


def _divide_draws(draw: NDArray[np.int64], steps: int) -> list[tuple[int, int]]:
    """Bounds [first, last) of each optimizer step in sorted sequences: equal numbers of draws, the first steps one more."""
    starts = np.flatnonzero(np.r_[True, draw[1:] != draw[:-1]]) if len(draw) else np.zeros(0, np.int64)
    if len(starts) < steps:
        raise ValueError(f"{len(starts)} prompt draws can't be divided over {steps} optimizer steps; lower num_steps_per_rollout or raise rollout.batch_size")
    edges = np.r_[starts, len(draw)]
    return [(int(edges[part[0]]), int(edges[part[-1] + 1])) for part in np.array_split(np.arange(len(starts)), steps)]


def _step(length: NDArray[np.int64], dp_size: int, max_tokens: int | None, micro_batch_size: int | None, balance: bool) -> list[Bins]:
    """[rank] -> micro-batches of one optimizer step."""
    everything = np.arange(len(length))
    if balance:
        if max_tokens is not None:
            packed = first_fit_decreasing(length, everything, max_tokens)
            count = -(-len(packed) // dp_size)
            spread = _spread(length, everything, count * dp_size, max_tokens=max_tokens)
            bins = spread if spread is not None else _split_to(packed, count * dp_size, length)
        else:
            assert micro_batch_size is not None
            count = -(-len(length) // (micro_batch_size * dp_size))
            even = _spread(length, everything, count * dp_size, max_sequences=micro_batch_size)
            assert even is not None, "as many places as sequences"
            bins = even
        return _deal(bins, dp_size, length)
    shares = [everything[rank::dp_size] for rank in range(dp_size)]
    if max_tokens is not None:
        per_rank = [first_fit_decreasing(length, share, max_tokens) for share in shares]
        count = max(len(bins) for bins in per_rank)
        return [_split_to(bins, count, length) for bins in per_rank]
    assert micro_batch_size is not None
    count = -(-len(shares[0]) // micro_batch_size)
    return [[part.tolist() for part in np.array_split(share, count)] for share in shares]


def first_fit_decreasing(length: NDArray[np.int64], members: NDArray[np.int64], capacity: int) -> Bins:
    """Pack members (positions in length) into bins of at most `capacity` tokens, longest first, each into the first bin with room.

    At most 11/9 of the least possible number of bins, plus 6/9 (Dósa 2007). A member over the capacity is alone in its bin.
    """
    room = np.zeros(len(members), np.int64)
    bins: Bins = []
    for member in _longest_first(length, members):
        fits = room[: len(bins)] >= max(int(length[member]), 1)
        at = int(fits.argmax()) if fits.any() else len(bins)
        if at == len(bins):
            bins.append([])
            room[at] = capacity
        bins[at].append(member)
        room[at] -= length[member]
    return bins


def _spread(length: NDArray[np.int64], members: NDArray[np.int64], count: int, max_tokens: int | None = None, max_sequences: int | None = None) -> Bins | None:
    """Longest first, each into the bin with the fewest tokens (Graham 1969), under one of the two caps; None if that breaks max_tokens."""
    bins: Bins = [[] for _ in range(count)]
    heap = [(0, 0, index) for index in range(count)]  # tokens, sequences, bin: of equal tokens, the one with fewer sequences
    for member in _longest_first(length, members):
        load, _, index = heapq.heappop(heap)
        load += int(length[member])
        if max_tokens is not None and bins[index] and load > max_tokens:
            return None  # the emptiest bin has no room: no bin has
        bins[index].append(member)
        if max_sequences is None or len(bins[index]) < max_sequences:
            heapq.heappush(heap, (load, len(bins[index]), index))
    return bins


def _split_to(bins: Bins, count: int, length: NDArray[np.int64]) -> Bins:
    """Halve the fullest bins until there are `count`; empty ones only when every bin is down to one sequence."""
    bins = [list(bin) for bin in bins]
    while len(bins) < count:
        several = [index for index, bin in enumerate(bins) if len(bin) > 1]
        if not several:
            bins.append([])
            continue
        fullest = max(several, key=lambda index: (_tokens(bins[index], length), -index))
        halves = _spread(length, np.array(sorted(bins[fullest])), 2)
        assert halves is not None, "no cap, no refusal"
        bins[fullest : fullest + 1] = halves
    return bins


def _deal(bins: Bins, dp_size: int, length: NDArray[np.int64]) -> list[Bins]:
    """Deal bins to ranks in rounds of dp_size, largest first, the largest of a round to the rank with the fewest tokens.

    Micro-batches that run at the same time then have about the same size. After each round ranks differ by no more than the
    larger of the difference before and the spread of the round, so in the end by no more than the largest bin.
    """
    assert len(bins) % dp_size == 0, "a multiple of the ranks"
    ordered = sorted(bins, key=lambda bin: (-_tokens(bin, length), min(bin, default=len(length))))
    ranks: list[Bins] = [[] for _ in range(dp_size)]
    load = [0] * dp_size
    for start in range(0, len(ordered), dp_size):
        lightest = sorted(range(dp_size), key=lambda rank: (load[rank], rank))
        for rank, bin in zip(lightest, ordered[start : start + dp_size], strict=True):
            ranks[rank].append(bin)
            load[rank] += _tokens(bin, length)
    return ranks


def _longest_first(length: NDArray[np.int64], members: NDArray[np.int64]) -> list[int]:
    return [int(member) for member in members[np.argsort(-length[members], kind="stable")]]


def _tokens(bin: list[int], length: NDArray[np.int64]) -> int:
    return int(length[bin].sum()) if bin else 0


def _ranges(positions: NDArray[np.int64], shard: NDArray[np.int64], row: NDArray[np.int64]) -> MicroBatch:
    """Positions in (draw, sample) order as ranges of rows; neighbours in one shard are joined, the order is kept."""
    ranges: MicroBatch = []
    for position in positions.tolist():
        here, at = int(shard[position]), int(row[position])
        if ranges and ranges[-1][0] == here and ranges[-1][2] == at:
            ranges[-1] = (here, ranges[-1][1], at + 1)
        else:
            ranges.append((here, at, at + 1))
    return ranges
