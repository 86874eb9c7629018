"""What training saw (miles.train/1): one file a node and step, made of the parts of its ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from miles.data.store.epoch import Fence
from miles.data.store.files import Sealed
from miles.data.store.hdf5 import attributes, open_hdf5, put_blocks, seal_hdf5

SCHEMA = "miles.train/1"
TOKENS = {
    "train_logprob": np.float32,
    "old_logprob": np.float32,
    "ref_logprob": np.float32,
    "entropy": np.float32,
    "advantage": np.float32,
    "weight": np.float32,
    "used": np.uint8,
    "route_miss": np.uint8,
}
LAYERS = ("routed", "route_miss")
ALWAYS = ("train_logprob", "entropy", "advantage", "used")


class RecordPart(Protocol):
    """What one rank saw in one step: S sequences and their N tokens, one after another in the order trained on.

    shard u16 [S] and row u32 [S] say which sequence; offset u64 [S+1] where its tokens are. Token arrays [N] run over all tokens
    of a sequence, prompt first, aligned with the shard: value i belongs to token i; NaN (0 for u8) where there is none.
    train_logprob, old_logprob, ref_logprob f32 natural logs; entropy f32 nats; advantage f32; weight f32 (off-policy
    correction); used u8 (loss mask after rejection); route_miss u8 (layers routed differently).
    layers: where routes were compared, by the names of LAYERS u64 [layers]: tokens under the loss mask that were, and those of them that
    were routed differently.
    Blocks are pieces of them, asked for once: all of a name before the next, names in the order of TOKENS, for each name all parts by rank.
    """

    rank: int
    shard: NDArray[np.uint16]
    row: NDArray[np.uint32]
    offset: NDArray[np.uint64]
    layers: dict[str, NDArray[np.uint64]]

    @property
    def names(self) -> list[str]: ...

    def blocks(self, name: str) -> Iterator[np.ndarray]: ...


def write_train_record(path: Path, parts: Sequence[RecordPart], attrs: dict[str, Any] | None = None, fence: Fence | None = None) -> Sealed:
    """Seal a node's record of one step, ranks in ascending order. attrs: parallel layout, dtypes, kernels, versions; with a fence, its epoch is added.

    A token array that only some parts have is filled with NaN (0 for u8) elsewhere. Of the token arrays, some megabytes are in memory.
    """
    parts = sorted(parts, key=lambda part: part.rank)
    counts = [len(part.row) for part in parts]
    lengths = [np.diff(part.offset.astype(np.int64)) for part in parts]
    offset = np.zeros(sum(counts) + 1, np.uint64)
    np.cumsum(np.concatenate([np.zeros(0, np.int64), *lengths]), out=offset[1:])

    def fill(file: Any) -> None:
        group = file.create_group("sequences")
        group["shard"] = np.concatenate([np.zeros(0, np.uint16), *(part.shard for part in parts)]).astype(np.uint16)
        group["row"] = np.concatenate([np.zeros(0, np.uint32), *(part.row for part in parts)]).astype(np.uint32)
        group["offset"] = offset
        group["rank"] = np.repeat(np.array([part.rank for part in parts], np.uint32), counts)
        tokens = file.create_group("tokens")
        for name, dtype in TOKENS.items():
            if name not in ALWAYS and not any(name in part.names for part in parts):
                continue
            data = tokens.create_dataset(name, (int(offset[-1]),), dtype)
            put_blocks(data, (block for part in parts for block in _column(part, name, dtype)))
        if compared := [part.layers for part in parts if part.layers]:
            layers = file.create_group("layers")
            for name in LAYERS:
                layers[name] = np.sum([each[name] for each in compared], 0, np.uint64)

    epoch = {} if fence is None else {"epoch": fence.epoch}
    return seal_hdf5(path, SCHEMA, {**(attrs or {}), **epoch}, fill, fence, own_checksum=True)


class TrainRecord:
    """A train record opened for reading."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_hdf5(path, SCHEMA)

    @property
    def attrs(self) -> dict[str, Any]:
        return attributes(self._file)

    @property
    def names(self) -> list[str]:
        """Token datasets that the file has."""
        return list(self._file["tokens"])

    def sequences(self) -> dict[str, np.ndarray]:
        """shard u16 [S], row u32 [S], offset u64 [S+1], rank u32 [S]."""
        return {name: data[:] for name, data in self._file["sequences"].items()}

    def layers(self) -> dict[str, np.ndarray]:
        """routed u64 [layers], tokens under the loss mask whose routes were compared, and route_miss u64 [layers], those of them that differed there; {} where none were."""
        return {name: data[:] for name, data in self._file["layers"].items() if name in LAYERS} if "layers" in self._file else {}

    def tokens(self, first: int, last: int, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Token arrays of sequences first to last (exclusive) of this file, concatenated; only that slice is read."""
        bounds = self._file["sequences/offset"][first : last + 1]
        return {name: self._file["tokens"][name][int(bounds[0]) : int(bounds[-1])] for name in names}

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TrainRecord:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_train_record(path: Path) -> TrainRecord:
    """Open a train record. Damaged for what is no HDF5; ValueError for another kind or major number of schema, by name."""
    return TrainRecord(path)


def _column(part: RecordPart, name: str, dtype: type) -> Iterator[np.ndarray]:
    if name in part.names:
        yield from part.blocks(name)
        return
    total, most = int(part.offset[-1]), 1 << 20
    for start in range(0, total, most):
        yield np.full(min(most, total - start), np.nan if dtype is np.float32 else 0, dtype)
