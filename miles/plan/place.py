"""Judgement of who runs where, and what an allocation costs: arithmetic on the groups of nodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from miles.config.allocation import Group
from miles.config.placement import NodeGroup, engines, node_groups, parts, processes
from miles.config.schema import RunConfig
from miles.config.units import minutes_of
from miles.plan.abilities import Entry


def misplaced(config: RunConfig) -> Iterator[Entry]:
    """Errors and warnings: components that don't fit their nodes, groups that nothing reads."""
    yield from _room(config)
    yield from _unread(config)
    for group in node_groups(config):
        yield from _segment(group)
        yield from _domain(config, group)
        yield from _idle(config, group)
        limit = minutes_of(group.ask.time) if group.ask.time else None
        if config.cluster.executor == "slurm" and limit is not None and limit * 60 <= config.cluster.slurm.lead_seconds:
            yield (
                "error",
                f"cluster.groups.{group.name}.time",
                f"{group.ask.time} is no longer than the {config.cluster.slurm.lead_seconds} s before the limit at which the run ends (cluster.slurm.lead_seconds)",
                "raise the time, or lower cluster.slurm.lead_seconds",
            )


def _room(config: RunConfig) -> Iterator[Entry]:
    train, rollout = config.train, config.rollout
    for group in node_groups(config):
        if "train" in group.components and train.num_gpus_per_node > group.gpus_per_node:
            yield (
                "error",
                "train.num_gpus_per_node",
                f"{train.num_gpus_per_node} ranks on a node of {_gpus_field(config, group)} {group.gpus_per_node}",
                f"set train.num_gpus_per_node={group.gpus_per_node}",
            )
        needed = sum(part.nodes for part in parts(config)) if config.cluster.placement == "split" and len(parts(config)) > 1 else train.num_nodes
        if "train" in group.components and group.ask.nodes is not None and group.ask.nodes < train.num_nodes:
            yield "error", f"cluster.groups.{group.name}.nodes", f"{group.ask.nodes} nodes, but train.num_nodes is {train.num_nodes}", f"set it to {needed}, or leave it out"
            return
    rollouts = next((group for group in node_groups(config) if "rollout" in group.components), None)
    if rollouts is None:
        return
    if rollout.num_gpus_per_engine > rollouts.gpus_per_node:
        yield (
            "error",
            "rollout.num_gpus_per_engine",
            f"{rollout.num_gpus_per_engine} accelerators of one engine, a node has {rollouts.gpus_per_node}: engines over several nodes are not there yet",
            f"set rollout.num_gpus_per_engine={rollouts.gpus_per_node}",
        )
        return
    place = next(part for part in parts(config) if part.component == "rollout")
    if place.nodes < 1:
        yield "error", f"cluster.groups.{rollouts.name}.nodes", f"{rollouts.nodes} nodes leave none for the engines beside train.num_nodes {train.num_nodes}", "raise it, or leave it out"
        return
    if config.cluster.device == "cpu" and config.cluster.executor == "local":
        return  # processes of this machine, as many as asked for
    most = -(-engines(config) // place.nodes) * rollout.num_gpus_per_engine
    if most > place.gpus:
        fit = place.gpus // rollout.num_gpus_per_engine * rollout.num_gpus_per_engine * place.nodes
        yield (
            "error",
            "rollout.num_gpus",
            f"{engines(config)} engines of {rollout.num_gpus_per_engine} on {place.nodes} nodes of {place.gpus} accelerators do not fit",
            f"set rollout.num_gpus={fit}, or more nodes for the engines",
        )


def _gpus_field(config: RunConfig, group: NodeGroup) -> str:
    return f"cluster.groups.{group.name}.gpus_per_node" if group.ask.gpus_per_node else "cluster.gpus_per_node"


def _unread(config: RunConfig) -> Iterator[Entry]:
    """Groups that this placement has no nodes for."""
    used = {"all", *(group.name for group in node_groups(config))}
    for name in ("train", "rollout"):
        if name not in used and getattr(config.cluster.groups, name) != Group():
            yield (
                "warning",
                f"cluster.groups.{name}",
                f"has no effect with cluster.placement={config.cluster.placement}, whose only group is `all`",
                "set cluster.placement=het, or write it in cluster.groups.all",
            )


def _idle(config: RunConfig, group: NodeGroup) -> Iterator[Entry]:
    """Nodes that are paid for and run nothing."""
    used = max((part.first_node + part.nodes for part in parts(config) if part.group == group.name), default=0)
    where = f"cluster.groups.{group.name}.nodes"
    if config.cluster.executor == "slurm" and group.ask.nodes is not None and 0 < used < group.nodes:
        yield "warning", where, f"{group.nodes} nodes are allocated, {group.nodes - used} of them run nothing", f"set it to {used}, or leave it out"


def _segment(group: NodeGroup) -> Iterator[Entry]:
    ask, where = group.ask, f"cluster.groups.{group.name}.segment"
    if ask.segment and group.nodes % ask.segment:
        fit = max(size for size in range(1, ask.segment + 1) if group.nodes % size == 0)
        yield "error", where, f"segments of {ask.segment} nodes do not divide the group's {group.nodes} nodes", f"set {where}={fit}"
    if ask.segment and ask.domain_nodes and ask.segment > ask.domain_nodes:
        yield "error", where, f"{ask.segment} nodes are more than the {ask.domain_nodes} of one NVLink domain", f"set {where}={ask.domain_nodes}"


def _domain(config: RunConfig, group: NodeGroup) -> Iterator[Entry]:
    """An expert-parallel group lies in one NVLink domain: its all-to-all is slow beyond. Ranks of a group are consecutive."""
    parallel, per_node = config.train.parallel, config.train.num_gpus_per_node
    ask, members = group.ask, parallel.expert * parallel.inside_expert
    if "train" not in group.components or not ask.domain_nodes or ask.cross_domain or parallel.expert == 1 or members <= per_node:
        return
    told = f"cluster.groups.{group.name}.cross_domain=true"
    where, said = "train.parallel.expert", f"an expert-parallel group of {members} ranks"
    if members > ask.domain_nodes * per_node:
        size = ask.domain_nodes * per_node // parallel.inside_expert
        fit = max(size for size in range(1, size + 1) if parallel.expert % size == 0)
        yield "error", where, f"{said} does not fit in one NVLink domain of {ask.domain_nodes} nodes × {per_node} = {ask.domain_nodes * per_node} ranks", f"set {where}={fit}, or {told}"
        return
    aligned = [size for size in range(1, ask.domain_nodes + 1) if size * per_node % members == 0 and config.train.num_nodes % size == 0]
    if ask.segment in aligned:
        return
    mend = f"set cluster.groups.{group.name}.segment={aligned[-1]}" if aligned else f"take a multiple of {-(-members // per_node)} nodes"
    has = f"segments of {ask.segment} nodes × {per_node} ranks" if ask.segment else "without a segment, nodes may come from any domain, so"
    text = f"{has} would let {said} cross an NVLink domain" if not ask.segment else f"{has} would cut {said}, which then crosses NVLink domains"
    yield "error", where, text, f"{mend}, or {told}"


def gpu_hours(config: RunConfig) -> tuple[float | None, str]:
    """(GPU-hours of one job to its time limits, the sum in words); None where a group names no limit. On cpu: of nodes."""
    found: list[str] = []
    total: float | None = 0.0
    for group in node_groups(config):
        limit = minutes_of(group.ask.time) if group.ask.time else None
        units = group.nodes * (group.gpus_per_node if counts_gpus(config, group) else 1)
        found.append(f"{group.nodes} node{'s' if group.nodes > 1 else ''}" + (f" × {group.gpus_per_node} GPUs" if counts_gpus(config, group) else "") + (f" × {limit / 60:g} h" if limit else " × ? h (no time)"))
        total = None if total is None or limit is None else total + units * limit / 60
    return total, " + ".join(found)


def counts_gpus(config: RunConfig, group: NodeGroup) -> bool:
    """Whether the group's accelerators are real ones."""
    return config.cluster.device == "cuda" or group.ask.gpu_type is not None


def page(config: RunConfig) -> list[dict[str, Any]]:
    """The groups: nodes, accelerators, what is asked of Slurm, and the processes of each component's nodes."""
    found = []
    for group in node_groups(config):
        places = []
        for part in parts(config):
            if part.group == group.name:
                places.append({"component": part.component, "first_node": part.first_node, "nodes": [_node(config, part.component, i) for i in range(part.nodes)]})
        asked = {name: value for name, value in group.ask if value not in (None, [], {}) and name not in ("nodes", "gpus_per_node")}
        found.append({"group": group.name, "nodes": group.nodes, "gpus_per_node": group.gpus_per_node, "ask": asked, "components": places})
    return found


def _node(config: RunConfig, component: str, node: int) -> dict[str, int]:
    """Processes of a node by role."""
    count: dict[str, int] = {}
    for process in processes(config, component, node):
        count[process.role] = count.get(process.role, 0) + 1
    return count
