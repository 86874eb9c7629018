"""Whether the trainer's ranks still get on, and who holds them up if not. No clock of its own, no network.

A rank that hangs is one of three: it says nothing any more (stopped, its node gone); it lags behind the others, which wait for it in a
collective; or it is as far as they are, but not in the collective.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Rank:
    """Latest word of one rank: what it does, since when, and when it was last heard [s]."""

    node: str
    told: dict[str, Any]
    since: float
    heard: float
    dumped: bool = False


@dataclass(frozen=True)
class Hang:
    """Who holds the run up (rank None: nobody could be told from the others), and the line that says so."""

    role: str
    rank: int | None
    node: str | None
    reason: str

    @property
    def culprit(self) -> dict[str, Any]:
        """Role, rank and node; None for what isn't known."""
        return {"role": self.role, "rank": self.rank, "node": self.node or None}


def beat_seconds(hang_seconds: float) -> float:
    """Between two heartbeats of a trainer rank, so that a silent one is told from one that hangs."""
    return min(2.0, hang_seconds / 4)


class Watchdog:
    """Heartbeats of trainer ranks. hang_seconds: without progress of any; beat_seconds: between two words of a rank that lives; count: of ranks."""

    def __init__(self, hang_seconds: float, beat_seconds: float, count: int) -> None:
        self.hang_seconds, self.silent_seconds, self.count = hang_seconds, 3 * beat_seconds, count
        self.ranks: dict[int, Rank] = {}

    def note(self, rank: int, node: str, told: dict[str, Any], now: float, dumped: bool = False) -> None:
        """A heartbeat. told: phase, step, count, waits, collective, at (miles.training.progress)."""
        before = self.ranks.get(rank)
        moved = before is None or any(before.told[name] != told[name] for name in ("phase", "step", "count", "waits"))
        since = now if before is None or moved else before.since
        self.ranks[rank] = Rank(node, told, since, now, dumped)

    def hang(self, now: float) -> Hang | None:
        """Who holds the run up, once no rank has got on for hang_seconds; None before, and while the first rank waits for the service."""
        if 0 not in self.ranks or self.ranks[0].told["waits"] or now - max(rank.since for rank in self.ranks.values()) < self.hang_seconds:
            return None
        if absent := [number for number in range(self.count) if number not in self.ranks]:
            return Hang("trainer", absent[0], None, f"trainer {absent[0]} was never heard of, and no other rank got on for {self.hang_seconds:g} s")
        silent = [number for number, rank in sorted(self.ranks.items()) if now - rank.heard > self.silent_seconds]
        if silent:
            return self._of(silent[0], f"says nothing since {now - self.ranks[silent[0]].heard:.0f} s")
        working = {number: rank for number, rank in sorted(self.ranks.items()) if not rank.told["waits"]}
        last = min(rank.told["count"] for rank in working.values())
        behind = [number for number, rank in working.items() if rank.told["count"] == last]
        found = [number for number in behind if not self.ranks[number].told["collective"]] or (behind if len(behind) < len(working) else [])
        if not found:
            return Hang("trainer", None, None, f"no trainer rank got on for {self.hang_seconds:g} s, and all of them wait for each other; their stacks are in their logs")
        return self._of(found[0], "lags behind the others" if len(behind) < len(working) else "is not where the others wait")

    def _of(self, number: int, why: str) -> Hang:
        rank = self.ranks[number]
        what = f"last heard in phase {rank.told['phase']} of step {rank.told['step']}, at {rank.told['at']}"
        line = f"trainer {number} on node {rank.node} hangs: it {why} ({what}), and no rank got on for {self.hang_seconds:g} s"
        return Hang("trainer", number, rank.node, f"{line}; stacks are in the trainers' logs")

    def all_dumped(self, now: float) -> bool:
        """Whether every rank that still speaks has written its stacks."""
        return all(rank.dumped for rank in self.ranks.values() if now - rank.heard <= self.silent_seconds)
