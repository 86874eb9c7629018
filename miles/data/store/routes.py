"""Routes: which experts each token went to (miles.routes/1), in a file of its own, so that it can be deleted first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles.data.sample import Sample
from miles.data.store.epoch import Fence
from miles.data.store.files import Sealed
from miles.data.store.hdf5 import attributes, open_hdf5, put_blocks, seal_hdf5

SCHEMA = "miles.routes/1"


def write_routes(
    path: Path, samples: Sequence[Sample], attrs: dict[str, Any] | None = None, fence: Fence | None = None, rows: Sequence[dict[str, Any]] | None = None
) -> Sealed | None:
    """Seal the routes of these samples, beside a shard of the same samples; None (and no file) when no sample has any.

    A sample's routes are u8 or u16 [rows, layers, top_k], one dtype and one (layers, top_k) in a file. /sequence u32 is the row
    in the shard, that is, the place in (draw, sample) order among all samples given; sequences without routes aren't listed.
    Like write_shard, it keeps no sample, and asks for each twice where no `rows` are given.
    """
    small = [row_of(sample) for sample in samples] if rows is None else rows
    order = sorted(range(len(small)), key=lambda index: (small[index]["draw"], small[index]["sample"]))
    listed = [(row, index, what) for row, index in enumerate(order) if (what := small[index]["routes"]) is not None]
    if not listed:
        return None
    kinds = {(shape[1:], dtype) for _, _, (shape, dtype) in listed}
    assert len(kinds) == 1, f"routes of one shape and dtype, not {kinds}"
    inner, dtype = kinds.pop()
    assert dtype in (np.uint8, np.uint16), f"routes are u8 or u16, not {dtype}"
    offset = np.zeros(len(listed) + 1, np.uint64)
    np.cumsum([shape[0] for _, _, (shape, _) in listed], out=offset[1:])

    def fill(file: Any) -> None:
        file["sequence"] = np.array([row for row, _, _ in listed], np.uint32)
        file["offset"] = offset
        expert = file.create_dataset("expert", (int(offset[-1]), *inner), dtype)
        put_blocks(expert, (routes for _, index, _ in listed if (routes := samples[index].routes) is not None))

    return seal_hdf5(path, SCHEMA, attrs or {}, fill, fence)


def row_of(sample: Sample) -> dict[str, Any]:
    """Of shard.row_of, what routes need."""
    return {"draw": sample.draw, "sample": sample.sample, "routes": None if sample.routes is None else (sample.routes.shape, sample.routes.dtype)}


class Routes:
    """A routes file opened for reading."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_hdf5(path, SCHEMA)
        self.sequence: NDArray[np.uint32] = self._file["sequence"][:]
        self.offset: NDArray[np.uint64] = self._file["offset"][:]

    @property
    def attrs(self) -> dict[str, Any]:
        return attributes(self._file)

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, top_k)"""
        return tuple(self._file["expert"].shape[1:])

    def experts(self, first: int, last: int) -> dict[int, NDArray[np.integer[Any]]]:
        """Shard rows first to last (exclusive) -> experts u8 or u16 [rows, layers, top_k]; rows without routes are left out.

        One contiguous read; the arrays are views of it.
        """
        low, high = np.searchsorted(self.sequence, [first, last])
        start = int(self.offset[low])
        data = self._file["expert"][start : int(self.offset[high])]
        return {int(self.sequence[i]): data[int(self.offset[i]) - start : int(self.offset[i + 1]) - start] for i in range(low, high)}

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Routes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_routes(path: Path) -> Routes:
    """Open a routes file. Damaged for what is no HDF5; ValueError for another kind or major number of schema, by name."""
    return Routes(path)
