"""A generate function that ends its worker: every attempt comes to the same point."""

from __future__ import annotations

import os
import signal
from typing import Any


async def generate(*arguments: Any, **options: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)
