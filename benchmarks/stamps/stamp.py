"""When a process came to its first line of user code: a file each below MILES_BENCH_STAMPS."""

from __future__ import annotations

import os
import time
from pathlib import Path


def stamp(name: str) -> None:
    """Write the time [unix seconds] to a file that begins with the name."""
    now = time.time()
    folder = Path(os.environ["MILES_BENCH_STAMPS"])
    partial = folder / f".{name}.{os.getpid()}"
    partial.write_text(repr(now))
    partial.rename(folder / partial.name[1:])
