"""What this trainer rank is doing, and how far it is: the main thread says it, the heartbeat passes it on to the watchdog."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

COLLECTIVES = "/torch/distributed/"
FILES = "/torch/distributed/checkpoint/"  # writes files, too


class Progress:
    """Phase and step, and a count that rises with every phase and micro-batch: all ranks count alike, so the lowest lags.

    `waits`: for a word of the rollout service, which may take as long as a rollout does.
    """

    def __init__(self) -> None:
        self.phase, self.step, self.count, self.waits = "start", 0, 0, False

    def tick(self) -> None:
        """One thing more is behind this rank."""
        self.count += 1

    @contextmanager
    def doing(self, phase: str, step: int) -> Iterator[None]:
        """A phase of a step; what comes after it goes by its name, until the next begins."""
        self.phase, self.step = phase, step
        self.tick()
        yield
        self.tick()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Until the rollout service answers."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False

    def told(self) -> dict[str, Any]:
        """For a heartbeat: the above, the line where the main thread is, and whether that is inside a collective."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        name = frame.f_code.co_filename if frame is not None else ""
        place = traceback.extract_stack(frame)[-1] if frame is not None else None
        return {
            "phase": self.phase,
            "step": self.step,
            "count": self.count,
            "waits": self.waits,
            "collective": COLLECTIVES in name and FILES not in name,
            "at": f"{place.filename}:{place.lineno} {place.name}" if place else "",
        }


HERE = Progress()  # of this process
