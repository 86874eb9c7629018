"""What is wrong with a submission, before it is one: held against what the Slurm at hand has."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from miles.config.exits import UserError
from miles.config.placement import NodeGroup, node_groups
from miles.config.schema import RunConfig
from miles.config.units import hours, minutes_of
from miles.data.store.files import Damaged
from miles.data.store.run_dir import RunDir
from miles.plan.abilities import Level
from miles.plan.judge import Finding
from miles.slurm.command import slurm_command
from miles.slurm.hostlist import expand
from miles.slurm.options import gres
from miles.slurm.own_jobs import state_of
from miles.slurm.records import left_out, submitted
from miles.slurm.site import Node, Partition, Site

# Options of sbatch by the version that brought them: an older one only says that it doesn't know the word.
SINCE = {"segment": (23, 11), "stepmgr": (24, 5), "oom-kill-step": (24, 5)}
IMAGE_FILES = (".sqsh", ".sif", ".squashfs")


def refused(config: RunConfig, run: RunDir, site: Site) -> list[Finding]:
    """Errors and warnings, group by group."""
    found: list[Finding] = []
    out = left_out(run, config)
    for group in node_groups(config):
        where = f"cluster.groups.{group.name}"
        found += [Finding(level, f"{where}.{field}", text, mend) for level, field, text, mend in _group(config, group, site, out)]
    return [*found, *files(config, run), *in_use(run)]


def files(config: RunConfig, run: RunDir) -> Iterator[Finding]:
    """What needs no Slurm to be seen: a run directory that can't be written, images and interpreters that are not there."""
    there = next(each for each in (run.path, *run.path.parents) if each.exists())
    if there.is_dir() and not os.access(there, os.W_OK | os.X_OK):
        yield Finding("error", "--run-dir", f"{run.path} can't be written (no permission in {there})", "choose another --run-dir")
    odd = next((sign for sign in str(run.path) if sign == "\\" or ord(sign) < ord(" ")), None)
    if odd is not None:
        yield Finding("error", "--run-dir", f"{str(run.path)!r} holds {odd!r}, which Slurm takes for no part of a path", "choose another --run-dir")
    for group in node_groups(config):
        image = group.ask.container_image
        if image and (image.startswith(("/", ".")) or image.endswith(IMAGE_FILES)) and not Path(image).exists():
            yield Finding("error", f"cluster.groups.{group.name}.container_image", f"{image}: no such file", "import it first (docs/slurm.md), or name an image of a registry")
        if image and (sign := next((sign for sign in str(run.path) if sign in ":,"), None)) is not None:
            yield Finding("error", "--run-dir", f"{run.path} holds {sign!r}, which divides container mounts (group {group.name} has an image)", "choose another --run-dir")
    named = {f"cluster.groups.{group.name}.python": group.ask.python for group in node_groups(config) if not group.ask.container_image}
    for where, python in {**named, "cluster.slurm.python": config.cluster.slurm.python}.items():
        # Of a tree that only the nodes have nothing can be said here.
        if python and (path := Path(python)).is_absolute() and not path.exists() and path.parents[-2].exists():
            yield Finding("warning", where, f"{python} is not on this machine; without it on the nodes, too, nothing starts", "")


def in_use(run: RunDir) -> Iterator[Finding]:
    """A job of this run that waits or runs: another would only fence it off."""
    try:
        entries = {entry["job_id"]: entry for entry in submitted(run)}
    except Damaged as error:
        raise UserError(f"{error}; move it away to submit the run again") from error
    if not entries:
        return
    queued = str(slurm_command(["squeue", "--noheader", "--format=%A %T"], timeout=20.0).stdout)
    live = [(int(number), state) for number, _, state in (line.partition(" ") for line in queued.splitlines()) if int(number) in entries]
    live = [(job, state) for job, state in live if not state_of(entries[job]).over]  # its id may be another's by now
    if live:
        (job, state), folder = live[0], run.quoted
        yield Finding("error", "--run-dir", f"{run.path} is in use by job {job} ({state.lower()})", f"follow it with `miles-submit status {folder}`, end it with `miles-submit cancel {folder}`, or choose another --run-dir")


Word = tuple[Level, str, str, str]  # level, field of the group, message, mend


def _group(config: RunConfig, group: NodeGroup, site: Site, out: list[str]) -> Iterator[Word]:
    ask = group.ask
    yield from _too_old(group, site)
    named = ask.partition.split(",") if ask.partition else []
    unknown = [name for name in named if name not in site.partitions]
    if unknown:
        yield "error", "partition", f"no partition {unknown[0]!r} in this cluster", _nearest(unknown[0], site.partitions)
        return
    default = site.default()
    chosen = [site.partitions[name] for name in named] or ([default] if default else [])
    if not chosen:
        yield "error", "partition", "no partition is named, and the cluster has no default", _nearest("", site.partitions)
        return
    for partition in chosen:
        if not partition.up:
            yield "warning", "partition", f"partition {partition.name} is not up: the job waits", ""
    yield from _qos(group, chosen, site)
    yield from _account(group, chosen)
    yield from _time(group, chosen, site)
    yield from _nodes(config, group, chosen, site, out)


def _too_old(group: NodeGroup, site: Site) -> Iterator[Word]:
    given = {"segment"} if group.ask.segment else set()
    for name in sorted(given | set(group.ask.sbatch)):
        since = SINCE.get(name)
        if since and site.version < since:
            field = "segment" if name in given else f"sbatch.{name}"
            yield "error", field, f"--{name} needs Slurm {since[0]}.{since[1]:02d}, this is {site.version_text}", "leave it out" + (
                "; switches or constraint keep nodes together here" if name == "segment" else ""
            )


def _qos(group: NodeGroup, chosen: list[Partition], site: Site) -> Iterator[Word]:
    qos = group.ask.qos
    if qos is None:
        return
    if site.qos is not None and qos not in site.qos:
        yield "error", "qos", f"no qos {qos!r} in this cluster", _nearest(qos, site.qos)
        return
    for partition in chosen:
        if partition.allow_qos is not None and qos not in partition.allow_qos:
            yield "error", "qos", f"partition {partition.name} doesn't take qos {qos!r}", _nearest(qos, partition.allow_qos)


def _account(group: NodeGroup, chosen: list[Partition]) -> Iterator[Word]:
    account = group.ask.account
    for partition in chosen:
        if account and partition.allow_accounts is not None and account not in partition.allow_accounts:
            yield "error", "account", f"partition {partition.name} doesn't take account {account!r}", _nearest(account, partition.allow_accounts)


def _time(group: NodeGroup, chosen: list[Partition], site: Site) -> Iterator[Word]:
    asked = minutes_of(group.ask.time) if group.ask.time else None
    limits = [(f"partition {each.name}", each.max_minutes) for each in chosen]
    if group.ask.qos and site.qos:
        limits.append((f"qos {group.ask.qos}", site.qos.get(group.ask.qos)))
    for name, limit in limits:
        if limit is not None and group.ask.time and (asked is None or asked > limit):
            whole = f"{int(limit // 60)}:{int(limit % 60):02d}:00"
            yield "error", "time", f"{group.ask.time} is over the limit of {name}, {whole} ({hours(limit)})", f"set cluster.groups.{group.name}.time={whole}"


def _nodes(config: RunConfig, group: NodeGroup, chosen: list[Partition], site: Site, out: list[str]) -> Iterator[Word]:
    ask, where = group.ask, "partition " + ",".join(each.name for each in chosen)
    nodes = site.within(each.name for each in chosen)
    if ask.gres is None and gres(group, config.cluster.device):
        kinds = {kind for node in nodes for kind in node.gpus}
        if not kinds:
            having = sorted({node.partition for node in site.nodes if node.gpus})
            yield "error", "partition", f"{where} has no GPUs", f"set cluster.groups.{group.name}.partition={having[0]}" if having else "set cluster.device=cpu"
            return
        if ask.gpu_type and ask.gpu_type not in kinds:
            elsewhere = sorted({node.partition for node in site.nodes if ask.gpu_type in node.gpus})
            mend = f"set cluster.groups.{group.name}.partition={elsewhere[0]}" if elsewhere else _nearest(ask.gpu_type, kinds - {""})
            yield "error", "gpu_type", f"no GPU of type {ask.gpu_type!r} in {where}", mend
            return
        most = max(_gpus(node, ask.gpu_type) for node in nodes)
        if group.gpus_per_node > most:
            kind = f" {ask.gpu_type}" if ask.gpu_type else ""
            yield "error", "gpus_per_node", f"{group.gpus_per_node} GPUs a node, but the nodes of {where} have {most}{kind}", f"set cluster.groups.{group.name}.gpus_per_node={most}"
            return
        nodes = [node for node in nodes if _gpus(node, ask.gpu_type) >= group.gpus_per_node]
    for word in re.findall(r"[\w.+-]+", re.sub(r"\*\d+", "", ask.constraint or "")):
        features = {feature for node in nodes for feature in node.features}
        if not word.isdecimal() and word not in features:
            yield "error", "constraint", f"no node of {where} has the feature {word!r}", _nearest(word, features)
            return
    limits = [(f"{where} has", len(nodes)), *((f"partition {each.name} allows", each.max_nodes) for each in chosen if each.max_nodes is not None)]
    for text, limit in limits:
        if group.nodes > limit:
            yield "error", "nodes", f"{group.nodes} nodes are needed, {text} {limit}{_kind(config, group)}", _fewer(group)
            return
    if ask.nodelist and "/" not in ask.nodelist and (barred := [name for name in expand(ask.nodelist) if name in out]):
        yield "error", "nodelist", f"asks for {barred[0]}, which is left out as a bad node", "name others, or remove it from the exclude list (slurm/exclude.json of the run, or cluster.slurm.exclude_file)"
        return
    if out and (good := sum(node.name not in out for node in nodes)) < group.nodes:
        yield "error", "nodes", f"{group.nodes} nodes are needed, but {where} has {good} besides those that are left out as bad", "remove what is good again from the exclude list (slurm/exclude.json of the run, or cluster.slurm.exclude_file)"
        return
    up = sum(node.up for node in nodes)
    if up < group.nodes:
        yield "warning", "nodes", f"{group.nodes} nodes are needed, only {up} of the {len(nodes)} in {where} are up: the job waits", ""


def _gpus(node: Node, kind: str | None) -> int:
    return node.gpus.get(kind, 0) if kind else sum(node.gpus.values())


def _kind(config: RunConfig, group: NodeGroup) -> str:
    if group.ask.gres is not None or gres(group, config.cluster.device) is None:
        return ""
    return f" with {group.gpus_per_node} {group.ask.gpu_type or 'GPUs'}"


def _fewer(group: NodeGroup) -> str:
    if group.ask.nodes is not None:
        return f"lower cluster.groups.{group.name}.nodes"
    return "lower rollout.num_gpus" if group.components == ("rollout",) else "lower train.num_nodes"


def _nearest(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(name, known, 1, 0.5)
    if near:
        return f"did you mean {near[0]}?"
    return f"there are {', '.join(known)}" if known else "leave it out"
