"""Training's record: what the ranks saw, one file a node and step, written by the node's first rank.

The file's arrays are written one after another, each micro-batch as its rank sends it, so nobody holds more than its own share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
import torch.distributed as dist

from miles.data.store.epoch import Fence
from miles.data.store.journal import decode_array, encode_array
from miles.data.store.train_record import ALWAYS, TOKENS, RecordPart, write_train_record
from miles.training.batch import Batch, Seen


def write_record(folder: Path, batch: Batch, attributes: dict[str, Any], fence: Fence | None = None) -> Path | None:
    """Write `node_0000.h5` of this rank's node; returns its path on the rank that wrote it. Collective over a node's ranks.

    Rows come in the order trained on.
    """
    ranks = batch.ranks
    own = OwnPart(ranks.rank, [seen for step in batch.kept for seen in step])
    writer = ranks.node_ranks[0]
    if ranks.rank != writer:
        _send(own, writer)
        return None
    parts: list[RecordPart] = [own, *(SentPart(other) for other in ranks.node_ranks[1:])]
    path = folder / f"node_{ranks.node:04d}.h5"
    write_train_record(path, parts, attributes, fence)
    return path


class OwnPart:
    """This rank's part: its micro-batches, as they were seen."""

    def __init__(self, rank: int, seen: Sequence[Seen]) -> None:
        self.rank, self.seen = rank, seen
        self.shard = np.concatenate([np.zeros(0, np.int64), *(each.shard for each in seen)]).astype(np.uint16)
        self.row = np.concatenate([np.zeros(0, np.int64), *(each.row for each in seen)]).astype(np.uint32)
        lengths = np.concatenate([np.zeros(0, np.int64), *(each.lengths for each in seen)])
        self.offset = np.zeros(len(lengths) + 1, np.uint64)
        np.cumsum(lengths, out=self.offset[1:])
        self.names = [name for name in TOKENS if name in (seen[0].values if seen else ALWAYS)]
        self.layers = {name: np.sum([each.layers[name] for each in seen], 0) for name in (seen[0].layers if seen else ())}

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """A token array, a micro-batch at a time."""
        for each in self.seen:
            block = np.ascontiguousarray(each.values[name], TOKENS[name])
            assert len(block) == each.lengths.sum(), f"{name}: {each.lengths.sum()} tokens"
            yield block


class SentPart:
    """The part of another rank of the node, which sends its blocks one at a time, in the order they are written."""

    def __init__(self, rank: int) -> None:
        size = torch.zeros(1, dtype=torch.int64)
        dist.recv(size, rank)
        content = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(content, rank)
        told = msgpack.unpackb(content.numpy().tobytes())
        self.rank, self.names, self.sizes = rank, told["names"], told["sizes"]
        self.shard, self.row, self.offset = (_array(told[name]) for name in ("shard", "row", "offset"))
        self.layers = {name: _array(counts) for name, counts in told["layers"].items()}

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """A token array, a micro-batch at a time."""
        for size in self.sizes:
            block = np.empty(size, TOKENS[name])
            if size:
                dist.recv(torch.from_numpy(block), self.rank)
            yield block


def _array(encoded: list[Any]) -> np.ndarray:
    array = decode_array(encoded)
    assert array is not None, "these are always there"
    return array


def _send(part: OwnPart, writer: int) -> None:
    small: dict[str, Any] = {name: encode_array(getattr(part, name)) for name in ("shard", "row", "offset")}
    layers = {name: encode_array(counts) for name, counts in part.layers.items()}
    content = msgpack.packb({**small, "names": part.names, "layers": layers, "sizes": [int(each.lengths.sum()) for each in part.seen]})
    dist.send(torch.tensor([len(content)], dtype=torch.int64), writer)
    dist.send(torch.frombuffer(bytearray(content), dtype=torch.uint8), writer)
    for name in part.names:
        for block in part.blocks(name):
            if len(block):
                dist.send(torch.from_numpy(block), writer)
