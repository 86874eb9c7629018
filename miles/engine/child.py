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
    """Copy a child's output to ours, line by line, without the token, until it ends. Where ours can't be written any more (disk full), the rest
    is read all the same: the child must not wait at a full pipe."""
    writable = True
    for line in output:
        if not writable:
            continue
        try:
            sys.stdout.buffer.write(line.replace(token.encode(), b"[token]"))
            sys.stdout.buffer.flush()
        except OSError:
            writable = False  # there is no place left to say so; who writes the run's files names the disk


def around_proxies(host: str) -> dict[str, str]:
    """Variables for a child that reaches `host` without a proxy, besides those hosts that need none already."""
    found = {}
    for name, other in (("NO_PROXY", "no_proxy"), ("no_proxy", "NO_PROXY")):  # a library that reads one of them may not look at the other
        kept = os.environ.get(name) or os.environ.get(other)
        found[name] = host if not kept else kept if kept.strip() == "*" else f"{kept},{host}"
    return found
