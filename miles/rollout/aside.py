"""Routes of finished samples whose siblings still run: out of memory, in a file that nobody else sees.

A sample of 32k tokens has some sixteen megabytes of them, and the last sibling may take many minutes.
"""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from miles.data.sample import Sample


class Aside:
    """Of one group. The file has no name and goes with close(), or with the process. put() may be called in several threads."""

    def __init__(self, folder: Path) -> None:
        """folder: on a disk with room for the routes of the groups under way."""
        self.folder = folder
        self._file: BinaryIO | None = None
        self._end = 0
        self._lock = threading.Lock()
        self._places: dict[int, tuple[int, tuple[int, ...], Any]] = {}

    @property
    def bytes(self) -> int:
        """Of what was put."""
        return self._end

    def put(self, sample: Sample) -> None:
        """Take the sample's routes from it."""
        routes = sample.routes
        if routes is None:
            return
        with self._lock:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115 - it lives as long as the group
            place, self._end = self._end, self._end + routes.nbytes
        at, view = place, memoryview(np.ascontiguousarray(routes).reshape(-1).view(np.uint8).data)
        while view:
            count = os.pwrite(self._file.fileno(), view, at)
            view, at = view[count:], at + count
        self._places[sample.sample] = place, routes.shape, routes.dtype
        sample.routes = None

    def restore(self, samples: list[Sample]) -> None:
        """Give the samples back what put() took, and close."""
        for sample in samples:
            if sample.sample in self._places:
                assert self._file is not None, "put opened it"
                place, shape, dtype = self._places.pop(sample.sample)
                routes = np.empty(shape, dtype)
                view = memoryview(routes.reshape(-1).view(np.uint8).data)
                while view:
                    count = os.preadv(self._file.fileno(), [view], place)
                    assert count > 0, "what was written is there"
                    view, place = view[count:], place + count
                sample.routes = routes
        self.close()

    def close(self) -> None:
        """Free the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
