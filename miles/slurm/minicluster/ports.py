"""TCP ports for a cluster that no other cluster of this machine takes."""

from __future__ import annotations

import random
import socket

FIRST, LAST, BLOCK = 10240, 32768, 64  # below the ports that the kernel gives to connections


def reserve(count: int) -> tuple[list[int], socket.socket]:
    """`count` free ports, and a socket whose name holds them: they are ours for as long as it, or a process that inherits it, is open."""
    assert count <= BLOCK, count
    for first in random.SystemRandom().sample(range(FIRST, LAST - BLOCK, BLOCK), 100):
        holder = socket.socket(socket.AF_UNIX)
        try:
            holder.bind(f"\0miles-minicluster-{first}")
        except OSError:
            holder.close()
            continue
        ports = list(range(first, first + count))
        if all(map(_free, ports)):
            return ports, holder
        holder.close()
    raise RuntimeError(f"no {count} free TCP ports in a row between {FIRST} and {LAST}")


def _free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
