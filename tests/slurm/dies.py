"""Functions of a user that end what calls them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any


def build(folder: Path, seed: int) -> None:
    """A mistake."""
    raise ValueError("no such thing")


async def generate(*arguments: Any, **options: Any) -> Any:
    """kill -9 of the worker: every attempt comes to the same point."""
    os.kill(os.getpid(), signal.SIGKILL)
