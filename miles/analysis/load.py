"""Chunks in memory: token arrays gathered from shards and train records while the chunk before is computed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles.analysis.rows import Part, Rows
from miles.analysis.source import NEEDED, OPTIONAL_COLUMNS, SHARD_COLUMNS, TRAIN_COLUMNS, Chunk
from miles.data.store.files import Damaged
from miles.data.store.manifest import NAME

LINE, HUGE_PAGE = 64, 1 << 21  # bytes of a cache line, and of a large page of memory
AHEAD = 1  # chunks read while one is computed


@dataclass
class Loaded:
    """A chunk's token arrays, by name; sequence i begins at shard_start[i] of those of shards, at train_start[i] of those of the record.

    It is row[i] of parts[part_of[i]], and so row at[i] of `rows`, which are those of all these parts.
    """

    chunk: Chunk
    columns: dict[str, NDArray[Any]]
    shard_start: NDArray[np.int64]
    train_start: NDArray[np.int64]
    length: NDArray[np.int64]
    parts: list[Part]
    part_of: NDArray[np.int64]
    row: NDArray[np.int64]
    bytes: int

    @cached_property
    def rows(self) -> Rows:
        return self.chunk.step.rows(self.parts)

    @cached_property
    def at(self) -> NDArray[np.int64]:
        return self.rows.first[self.part_of] + self.row


class Buffers:
    """Arrays that grow to what was asked for and are used again. They begin at a cache line: vectors within one are read faster."""

    def __init__(self) -> None:
        self._arrays: dict[str, NDArray[Any]] = {}

    def take(self, name: str, dtype: Any, size: int) -> NDArray[Any]:
        held = self._arrays.get(name)
        if held is None or len(held) < size:
            held = self._arrays[name] = aligned(size + size // 8, dtype)
        return held[:size]


def aligned(size: int, dtype: Any) -> NDArray[Any]:
    """An array of no particular content that begins at a cache line, and a great one at a large page: arrays read side by side are read faster."""
    width = np.dtype(dtype).itemsize
    border = HUGE_PAGE if size * width >= HUGE_PAGE else LINE
    held = np.empty(size * width + border, np.uint8)
    skip = -held.ctypes.data % border
    return held[skip : skip + size * width].view(dtype)


def load(chunk: Chunk, buffers: Buffers, core: bool = False) -> Loaded:
    """Read a chunk. Damaged names files that don't fit together. core: only what the core sums need."""
    record, step, which = chunk.record, chunk.step, slice(chunk.first, chunk.last)
    shard, row = record.shard[which], record.row[which]
    length = np.diff(record.offset[chunk.first : chunk.last + 1])
    used = np.unique(shard).tolist()
    if used and used[-1] >= len(step.manifest.shards):
        raise Damaged(f"{record.sheet.path}: names shard {used[-1]}, and {step.folder / NAME} has {len(step.manifest.shards)}; files of two runs are mixed")
    parts = [step.part(index) for index in used]
    part_of = np.searchsorted(used, shard)
    shard_start = np.zeros(len(row), np.int64)
    ranges: list[tuple[Part, int, int, int]] = []
    place = 0
    for index, part in enumerate(parts):
        mine = np.flatnonzero(part_of == index)
        mine = mine[np.argsort(row[mine], kind="stable")]
        rows = row[mine]
        if rows[-1] >= len(part.offset) - 1:
            raise Damaged(f"{record.sheet.path}: names row {rows[-1]} of {part.sheet.path}, which has {len(part.offset) - 1}; files of two runs are mixed")
        if (twice := rows[1:][rows[1:] == rows[:-1]]).size:
            raise Damaged(f"{record.sheet.path}: row {twice[0]} of {part.sheet.path} stands twice within {len(shard)} sequences")
        sizes = part.offset[rows + 1] - part.offset[rows]
        if (wrong := np.flatnonzero(sizes != length[mine])).size:
            i = wrong[0]
            raise Damaged(
                f"{record.sheet.path}: sequence {chunk.first + mine[i]} has {length[mine[i]]} tokens, and its row {rows[i]} of {part.sheet.path} {sizes[i]}; "
                "files of two runs are mixed"
            )
        shard_start[mine] = place + np.cumsum(sizes) - sizes
        cuts = np.flatnonzero(np.diff(rows) != 1) + 1
        for piece in np.split(rows, cuts):
            start, stop = int(part.offset[piece[0]]), int(part.offset[piece[-1] + 1])
            ranges.append((part, start, place, stop - start))
            place += stop - start
    columns: dict[str, NDArray[Any]] = {}
    begin = int(record.offset[chunk.first])
    for name, dtype in TRAIN_COLUMNS.items():
        here = f"tokens/{name}" in record.columns and (not core or name in NEEDED)
        columns[name] = buffers.take(name, dtype, chunk.tokens if here else 0)
        record.sheet.read(f"tokens/{name}", begin, columns[name])
    for name, dtype in SHARD_COLUMNS.items():
        here = not core or name in NEEDED
        columns[name] = buffers.take(name, dtype, place if here else 0)
        for part, start, at, size in ranges if here else ():
            part.sheet.read(f"tokens/{name}", start, columns[name][at : at + size])
    for name, dtype in OPTIONAL_COLUMNS.items():
        here = not core and any(part.sheet.has(f"tokens/{name}") for part in parts)
        columns[name] = buffers.take(name, dtype, place if here else 0)
        for part, start, at, size in ranges if here else ():
            values = columns[name][at : at + size]
            if part.sheet.has(f"tokens/{name}"):
                part.sheet.read(f"tokens/{name}", start, values)
            else:
                values.fill(np.nan)
    train_start = record.offset[chunk.first : chunk.last] - begin
    return Loaded(chunk, columns, shard_start, train_start, length, parts, part_of, row, sum(column.nbytes for column in columns.values()))


def numbers_of(loaded: Loaded, name: str) -> NDArray[Any]:
    """A number of each sequence, out of its shard: of the type of rows.NUMBERS, engines and sources as places in loaded.rows.names."""
    found: NDArray[Any] = loaded.rows.numbers[name][loaded.at]
    return found


def loaded(chunks: Iterable[Chunk], core: bool = False) -> Iterator[Loaded]:
    """Chunks one after another, each read by a thread while the one before is in use. Its arrays are valid until the next is asked for."""
    sets = [Buffers() for _ in range(AHEAD + 2)]
    ready: queue.Queue[Loaded | BaseException | None] = queue.Queue(AHEAD)
    stopped = threading.Event()

    def hand(item: Loaded | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        try:
            for count, chunk in enumerate(chunks):
                if not hand(load(chunk, sets[count % len(sets)], core)):
                    return
            hand(None)
        except BaseException as error:  # belongs to who consumes
            hand(error)

    thread = threading.Thread(target=run, name="reader", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
