"""`miles-submit plan`: what a run will be given, what it costs, whether it fits, and when it would start. Nothing is submitted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from miles.cli.inputs import configuration, plain_findings, with_absolute_paths
from miles.config.exits import OK, WRONG, ConfigError, UserError
from miles.config.placement import node_groups
from miles.config.schema import RunConfig
from miles.data.store.run_dir import RunDir
from miles.plan.judge import Finding
from miles.plan.memory import Memory, estimate, gpu_memory, shared
from miles.plan.model import GIB, facts
from miles.plan.place import counts_gpus, gpu_hours, page
from miles.slurm import checks, site, start
from miles.slurm.submission import Submission, by_hand, prepare

STYLE = {"error": "bold red", "warning": "yellow", "note": "dim"}
NOT_CHECKED = "not checked"
NOT_YET = "not before the errors are mended"


def plan(words: list[str], run_dir: Path | None, with_script: bool, as_json: bool) -> int:
    """Print the plan. Returns OK, or WRONG when something is an error."""
    config = with_absolute_paths(configuration(words))
    run = RunDir((run_dir or Path("runs") / config.name).absolute())
    found = [finding for finding in plain_findings(config) if finding.where != "model" or finding.level != "note"]
    submissions = prepare(config, run) if config.cluster.executor == "slurm" else []
    asked, starts = _ask(config, run, submissions)
    found = sorted([*found, *asked], key=lambda finding: ("error", "warning", "note").index(finding.level))
    whole = {
        "ok": not any(finding.level == "error" for finding in found),
        "name": config.name,
        "run_dir": str(run.path),
        "executor": config.cluster.executor,
        "placement": config.cluster.placement,
        "groups": page(config),
        "gpu_hours": dict(zip(("total", "words"), gpu_hours(config), strict=True)),
        "memory": _memory(config),
        "submissions": [
            {"name": each.name, "groups": list(each.groups), "file": each.file, "command": line, "start": when, "script": each.script}
            for each, line, when in zip(submissions, by_hand(run, submissions), starts, strict=True)
        ],
        "findings": [vars(finding) for finding in found],
    }
    if as_json:
        print(json.dumps(whole, indent=1, ensure_ascii=False))
    else:
        _show(config, whole, submissions if with_script else [], found)
    return OK if whole["ok"] else WRONG


def _ask(config: RunConfig, run: RunDir, submissions: list[Submission]) -> tuple[list[Finding], list[str]]:
    """(what Slurm has against it, when each submission would start in words)."""
    if not submissions:
        return [], []
    try:
        found = checks.refused(config, run, site.ask())
    except UserError as error:
        return [*checks.files(config, run), Finding("warning", "cluster.executor", f"{NOT_CHECKED} against a cluster: {error}")], [NOT_CHECKED] * len(submissions)
    starts: dict[str, str] = {}
    for each in submissions:
        if each.script not in starts and not any(finding.level == "error" for finding in found):
            starts[each.script], taken = start.estimate(each)
            if not taken:
                found.append(start.refusal(each, config, starts[each.script]))
    refused = any(finding.level == "error" for finding in found)  # all are submitted, or none
    return found, [NOT_YET if refused else starts[each.script] for each in submissions]


def _memory(config: RunConfig) -> dict[str, Any] | None:
    """The estimate, with its arithmetic; None where the model's dimensions are unknown."""
    try:
        model = facts(config.model)
    except ConfigError:  # among the findings
        return None
    if model is None:
        return None
    need: Memory = estimate(config, model.shape)
    return {
        "model": model.source,
        "shared": shared(config),
        "trainer": [{"what": line.what, "bytes": line.bytes, "words": line.words} for line in need.trainer_lines],
        "engine": [{"what": line.what, "bytes": line.bytes, "words": line.words} for line in need.engine_lines],
        "trainer_bytes": need.trainer,
        "engine_bytes": need.engine,
        "trainer_gpu_gib": gpu_memory(config, "train"),
        "engine_gpu_gib": gpu_memory(config, "rollout"),
        "loading": vars(need.loading) if need.loading else None,
        "notes": need.notes,
    }


def _show(config: RunConfig, whole: dict[str, Any], scripts: list[Submission], found: list[Finding]) -> None:
    out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    for name, text in [("run", f"{whole['name']}, in {whole['run_dir']}"), ("where", f"{whole['executor']}, {_placement(config)}"), *_groups(config, whole)]:
        out.print(f"{name:<12}{text}")
    total, words = whole["gpu_hours"]["total"], whole["gpu_hours"]["words"]
    unit = "GPU-hours" if any(counts_gpus(config, group) for group in node_groups(config)) else "node-hours"
    out.print(f"{unit:<12}{words}" + (f" = {total:g} at most" if total is not None else ""))
    for line in _memory_lines(config, whole["memory"]):
        out.print(line)
    for name, text in _jobs(config, whole):
        out.print(f"{name:<12}{text}")
    for finding in found:
        out.print(f"{finding.level}: {finding}", style=STYLE[finding.level])
    for each in {each.file: each for each in scripts}.values():
        out.print(f"\n--- {each.file}\n{each.script}", end="")


def _placement(config: RunConfig) -> str:
    words = {
        "colocate": "colocate: trainer and engines share the nodes of one allocation",
        "split": "split: trainer and engines divide one allocation",
        "het": "het: one heterogeneous job, a component a group",
        "jobs": "jobs: one job a group, which find each other",
    }
    chain = config.cluster.slurm
    return words[config.cluster.placement] + (f"; a chain of {chain.chain} jobs, one after another" if chain.requeue == "chain" else "")


def _groups(config: RunConfig, whole: dict[str, Any]) -> Iterator[tuple[str, str]]:
    counted = {group.name: counts_gpus(config, group) for group in node_groups(config)}
    for group in whole["groups"]:
        asked = dict(group["ask"])
        kind = asked.pop("gpu_type", None)
        gpus = f" × {group['gpus_per_node']} {kind or 'GPUs'}" if counted[group["group"]] else ""
        shown = ", ".join(f"{name} {_value(value)}" for name, value in asked.items() if name not in ("setup", "gpu_memory"))
        yield f"{group['group']}", f"{_count(group['nodes'], 'node')}{gpus}" + (f", {shown}" if shown else "")
        for place in group["components"]:
            for first, last, roles in _runs(place["nodes"]):
                first, last = first + place["first_node"], last + place["first_node"]
                said = ", ".join(_count(number, role) for role, number in roles.items())
                yield "", f"{place['component']} on {'node' if first == last else 'nodes'} {first if first == last else f'{first}-{last}'}: {said}" + ("" if first == last else " each")


def _runs(nodes: list[dict[str, int]]) -> Iterator[tuple[int, int, dict[str, int]]]:
    """(first, last, processes) of neighbouring nodes that have the same."""
    first = 0
    for number, roles in enumerate(nodes):
        if number + 1 == len(nodes) or nodes[number + 1] != roles:
            yield first, number, roles
            first = number + 1


def _memory_lines(config: RunConfig, memory: dict[str, Any] | None) -> Iterator[str]:
    if memory is None:
        yield f"{'memory':<12}unknown before the model is there (model.name or model.shape say its dimensions)"
        return
    yield f"{'memory':<12}by {memory['model']}; activations come on top"
    unit = "GPU" if config.cluster.device == "cuda" else "process"
    for who in ("trainer", "engine"):
        for line in memory[who]:
            yield f"{'':<12}{who} rank, {line['what']}: {line['words']} = {line['bytes'] / GIB:.1f} GiB"
        if memory[who]:
            has = memory[f"{who}_gpu_gib"]
            against = f" of {has:g} GiB" if has and unit == "GPU" else ""
            yield f"{'':<12}{who} rank: {memory[f'{who}_bytes'] / GIB:.1f} GiB{against}"
    if memory["shared"] and memory["engine"] and unit == "GPU":
        has = memory["trainer_gpu_gib"]
        yield f"{'':<12}together on a GPU: {(memory['trainer_bytes'] + memory['engine_bytes']) / GIB:.1f} GiB" + (f" of {has:g} GiB" if has else "")
    if memory["loading"]:
        yield f"{'':<12}trainer rank, {memory['loading']['what']}: {memory['loading']['words']} = {memory['loading']['bytes'] / GIB:.1f} GiB"
    for note in memory["notes"]:
        yield f"{'':<12}{note}"


def _jobs(config: RunConfig, whole: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if config.cluster.executor != "slurm":
        yield "start", "at once, on this machine"
        return
    seen: dict[str, str] = {each["name"]: each["start"] for each in whole["submissions"]}
    for name, when in seen.items():
        yield "start", when if len(seen) == 1 else f"{name}: {when}"


def _value(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(name if each is None else f"{name}={each}" for name, each in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value).lower() if isinstance(value, bool) else str(value)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
