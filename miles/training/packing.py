"""From the tokens of a micro-batch to packed micro-batches: sequences end to end, without padding.

Alignment: the logits of row t-1 predict token t. A packed batch therefore lists its predictions: `row` (where the logits are)
and `target` (the token). Row and target always lie in one sequence; a sequence's first token is predicted by nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from miles.data.sample import Flag
from miles.data.store.manifest import MicroBatch
from miles.models.rerouted import Rerouted


@dataclass
class PackedBatch:
    """One micro-batch of S sequences, T tokens and R predicted tokens.

    token_id, position_id i64 [T]; cu_seqlens i32 [S+1]; row i64 [R] (logits' row, ascending); target i64 [R];
    mask bool [R] (the loss counts this token); rollout_logprob f32 [R] (NaN where none was recorded); sequence i64 [R], which
    of the S; tokens i64 [S], unmasked predicted tokens of each sequence; advantage f32 [S].
    shard, shard_row, lengths: numpy i64 [S], where each sequence comes from and its tokens; place: numpy i64 [R], index of the
    target among the T tokens. rerouted: the rollout's routes, where they were asked for and recorded; a pass compares its own with them.

    R is at least 1: a batch in which nothing is predicted carries one masked row, so that every rank runs the same collectives.
    """

    token_id: Tensor
    position_id: Tensor
    cu_seqlens: Tensor
    row: Tensor
    target: Tensor
    mask: Tensor
    rollout_logprob: Tensor
    sequence: Tensor
    tokens: Tensor
    advantage: Tensor
    shard: np.ndarray
    shard_row: np.ndarray
    lengths: np.ndarray
    place: np.ndarray
    rerouted: Rerouted | None = None

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.token_id)

    @property
    def sequences(self) -> int:
        """Sequences."""
        return len(self.shard)


@dataclass(frozen=True)
class Part:
    """What is needed of each of a shard's sequences: offset u64 [S+1], advantage f32 [S], trained_tokens u32 [S]."""

    offset: np.ndarray
    advantage: np.ndarray
    trained_tokens: np.ndarray


def pack(parts: Sequence[Part], micro_batch: MicroBatch, tokens: dict[str, np.ndarray], device: torch.device) -> PackedBatch:
    """Pack a micro-batch.

    parts: the batch's shards in the manifest's order; micro_batch: [shard, first row, last row) triples; tokens: its arrays, as the
    reader gives them.
    Predicted are all generated tokens and all that the loss counts.
    """
    lengths: list[np.ndarray] = []
    origin, rows, weights = [], [], []
    for shard, first, last in micro_batch:
        lengths.append(np.diff(parts[shard].offset[first : last + 1].astype(np.int64)))
        origin.append(np.full(last - first, shard, np.int64))
        rows.append(np.arange(first, last, dtype=np.int64))
        weights.append(parts[shard].advantage[first:last])
    if not micro_batch:
        return _nothing(device)
    length, shard_index, shard_row = np.concatenate(lengths).astype(np.int64), np.concatenate(origin), np.concatenate(rows)
    bounds = np.zeros(len(length) + 1, np.int64)
    np.cumsum(length, out=bounds[1:])
    total = int(bounds[-1])
    assert total == len(tokens["token_id"]), "offsets and tokens of a shard agree"
    if total == 0:
        return _nothing(device, shard_index, shard_row, np.concatenate(weights))

    sequence = np.repeat(np.arange(len(length)), length)
    position = np.arange(total) - bounds[sequence]
    counts = tokens["loss_mask"] != 0
    predicted = (counts | ((tokens["flags"] & Flag.GENERATED) != 0)) & (position > 0)
    place = np.flatnonzero(predicted)
    mask = counts[place]
    loss_tokens = np.bincount(sequence[place], weights=mask, minlength=len(length)).astype(np.int64)
    empty = len(place) == 0
    target = tokens["token_id"][place]
    rollout = tokens["rollout_logprob"][place]
    row, belongs = place - 1, sequence[place]
    if empty:
        row, target, mask, belongs = np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, bool), np.zeros(1, np.int64)
        rollout = np.full(1, np.nan, np.float32)

    def on_device(array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(array), dtype=dtype, device=device)

    # cu_seqlens lists no empty sequences: kernels need not know about them.
    edges = np.concatenate([[0], bounds[1:][length > 0]])
    return PackedBatch(
        token_id=on_device(tokens["token_id"], torch.int64),
        position_id=on_device(position, torch.int64),
        cu_seqlens=on_device(edges, torch.int32),
        row=on_device(row, torch.int64),
        target=on_device(target, torch.int64),
        mask=on_device(mask, torch.bool),
        rollout_logprob=on_device(rollout, torch.float32),
        sequence=on_device(belongs, torch.int64),
        tokens=on_device(loss_tokens, torch.int64),
        advantage=on_device(np.concatenate(weights), torch.float32),
        shard=shard_index,
        shard_row=shard_row,
        lengths=length,
        place=place,
        rerouted=_rerouted(bounds, tokens, device) if "expert" in tokens else None,
    )


def _rerouted(bounds: np.ndarray, tokens: dict[str, np.ndarray], device: torch.device) -> Rerouted:
    """bounds i64 [S + 1]: tokens before each sequence."""
    count, expert = tokens["expert_rows"], tokens["expert"]
    row = np.arange(len(expert)) + np.repeat(bounds[:-1] - (np.cumsum(count) - count), count)
    expert = expert.view(np.int16) if expert.dtype == np.uint16 else expert  # torch sorts no u16
    return Rerouted(torch.from_numpy(row).to(device), torch.from_numpy(np.ascontiguousarray(expert)).to(device))


def unpack(batch: PackedBatch, values: Tensor, fill: float) -> np.ndarray:
    """Values of predicted tokens [R] spread over all tokens: numpy [T] of the values' dtype, `fill` elsewhere."""
    array = values.detach().cpu().numpy()
    out = np.full(int(batch.lengths.sum()), fill, array.dtype)
    out[batch.place] = array[: len(batch.place)]
    return out


def _nothing(device: torch.device, shard: np.ndarray | None = None, row: np.ndarray | None = None, advantage: np.ndarray | None = None) -> PackedBatch:
    """A rank's micro-batch without tokens: two tokens of padding and one masked prediction."""
    none = np.zeros(0, np.int64)
    shard, row = none if shard is None else shard, none if row is None else row
    return PackedBatch(
        token_id=torch.zeros(2, dtype=torch.int64, device=device),
        position_id=torch.arange(2, device=device),
        cu_seqlens=torch.tensor([0, 2], dtype=torch.int32, device=device),
        row=torch.zeros(1, dtype=torch.int64, device=device),
        target=torch.zeros(1, dtype=torch.int64, device=device),
        mask=torch.zeros(1, dtype=torch.bool, device=device),
        rollout_logprob=torch.full((1,), float("nan"), device=device),
        sequence=torch.zeros(1, dtype=torch.int64, device=device),
        tokens=torch.zeros(max(len(shard), 1), dtype=torch.int64, device=device),
        advantage=torch.zeros(max(len(shard), 1), device=device) if advantage is None else torch.as_tensor(advantage, dtype=torch.float32, device=device),
        shard=shard,
        shard_row=row,
        lengths=np.zeros(len(shard), np.int64),
        place=none,
    )
