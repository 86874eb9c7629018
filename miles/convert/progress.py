"""How far a conversion is: a bar with GB/s and time left on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import threading
import time


class Progress:
    """Counts bytes from any thread and shows them on stderr, unless quiet."""

    def __init__(self, total: int, quiet: bool = False) -> None:
        self.total, self.done, self.skipped, self.quiet = total, 0, 0, quiet
        self._began = self._shown = time.monotonic()
        self._every = 0.2 if sys.stderr.isatty() else 10.0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Bytes written."""
        with self._lock:
            self.done += count
            now = time.monotonic()
            if not self.quiet and now - self._shown >= self._every:
                self._shown = now
                self._show()

    def skip(self, count: int) -> None:
        """Bytes that were there already."""
        with self._lock:
            self.skipped += count

    @property
    def rate(self) -> float:
        """Bytes a second, so far."""
        return self.done / max(1e-9, time.monotonic() - self._began)

    @property
    def line(self) -> str:
        at, left = self.done + self.skipped, max(0, self.total - self.done - self.skipped)
        seconds = int(left / max(1.0, self.rate))
        return f"{at / 1e9:.2f} of {self.total / 1e9:.2f} GB, {self.rate / 1e9:.2f} GB/s, {seconds // 60}:{seconds % 60:02d} left"

    def _show(self) -> None:
        if sys.stderr.isatty():
            width = 30
            full = min(width, int(width * (self.done + self.skipped) / max(1, self.total)))
            print(f"\r[{'#' * full}{'.' * (width - full)}] {self.line}  ", end="", file=sys.stderr, flush=True)
        else:
            print(self.line, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the bar's line."""
        if not self.quiet and sys.stderr.isatty():
            print(file=sys.stderr)
