"""How far a node's clock is from the first node's, measured over the network (Cristian's algorithm: the quickest answer counts)."""

from __future__ import annotations

import time
from collections.abc import Callable

from miles.slurm.preflight.hub import Guest
from miles.slurm.preflight.verdict import Verdict, ok

TRIES = 20


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
    """The figures. Whose clock is wrong is judged beside the other nodes': it may be the first node's."""
    away, bound = offset(hub, clock)
    return ok(f"{away * 1e3:+.1f} ms of the first node's clock (within {bound * 1e3:.1f} ms)", seconds=away, bound=bound)
