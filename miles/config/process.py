"""A process of a run, as every node's supervisor knows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Process:
    """A process of a node: role, rank among `count` of its kind in the run, and its accelerators as indices on that node."""

    role: str
    rank: int
    count: int
    gpus: tuple[int, ...]
