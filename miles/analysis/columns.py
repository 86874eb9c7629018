"""Token arrays of sealed files, read into buffers that are used again: by pread where the array lies in one piece, as miles writes it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from miles.data.store.files import Damaged
from miles.data.store.hdf5 import attributes, open_hdf5, reading


class Sheet:
    """A sealed HDF5 file: its small datasets whole, its token arrays by ranges. Damaged names what is missing or of another shape."""

    def __init__(self, path: Path, schema: str) -> None:
        self.path = path
        self._file = open_hdf5(path, schema)
        self._raw = os.open(path, os.O_RDONLY)
        self._columns: dict[str, tuple[h5py.Dataset, int | None]] = {}

    @property
    def attrs(self) -> dict[str, Any]:
        with reading(self.path):
            return attributes(self._file)

    def has(self, name: str) -> bool:
        with reading(self.path):
            return name in self._file

    def whole(self, name: str) -> NDArray[Any]:
        """A dataset with a number a sequence."""
        with reading(self.path):
            return np.asarray(self._numbers(name, 1)[:])

    def names(self, name: str) -> list[str]:
        """The list of names that a dataset's values point into."""
        with reading(self.path):
            return [str(each) for each in self._dataset(name).attrs["names"]]

    def length(self, name: str) -> int:
        """Of a token array."""
        return len(self._numbers(name, None))

    def kind(self, name: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """dtype and shape of a token array."""
        data = self._dataset(name)
        return data.dtype, tuple(data.shape)

    def read(self, name: str, start: int, into: NDArray[Any]) -> None:
        """Fill `into`, which lies in one piece, with the rows from `start` on."""
        if not len(into):
            return
        if name not in self._columns:
            data = self._numbers(name, into.ndim)
            place = data.id.get_offset() if data.chunks is None and data.dtype == into.dtype else None
            self._columns[name] = (data, place)
        data, place = self._columns[name]
        if place is None:
            with reading(self.path):
                data.read_direct(into, np.s_[start : start + len(into)])
            return
        view, done = memoryview(into.reshape(-1).view(np.uint8).data), 0
        while done < len(view):
            count = os.preadv(self._raw, [view[done:]], place + start * into.strides[0] + done)
            if not count:
                raise Damaged(f"{self.path}: ends within /{name}")
            done += count

    def close(self) -> None:
        self._file.close()
        os.close(self._raw)

    def _numbers(self, name: str, axes: int | None) -> h5py.Dataset:
        found = self._dataset(name)
        if found.ndim != axes if axes else not found.ndim:
            raise Damaged(f"{self.path}: /{name} has {found.ndim} axes, and {axes or 'at least 1'} expected")
        if found.dtype.kind not in "iuf":
            raise Damaged(f"{self.path}: /{name} is {found.dtype}, and numbers are expected")
        return found

    def _dataset(self, name: str) -> h5py.Dataset:
        with reading(self.path):
            found = self._file.get(name)
        if not isinstance(found, h5py.Dataset):
            raise Damaged(f"{self.path}: has no dataset /{name}")
        return found


def check_offsets(sheet: Sheet, name: str, columns: list[str]) -> NDArray[np.int64]:
    """Offsets i64 [S+1] of sequences; Damaged where they don't ascend from 0 to the length of each token array."""
    offset = sheet.whole(name).astype(np.int64)
    if not len(offset) or offset[0] != 0 or (np.diff(offset) < 0).any():
        raise Damaged(f"{sheet.path}: /{name} doesn't ascend from 0")
    for column in columns:
        if (length := sheet.length(column)) != offset[-1]:
            raise Damaged(f"{sheet.path}: /{name} ends at {offset[-1]}, and /{column} has {length} tokens")
    return offset
