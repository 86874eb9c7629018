"""What a private cluster looks like: nodes, partitions, and the waits of the real thing made short."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from miles.config.exits import UserError


@dataclass(frozen=True)
class NodeGroup:
    """`count` equal nodes: name0, name1, ... Memory is bookkeeping, nothing enforces it."""

    name: str
    count: int
    gpus: int = 0  # per node
    gpu_type: str = ""
    features: tuple[str, ...] = ()
    cpus: int = 16  # per node
    memory_mb: int = 32000  # per node

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes."""
        return [f"{self.name}{index}" for index in range(self.count)]


@dataclass(frozen=True)
class Partition:
    """A partition over whole node groups."""

    name: str
    groups: tuple[str, ...]
    tier: int = 10  # a higher one preempts the jobs of a preemptable lower one
    preemptable: bool = False
    default: bool = False


@dataclass(frozen=True)
class Layout:
    """Node groups, and partitions over them. From Slurm 23.11 on neighbours in a group share a block of topology/block, for --segment."""

    groups: tuple[NodeGroup, ...]
    partitions: tuple[Partition, ...]
    nodes_per_block: int = 2  # what is left over joins the last block; a smaller group has none

    @property
    def nodes(self) -> list[str]:
        """Names of all nodes, in the order of their groups."""
        return [node for group in self.groups for node in group.nodes]

    @property
    def blocks(self) -> dict[str, list[str]]:
        """{block: its nodes}."""
        found, size = {}, self.nodes_per_block
        for group in self.groups:
            number = group.count // size
            for index in range(number):
                last = group.count if index == number - 1 else (index + 1) * size
                found[f"{group.name}-block{index}"] = group.nodes[index * size : last]
        return found

    def with_counts(self, counts: Mapping[str, int]) -> Layout:
        """The same with other numbers of nodes; a group of 0 goes, and so does a partition without nodes. UserError for an unknown group."""
        known = [group.name for group in self.groups]
        for name, count in counts.items():
            if name not in known or count < 0:
                raise UserError(f"nodes: {name}={count} is no group of nodes with a count; groups are {', '.join(known)}, for instance {known[0]}=2")
        groups = tuple(replace(group, count=counts.get(group.name, group.count)) for group in self.groups)
        groups = tuple(group for group in groups if group.count)
        if not groups:
            raise UserError("nodes: none is left; give one group at least one node")
        left = {group.name for group in groups}
        partitions = [replace(part, groups=tuple(name for name in part.groups if name in left)) for part in self.partitions]
        partitions = [part for part in partitions if part.groups]
        if not any(part.default for part in partitions):
            partitions[0] = replace(partitions[0], default=True)
        return replace(self, groups=groups, partitions=tuple(partitions))


@dataclass(frozen=True)
class Settings:
    """Waits in seconds, and further lines for slurm.conf; a line whose key is ours replaces ours."""

    grace_seconds: int = 5  # a preempted job has from the warning signal to the kill
    requeue_delay_seconds: int = 5  # before a requeued job may start again; 5 is Slurm's least
    kill_wait_seconds: int = 3  # between SIGTERM and SIGKILL
    slurmd_timeout_seconds: int = 5  # a node that is silent for longer is down
    message_timeout_seconds: int = 4  # a message to a dead node is given up; twice this comes on top of the above
    lines: tuple[str, ...] = ()


ALL = ("train", "infer", "cpu")
DEFAULT = Layout(
    groups=(
        NodeGroup("train", 4, gpus=4, gpu_type="gb300", features=("aarch64",)),
        NodeGroup("infer", 4, gpus=8, gpu_type="h200", features=("x86_64",)),
        NodeGroup("cpu", 2),
    ),
    partitions=(
        Partition("gb300", ("train",), default=True),
        Partition("h200", ("infer",)),
        Partition("cpu", ("cpu",)),
        Partition("low", ALL, tier=1, preemptable=True),
        Partition("high", ALL, tier=20),
    ),
)
