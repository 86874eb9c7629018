"""Training's record: what a rank saw, gathered to the first rank of its node, one file a node and step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from miles.data.store.epoch import Fence
from miles.data.store.train_record import TOKENS, TrainPart, write_train_record
from miles.training.batch import Batch, Seen
from miles.training.distributed import Ranks


def write_record(folder: Path, batch: Batch, attributes: dict[str, Any], fence: Fence | None = None) -> Path | None:
    """Write `node_0000.h5` of this rank's node; returns its path on the rank that wrote it. Collective over a node's ranks.

    Rows come in the order trained on. The writer holds the parts of its node's ranks, one step of them.
    """
    ranks = batch.ranks
    part = rank_part(ranks.rank, [seen for step in batch.kept for seen in step])
    parts = _gather(part, ranks)
    if parts is None:
        return None
    path = folder / f"node_{ranks.node:04d}.h5"
    write_train_record(path, parts, attributes, fence)
    return path


def rank_part(rank: int, seen: list[Seen]) -> TrainPart:
    """The micro-batches of a rank, joined."""
    lengths = np.concatenate([np.zeros(0, np.int64), *(each.lengths for each in seen)])
    offset = np.zeros(len(lengths) + 1, np.uint64)
    np.cumsum(lengths, out=offset[1:])
    names = seen[0].values.keys() if seen else [name for name in TOKENS if name in ("train_logprob", "entropy", "advantage", "used")]
    columns = {name: np.concatenate([np.zeros(0, TOKENS[name]), *(each.values[name] for each in seen)]).astype(TOKENS[name]) for name in names}
    return TrainPart(
        rank=rank,
        shard=np.concatenate([np.zeros(0, np.int64), *(each.shard for each in seen)]).astype(np.uint16),
        row=np.concatenate([np.zeros(0, np.int64), *(each.row for each in seen)]).astype(np.uint32),
        offset=offset,
        **columns,
    )


def _gather(part: TrainPart, ranks: Ranks) -> list[TrainPart] | None:
    """Parts of the node on its first rank, None on the others. Point to point, one rank's part at a time."""
    writer = ranks.node_ranks[0]
    if ranks.rank != writer:
        data = torch.frombuffer(bytearray(part.to_bytes()), dtype=torch.uint8)
        dist.send(torch.tensor([len(data)], dtype=torch.int64), writer)
        dist.send(data, writer)
        return None
    parts = [part]
    for other in ranks.node_ranks[1:]:
        size = torch.zeros(1, dtype=torch.int64)
        dist.recv(size, other)
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(data, other)
        parts.append(TrainPart.from_bytes(data.numpy().tobytes()))
    return parts
