"""Keeps the report of a living run fresh: made again in the background when the run wrote something, and not too often."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from miles.config.exits import disk_full
from miles.report.build import build_report

log = logging.getLogger(__name__)

EVERY_SECONDS = 20.0
SHARE = 0.05  # of the time that making reports may take


class Refresher:
    """poke() as often as you like; the page is made again at most every EVERY_SECONDS, by a thread of its own.

    A report that can't be made (disk full, a folder taken away) must not end the run: it is logged and tried again later.
    """

    def __init__(self, run_dir: Path, every: float = EVERY_SECONDS) -> None:
        self.run_dir = run_dir
        self.every = every
        self.made = 0  # pages so far
        self._poked = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="report", daemon=True)
        self._thread.start()

    def poke(self) -> None:
        """Something may have changed."""
        self._poked.set()

    def close(self) -> None:
        """Stop; a page that is being made is finished first."""
        self._closed.set()
        self._poked.set()
        self._thread.join()

    def _work(self) -> None:
        wait, seen = 0.0, -1.0
        while not self._closed.wait(wait):
            self._poked.wait()
            self._poked.clear()
            changed = self._changed()
            if self._closed.is_set() or changed == seen:
                wait = 0.0 if self._closed.is_set() else min(self.every, 1.0)
                continue
            seen, start = changed, time.monotonic()
            try:
                build_report(self.run_dir)
                self.made += 1
            except (OSError, ValueError) as error:
                if disk_full(error) is None:  # the run says that itself
                    log.warning("the report was not made: %s", error)
            wait = max(self.every, (time.monotonic() - start) / SHARE)

    def _changed(self) -> float:
        """When a step was last recorded [unix s]; 0 before the first."""
        metrics = self.run_dir / "metrics.jsonl"
        return metrics.stat().st_mtime if metrics.exists() else 0.0
