"""How far a node's clock is from the first node's, measured over the network (Cristian's algorithm: the quickest answer counts)."""

from __future__ import annotations

import time
from collections.abc import Callable

from miles.slurm.preflight.hub import Guest
from miles.slurm.preflight.verdict import Verdict, broken, ok, slow

TRIES = 20
BROKEN_SECONDS = 5.0  # tokens, leases and make's rules go wrong
SLOW_SECONDS = 0.5  # logs of several nodes can't be ordered


def offset(hub: Guest, clock: Callable[[], float] = time.time) -> tuple[float, float]:
    """(this clock minus the hub's [s], bound of the error [s])."""
    found = []
    for _ in range(TRIES):
        before, began = clock(), time.monotonic()
        there = float(hub.ask()["time"])
        spent = time.monotonic() - began
        found.append((spent, before + spent / 2 - there))
    spent, best = min(found)
    return best, spent / 2


def skew(hub: Guest, clock: Callable[[], float] = time.time) -> Verdict:
    """The verdict on it; what may be the measurement's own error is forgiven."""
    away, bound = offset(hub, clock)
    sure = max(abs(away) - bound, 0.0)
    detail = f"{away * 1e3:+.1f} ms of the first node's clock (within {bound * 1e3:.1f} ms)"
    judge = broken if sure > BROKEN_SECONDS else slow if sure > SLOW_SECONDS else ok
    return judge(detail if judge is ok else f"{detail}: set up NTP or PTP on the node", seconds=away)
