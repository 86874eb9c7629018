"""What the batch script's process is told by signals."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any


class Signals:
    """`by` is None, "slurm" (USR1: the time limit is near, or preemption; TERM: save, and go on later) or "user" (USR2, as `miles-submit cancel`
    sends it: save and end); `at` is when the first came [unix s]."""

    def __init__(self) -> None:
        self.by: str | None = None
        self.at: float | None = None
        for number, by in ((signal.SIGUSR1, "slurm"), (signal.SIGTERM, "slurm"), (signal.SIGUSR2, "user"), (signal.SIGINT, "user")):
            signal.signal(number, self._handler(by))

    def _handler(self, by: str) -> Callable[[int, Any], None]:
        def handler(number: int, frame: Any) -> None:
            self.at = self.at or time.time()
            self.by = "user" if "user" in (self.by, by) else by

        return handler
