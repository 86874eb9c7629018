"""What the Slurm at hand has: its version, partitions, nodes and qos, asked of it once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from miles.config.exits import UserError
from miles.config.units import minutes_of
from miles.slurm.command import slurm_command

ASK_SECONDS = 20.0
GONE = ("down", "fail", "future", "planned_down", "unknown")


@dataclass(frozen=True)
class Partition:
    """A partition. None: no limit, or no restriction."""

    name: str
    default: bool
    up: bool
    max_nodes: int | None
    max_minutes: float | None
    default_minutes: float | None
    allow_qos: tuple[str, ...] | None
    allow_accounts: tuple[str, ...] | None


@dataclass(frozen=True)
class Node:
    """A node in one of its partitions; gpus: number by type, "" where no type is named."""

    name: str
    partition: str
    gpus: dict[str, int]
    features: frozenset[str]
    up: bool


@dataclass(frozen=True)
class Site:
    """A cluster's answers. qos: names to the longest time [minutes]; None where there is no accounting to ask."""

    version: tuple[int, ...]
    version_text: str
    partitions: dict[str, Partition]
    nodes: tuple[Node, ...]
    qos: dict[str, float | None] | None

    def default(self) -> Partition | None:
        """The partition of a job that names none."""
        return next((each for each in self.partitions.values() if each.default), None)

    def within(self, partitions: Iterable[str]) -> list[Node]:
        """Nodes of these partitions, each once."""
        wanted = set(partitions)
        return list({node.name: node for node in self.nodes if node.partition in wanted}.values())


def ask() -> Site:
    """Ask Slurm. UserError: its commands are absent, or it doesn't answer."""
    # One after another they would take a busy controller's time four times over.
    with ThreadPoolExecutor(4) as pool:
        version, partitions, nodes, qos = pool.map(
            lambda question: question(),
            (
                lambda: _said("sinfo", "--version"),
                lambda: _said("scontrol", "--oneliner", "show", "partition"),
                lambda: _said("sinfo", "--noheader", "--Node", "--format=%N|%R|%G|%f|%T"),
                _qos,
            ),
        )
    number = re.search(r"\d+(\.\d+)+", version)
    if number is None:
        raise UserError(f"sinfo --version: {version.strip()!r} names no version; check which sinfo is on PATH")
    found = [_partition(line) for line in partitions.splitlines() if line.strip()]
    return Site(
        tuple(int(part) for part in number[0].split(".")),
        number[0],
        {each.name: each for each in found},
        tuple(_node(line) for line in nodes.splitlines() if line.strip()),
        qos,
    )


def _said(*command: str) -> str:
    return str(slurm_command(list(command), timeout=ASK_SECONDS).stdout)


def _qos() -> dict[str, float | None] | None:
    try:
        lines = _said("sacctmgr", "--noheader", "--parsable2", "show", "qos", "format=Name,MaxWall").splitlines()
    except UserError:  # no accounting here: sbatch itself says what it thinks of a qos
        return None
    return {name: minutes_of(wall) if wall else None for name, _, wall in (line.partition("|") for line in lines) if name}


def _partition(line: str) -> Partition:
    fields = dict(word.split("=", 1) for word in line.split() if "=" in word)

    def minutes(text: str) -> float | None:
        return None if text in ("UNLIMITED", "NONE") else minutes_of(text)

    def names(key: str) -> tuple[str, ...] | None:
        said = fields.get(key, "ALL")
        return None if said in ("ALL", "(null)", "N/A") else tuple(said.split(","))

    nodes = fields.get("MaxNodes", "UNLIMITED")
    return Partition(
        fields["PartitionName"],
        fields.get("Default") == "YES",
        fields.get("State", "UP") == "UP",
        int(nodes) if nodes.isdecimal() else None,
        minutes(fields.get("MaxTime", "UNLIMITED")),
        minutes(fields.get("DefaultTime", "NONE")),
        names("AllowQos"),
        names("AllowAccounts"),
    )


def _node(line: str) -> Node:
    name, partition, gres, features, state = line.split("|")
    gpus: dict[str, int] = {}
    for kind, count in re.findall(r"(?:^|,)gpu:(?:([^:,()]+):)?(\d+)", gres):
        gpus[kind] = gpus.get(kind, 0) + int(count)
    up = not state.rstrip("*~#!%$@^-+").lower().startswith(GONE) and not state.endswith("*")
    return Node(name, partition, gpus, frozenset(features.split(",")) - {"(null)"}, up)
