"""Which processes each node of an attempt starts, and with what.

Written by the launcher, which has the configuration: loading and checking that takes longer than all else that a node does before its processes start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from miles.config.process import Process
from miles.data.store.files import read_json, seal_json

NAME = "processes.json"


@dataclass(frozen=True)
class StartList:
    """cluster.host, .device and .threads; and of each component, by its node, the processes."""

    host: str
    device: str
    threads: int
    components: Mapping[str, Sequence[Sequence[Process]]]

    def write(self, attempt: Path) -> None:
        """Into an attempt's folder."""
        nodes = {name: [[astuple(process) for process in node] for node in nodes] for name, nodes in self.components.items()}
        seal_json(attempt / NAME, {**asdict(self), "components": nodes})

    @classmethod
    def read(cls, attempt: Path) -> StartList:
        """What was written."""
        found = read_json(attempt / NAME)
        nodes = {name: [[Process(role, rank, count, tuple(gpus)) for role, rank, count, gpus in node] for node in nodes] for name, nodes in found["components"].items()}
        return cls(found["host"], found["device"], found["threads"], nodes)
