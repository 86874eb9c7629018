"""A run directory and its small files: batches, checkpoints, provenance, metrics, events."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from miles.config.exits import UserError
from miles.config.lenient import usable
from miles.data.inspect.page import Page, Table, ranges
from miles.data.inspect.sequences import summarise_shards
from miles.data.store.checkpoint import SCHEMA as CHECKPOINT
from miles.data.store.checkpoint import STATE, read_complete, read_state
from miles.data.store.events import name_parts
from miles.data.store.files import Damaged, read_json, schema_kind
from miles.data.store.hdf5 import reading
from miles.data.store.manifest import NAME, SCHEMA, Manifest, read_manifest
from miles.data.store.metrics import read_lines, read_metrics
from miles.data.store.retention import ASIDE, size_of
from miles.data.store.run_dir import (
    COMPLETE,
    PLAN_SCHEMA,
    RunDir,
    journal_paths,
    read_provenance,
    read_provenance_file,
    read_run_yaml,
    steps_in,
)
from miles.data.store.shard import Shard, open_shard


def run_page(path: Path) -> Page:
    """A run directory: how far it came, and what of it is on disk."""
    run = RunDir(path)
    page = Page(path, "run directory")

    def told(name: str, read: Any) -> Any:
        try:
            return read()
        except (OSError, UserError) as error:
            page.notes.append(f"{name}: {' '.join(str(error).split())}")
            return None

    provenance = told("provenance.json", lambda: read_provenance(run)) or {}
    imported = provenance.get("imported") if isinstance(provenance.get("imported"), dict) else None
    config, wrong = usable((None if imported and not run.run_yaml.exists() else told("run.yaml", lambda: read_run_yaml(run))) or {})
    page.notes += [f"run.yaml: {line}" for line in wrong]
    lines = read_metrics(run.metrics)
    attempts = provenance.get("attempts", [])
    complete = [step for step in steps_in(run.checkpoints) if (run.checkpoint(step) / COMPLETE).is_file()]
    asides = [folder.name for parent in (run.batches, run.evals) if parent.is_dir() for folder in sorted(parent.iterdir()) if ASIDE.fullmatch(folder.name)]
    total = int((config.get("warm_start") or {}).get("steps") or 0) + int(config.get("num_rollout") or 0)
    page.facts |= {
        "run": config.get("name") or run.run_id(),
        "steps trained": f"{max((line['step'] for line in lines if line.get('kind') != 'eval'), default=0)} of {total}",
        "attempts": len(attempts),
        "guarantee": _tier(attempts),
        "complete checkpoints": ranges(complete),
    }
    if imported:
        page.facts["imported from"] = str(imported.get("from"))
    if asides:
        page.facts["set aside"] = asides
    routes = sum(1 for step in steps_in(run.batches) if any(run.batch(step).glob("routes.*.h5")))
    if routes:
        page.facts["batches with routes"] = routes
    journals = journal_paths(run.journal) if run.journal.is_dir() else []
    events = sorted(run.events.glob("*.jsonl")) if run.events.is_dir() else []
    rows: list[list[Any]] = [
        [name, ranges(steps_in(folder)), len(steps_in(folder)), sum(size_of(folder / each.name) for each in folder.glob("step_*"))]
        for name, folder in (("batches", run.batches), ("train", run.train_records), ("evals", run.evals), ("checkpoints", run.checkpoints))
        if folder.is_dir()
    ]
    rows += [[name, "–", len(files), sum(file.stat().st_size for file in files)] for name, files in (("batches/journal", journals), ("events", events)) if files]
    rows += [[name, "–", sum(1 for _ in folder.rglob("*")), size_of(folder)] for name, folder in (("attempts", run.attempts), ("hf", run.hf), ("report", run.report)) if folder.is_dir()]
    page.tables.append(Table("on disk", ["folder", "steps", "number", "bytes"], rows))
    return page


def _tier(attempts: list[dict[str, Any]]) -> str:
    told = [entry for entry in attempts if entry.get("tier")]
    if not told:
        return "none recorded"
    return str(told[-1]["tier"]) + (f": {told[-1]['why']}" if told[-1].get("why") else "")


def manifest_facts(manifest: Manifest) -> dict[str, Any]:
    """Lineage and sizes as a manifest has them."""
    policy = manifest.policy
    return {
        "run": manifest.run_id,
        "kind": manifest.kind,
        "step": manifest.step,
        "attempt": manifest.epoch,
        "weights": f"version {policy.weight_version}, checksum {policy.weight_checksum or 'none (no weights were needed)'}",
        "parent checkpoint": manifest.parent_checkpoint or "none",
        "tokenizer": manifest.tokenizer_hash,
        "sampling": manifest.sampling,
        "draws": f"{ranges(manifest.draws)} ({len(manifest.draws)})",
        "dropped": dict(Counter(each.why for each in manifest.dropped)),
        "next draw": manifest.next_draw,
        "assignment": ", ".join(
            f"{len(ranks)} ranks × {max((len(batches) for batches in ranks), default=0)} micro-batches" for ranks in manifest.assignment
        ) or "none",
    }  # fmt: skip


def batch_page(path: Path) -> Page:
    """A batch, by its folder or its manifest: lineage, files, and a summary of its sequences."""
    folder = path if path.is_dir() else path.parent
    manifest = read_manifest(folder / NAME if path.is_dir() else path)
    aside = " that was set aside" if ASIDE.fullmatch(folder.name) else ""
    page = Page(path, f"{'batch' if manifest.kind != 'eval' else 'evaluation'}{aside}", SCHEMA, manifest_facts(manifest))
    page.facts["guarantee"] = _tier_of(folder.parent.parent, manifest.epoch)
    page.facts["engines"] = [" ".join(f"{key}={value}" for key, value in engine.items()) for engine in manifest.engines]
    rows = [[kind, entry.name, entry.bytes, entry.sequences, entry.tokens, _presence(folder / entry.name, kind, entry.bytes)] for kind, entries in (("shard", manifest.shards), ("routes", manifest.routes)) for entry in entries]
    page.tables.append(Table("files", ["kind", "name", "bytes", "sequences", "tokens", "on disk"], rows))
    present = [folder / entry.name for entry in manifest.shards if (folder / entry.name).is_file()]
    if len(present) == len(manifest.shards):
        with reading(folder), ExitStack() as stack:
            engines = page.facts.pop("engines")
            summarise_shards(page, [stack.enter_context(_opened(shard)) for shard in present])
            page.facts["engines"] = engines or page.facts["engines"]
    return page


def _opened(path: Path) -> Shard:
    with reading(path):
        return open_shard(path)


def _tier_of(run: Path, epoch: int) -> str | None:
    """What the attempt that sealed a batch promised; None outside a run directory."""
    if not RunDir(run).provenance.is_file():
        return None
    return next((str(entry["tier"]) for entry in read_provenance(RunDir(run))["attempts"] if entry.get("epoch") == epoch and entry.get("tier")), None)


def _presence(path: Path, kind: str, size: int) -> str:
    if not path.is_file():
        return "deleted by retention" if kind == "routes" else "MISSING"
    return "there" if path.stat().st_size == size else f"OTHER SIZE: {path.stat().st_size}"


def checkpoint_page(path: Path) -> Page:
    """A checkpoint, by its folder, its state.json or its COMPLETE."""
    folder = path if path.is_dir() else path.parent
    page = Page(path, "checkpoint" if path.is_dir() else f"{path.name} of a checkpoint", CHECKPOINT)
    if path.name != COMPLETE:
        state = read_state(folder)
        page.facts |= {key: value for key, value in state.items() if key != "schema"}
    if path.name == STATE:
        return page
    if not (folder / COMPLETE).is_file():
        page.notes.append(f"unfinished: {COMPLETE} is missing, so no run resumes from it")
        return page
    files = read_complete(folder).files
    page.facts |= {"files": len(files), "bytes": sum(file.bytes for file in files)}
    parts: dict[str, list[int]] = {}
    for file in files:
        parts.setdefault(file.name.split("/")[0], []).append(file.bytes)
    page.tables.append(Table("files", ["part", "files", "bytes"], [[name, len(sizes), sum(sizes)] for name, sizes in sorted(parts.items())]))
    return page


def provenance_page(path: Path) -> Page:
    """provenance.json: every attempt, where and with what."""
    content = read_provenance_file(path)
    attempts = content["attempts"]
    page = Page(path, "provenance: what ran where, with which versions and which guarantee", content["schema"], {"run": content.get("run_id"), "attempts": len(attempts), "guarantee": _tier(attempts)})
    columns = ["epoch", "time", "host", "cpu", "gpus", "threads", "ranks", "kernels", "tier", "changed"]
    rows = [
        [
            entry.get("epoch"), when(entry.get("time")), entry.get("host"), entry.get("cpu"), ", ".join(entry.get("gpus") or []), entry.get("threads"),
            (entry.get("layout") or {}).get("ranks"), entry.get("kernels"), entry.get("tier"), ", ".join(entry.get("changed") or []),
        ]
        for entry in attempts
    ]  # fmt: skip
    page.tables.append(Table("attempts", columns, rows))
    if attempts:
        page.facts["versions of the last"] = attempts[-1].get("versions", {})
    return page


def plan_page(path: Path) -> Page:
    """plan.json."""
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("summary", {}), dict):
        raise Damaged(f"{path}: an object with a summary expected, {content!r:.60} found")
    schema_kind(content.get("schema"), PLAN_SCHEMA, path)
    return Page(path, "plan: what the run was to do", content.pop("schema"), {**content.pop("summary", {}), **content})


def yaml_page(path: Path) -> Page:
    """run.yaml: the resolved configuration, flat."""
    config = read_run_yaml(RunDir(path.parent))
    return Page(path, "resolved configuration of a run", None, _flat(config, ""))


def _flat(value: dict[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, each in value.items():
        found |= _flat(each, f"{prefix}{key}.") if isinstance(each, dict) and each else {f"{prefix}{key}": each}
    return found


def metrics_page(path: Path) -> Page:
    """metrics.jsonl: lines of each kind, and the last values."""
    lines = read_metrics(path)
    without = len(read_lines(path)) - len(lines)
    page = Page(path, "metrics: one line a step", None, {"bytes": path.stat().st_size, "lines": len(lines)})
    kinds: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        kinds.setdefault(str(line.get("kind")), []).append(line)
    page.tables.append(Table("kinds", ["kind", "lines", "steps"], [[kind, len(found), ranges([line["step"] for line in found])] for kind, found in kinds.items()]))
    for kind, found in kinds.items():
        values = {name: value for name, value in found[-1].items() if name not in ("step", "kind", "time")}
        page.tables.append(Table(f"last {kind} (step {found[-1]['step']})", ["metric", "value"], [[name, value] for name, value in values.items()]))
    if without:
        page.notes.append(f"{without} line{'s' if without > 1 else ''} without a step (a whole number) passed over")
    _torn(page, path)
    return page


def events_page(path: Path) -> Page:
    """Phases of one process."""
    component, rank, epoch = name_parts(path) or (path.stem, 0, 0)
    lines = [line for line in read_lines(path) if isinstance(line.get("start"), int | float) and isinstance(line.get("end"), int | float)]
    page = Page(path, "events: phases of one process, for the timeline", None, {"component": component, "rank": rank, "attempt": epoch, "bytes": path.stat().st_size, "phases": len(lines)})
    phases: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        phases.setdefault(str(line.get("phase")), []).append(line)
    rows = [[phase, len(found), ranges([step for line in found if isinstance(step := line.get("step", 0), int)]), sum(line["end"] - line["start"] for line in found), sum(1 for line in found if "error" in line)] for phase, found in phases.items()]
    page.tables.append(Table("phases", ["phase", "times", "steps", "seconds", "errors"], rows))
    if lines:
        page.facts |= {"from": when(lines[0]["start"]), "to": when(max(line["end"] for line in lines))}
    _torn(page, path)
    return page


def _torn(page: Page, path: Path) -> None:
    """Say how many lines are not whole: of a killed writer, or of one that is writing."""
    lines = [line for line in path.read_bytes().split(b"\n") if line]
    torn = len(lines) - sum(1 for line in lines if _is_object(line))
    if torn:
        page.notes.append(f"{torn} torn line{'s' if torn > 1 else ''} (of a writer that was killed, or is writing) passed over")


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def when(seconds: Any) -> str | None:
    """A time in words, UTC."""
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return None
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
