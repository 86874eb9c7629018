"""How far a conversion is: a bar with GB/s and time left on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import threading
import time


class Stopped(Exception):
    """The conversion ends, for a reason that another thread has."""


class Progress:
    """Counts bytes from any thread and shows them on stderr, unless quiet."""

    def __init__(self, total: int, quiet: bool = False) -> None:
        self.total, self.done, self.skipped, self.quiet = total, 0, 0, quiet
        self._began = self._shown = time.monotonic()
        self._every = 0.2 if sys.stderr.isatty() else 10.0
        self._bar = self._stopped = False
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Bytes written. Stopped after stop(), so that threads end in the middle of a file."""
        if self._stopped:
            raise Stopped
        with self._lock:
            self.done += count
            self._tick()

    def skip(self, count: int) -> None:
        """Bytes that were there already, and whole."""
        with self._lock:
            self.skipped += count
            self._tick()

    def share(self, part: float) -> None:
        """Of the bytes, only so many fall to this process."""
        self.total = int(self.total * part)

    def stop(self) -> None:
        self._stopped = True

    @property
    def rate(self) -> float:
        """Bytes a second, so far."""
        return self.done / max(1e-9, time.monotonic() - self._began)

    @property
    def line(self) -> str:
        at, left = self.done + self.skipped, max(0, self.total - self.done - self.skipped)
        seconds = int(left / max(1.0, self.rate))
        return f"{at / 1e9:.2f} of {self.total / 1e9:.2f} GB, {self.rate / 1e9:.2f} GB/s, {seconds // 60}:{seconds % 60:02d} left"

    def _tick(self) -> None:
        now = time.monotonic()
        if not self.quiet and now - self._shown >= self._every:
            self._shown = now
            self._show()

    def _show(self) -> None:
        if sys.stderr.isatty():
            self._bar = True
            width = 30
            full = min(width, int(width * (self.done + self.skipped) / max(1, self.total)))
            print(f"\r[{'#' * full}{'.' * (width - full)}] {self.line}  ", end="", file=sys.stderr, flush=True)
        else:
            print(self.line, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the bar's line, if there is one."""
        if self._bar:
            self._show()
            print(file=sys.stderr)
