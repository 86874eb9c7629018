"""Files opened for reading: bytes copied into a tensor, or a tensor on the file's own pages."""

from __future__ import annotations

import mmap
import os
import threading
import warnings
from pathlib import Path

import torch
from torch import Tensor

from miles.config.exits import UserError

KEPT = 128  # files held open, two descriptors each: many systems allow a process 1024, and a large checkpoint has more files
# Said once a process by torch; none of these tensors is written to.
warnings.filterwarnings("ignore", message="The given buffer is not writable")


class ReadFile:
    """A file of a checkpoint. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        self.map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)

    def view(self, dtype: torch.dtype, offset: int, count: int) -> Tensor:
        """`count` numbers from byte `offset`, without a copy; the storage holds these alone. Must not be written to."""
        return torch.frombuffer(self.map, dtype=dtype, offset=offset, count=count)

    def read(self, offset: int, out: Tensor) -> None:
        """Fill a contiguous tensor with the bytes from `offset` on. One copy, half the time of one out of the map. UserError for a file that has shrunk."""
        target = memoryview(out.view(-1).view(torch.uint8).numpy().data)
        while target:
            count = os.preadv(self._file.fileno(), [target], offset)
            if not count:
                raise UserError(f"{self.path}: ends at byte {offset}, though it was longer when the conversion began; restore it from its origin")
            offset, target = offset + count, target[count:]

    def __del__(self) -> None:
        """The map goes with the last tensor on its pages."""
        self._file.close()


class OpenFiles:
    """Files of a checkpoint, opened when they are asked for; the newest KEPT stay open. Safe to use from several threads."""

    def __init__(self) -> None:
        self._files: dict[Path, ReadFile] = {}
        self._lock = threading.Lock()

    def __getitem__(self, path: Path) -> ReadFile:
        with self._lock:
            file = self._files.pop(path, None) or ReadFile(path)
            self._files[path] = file
            if len(self._files) > KEPT:
                del self._files[next(iter(self._files))]
            return file
