"""A file that is appended to, hashed and counted, and goes past the page cache where the file system can.

Written through the page cache, a checkpoint costs a second copy of every byte, pushes what others have cached out of memory, and waits for
the disk at the end, in fsync. Written directly, the disk works from the first buffer on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from miles.convert.progress import Progress

BUFFER_BYTES = 8 << 20
PAGE = 4096  # what direct writes are aligned to: in memory, in the file, in length


def new_buffer() -> mmap.mmap:
    """Memory for one Output at a time, in large pages where there are any: a direct write looks up and holds each page of its own."""
    buffer = mmap.mmap(-1, BUFFER_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


class Output:
    """A new file. Bytes reach it in pieces of several MB, and all of them with finish()."""

    def __init__(self, path: Path, buffer: mmap.mmap, progress: Progress) -> None:
        self._path, self._fd = path, _open(path)
        self._buffer, self._view = buffer, memoryview(buffer)
        self._held = 0  # bytes of the buffer that are not in the file yet
        self._written = 0
        self._hash, self._progress = xxhash.xxh3_128(), progress

    def tell(self) -> int:
        """Bytes so far."""
        return self._written + self._held

    def space(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """The file's next bytes as a tensor [*shape] of at most BUFFER_BYTES - PAGE, which the caller fills before the next call."""
        count = int(torch.Size(shape).numel())
        at = self._take(count * dtype.itemsize)
        return torch.frombuffer(self._buffer, dtype=dtype, offset=at, count=count).view(shape) if count else torch.empty(shape, dtype=dtype)

    def write(self, data: bytes | memoryview) -> None:
        """Append."""
        for first in range(0, len(data), BUFFER_BYTES // 2):
            part = data[first : first + BUFFER_BYTES // 2]
            at = self._take(len(part))
            self._view[at : at + len(part)] = part

    def align(self, to: int) -> None:
        """Zeros up to a multiple."""
        self.write(bytes(-self.tell() % to))

    def finish(self) -> None:
        """Everything is on the disk."""
        missing = -self._held % PAGE
        self._view[self._held : self._held + missing] = bytes(missing)
        self._flush(self._held)
        if missing:
            os.ftruncate(self._fd, self._written)
        os.fsync(self._fd)

    def close(self) -> None:
        """Also after a failure."""
        self._view.release()
        os.close(self._fd)

    def digest(self) -> str:
        """xxh3_128 of the whole file, once finished."""
        return self._hash.hexdigest()

    def _take(self, count: int) -> int:
        assert count <= BUFFER_BYTES - PAGE, "callers cut what they write into strips"
        if self._held + count > BUFFER_BYTES:
            whole = self._held - self._held % PAGE
            self._flush(whole)
            rest = bytes(self._view[whole : self._held + whole])
            self._view[: len(rest)] = rest
        at = self._held
        self._held += count
        return at

    def _flush(self, count: int) -> None:
        """Hash and write the first `count` bytes held; they count as written, the rest stays where it is."""
        self._hash.update(self._view[:count])
        left, at = self._view[: count + -count % PAGE], self._written
        while left:
            done = self._write(left, at)
            left, at = left[done:], at + done
        self._written += count
        self._held -= count
        self._progress.add(count)

    def _write(self, data: memoryview, at: int) -> int:
        try:
            return os.pwrite(self._fd, data, at)
        except OSError as error:
            flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                raise OSError(error.errno, error.strerror, str(self._path)) from None
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)  # opened so, and yet not able to
            return os.pwrite(self._fd, data, at)


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)
