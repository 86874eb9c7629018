"""A process that a role starts: it dies with the role, and the run's token stays out of what it prints."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import IO

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """For preexec_fn: the kernel kills the child when its parent is gone."""
    ctypes.CDLL("libc.so.6", use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def write_private(path: Path, text: str) -> None:
    """Make a file that only its owner reads; replaces an older one."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def relay(output: IO[bytes], token: str) -> None:
    """Copy a child's output to ours, line by line, without the token, until it ends."""
    for line in output:
        sys.stdout.buffer.write(line.replace(token.encode(), b"[token]"))
        sys.stdout.buffer.flush()
