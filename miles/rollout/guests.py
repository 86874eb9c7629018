"""Placement jobs: rollout nodes that come and go while the training goes on. Who they are, and who of them may generate.

A place is one supervisor with its engines and its worker, under a name that no other has. A worker's number is never given again, so
that a journal and a shard have one writer, also when somebody who was given up turns out to live.
"""

from __future__ import annotations

from typing import Any

from miles.config.exits import TryAgain


class Stale(TryAgain):
    """A call of another attempt, or of a place that was given up: it ends the caller, not the service."""


class Guests:
    """Places by name. `planned`: how many there are when all are here, which have the numbers from 0."""

    def __init__(self, planned: int) -> None:
        self.planned = planned
        self.numbers: dict[str, int] = {}
        self.lost: dict[str, str] = {}  # place: why
        self.checksum: str | None = None  # of the trainer's weights, once they were sent
        self.synced: dict[str, str] = {}  # engine's address: checksum of the weights that it holds, verified

    def number(self, wanted: int, place: str) -> int:
        """A worker's number: the one of its node, or the next that nobody ever had."""
        if place not in self.numbers:
            used = set(self.numbers.values())
            self.numbers[place] = wanted if wanted not in used else max([self.planned - 1, *used]) + 1
        return self.numbers[place]

    def lose(self, place: str, why: str) -> int | None:
        """Give a place up; returns its worker's number, if it had one."""
        self.lost[place] = why
        return self.numbers.get(place)

    def ready(self, worker: int, peers: list[dict[str, Any]], checksum: str) -> bool:
        """Whether all engines of a worker's place are there and hold the weights of this checksum."""
        place, engines = next(((peer["place"], peer["engines"]) for peer in peers if (peer["role"], peer["rank"]) == ("worker", worker)), ("", 0))
        held = [self.synced.get(peer["url"]) for peer in peers if peer["role"] == "engine" and peer["place"] == place]
        return 0 < engines <= len(held) and all(each == checksum for each in held)
