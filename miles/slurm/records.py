"""What is remembered of a run's jobs: the small files of RUN/slurm. Everything may be missing: a run that was submitted by hand has none."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from miles.data.store.epoch import newest_epoch
from miles.data.store.files import read_json, seal_json
from miles.data.store.run_dir import RunDir


def folder(run: RunDir) -> Path:
    """RUN/slurm."""
    return run.path / "slurm"


def _read(run: RunDir, name: str) -> dict[str, Any]:
    path = folder(run) / name
    return dict(read_json(path)) if path.exists() else {}


def submitted(run: RunDir) -> list[dict[str, Any]]:
    """Every job of this run so far, oldest first: {"job_id", "name", "groups", "time"}. Damaged when the record is not readable."""
    return list(_read(run, "job.json").get("submissions", []))


def excluded(run: RunDir) -> list[str]:
    """Nodes that no allocation of this run should have any more, sorted."""
    return sorted(_read(run, "exclude.json").get("nodes", {}))


def exclude(run: RunDir, found: Mapping[str, str], epoch: int) -> None:
    """Remember nodes and the reason, beside those that are there already."""
    known = _read(run, "exclude.json").get("nodes", {})
    new = {node: {"reason": reason, "time": time.time(), "epoch": epoch} for node, reason in found.items() if node not in known}
    if new:
        seal_json(folder(run) / "exclude.json", {"nodes": {**known, **new}})


def cancelled(run: RunDir) -> set[int]:
    """Jobs that the user cancelled: one that starts all the same ends at once."""
    return set(_read(run, "cancelled.json").get("jobs", []))


def cancel(run: RunDir, jobs: Iterable[int]) -> None:
    """Remember that the user cancelled jobs."""
    seal_json(folder(run) / "cancelled.json", {"jobs": sorted(cancelled(run) | set(jobs))})


def chain_began(run: RunDir) -> int:
    """The last attempt before the present chain of jobs was submitted; 0 for the first."""
    return int(_read(run, "chain.json").get("after_epoch", 0))


def begin_chain(run: RunDir) -> None:
    """Said before jobs are submitted: attempts up to now belong to an earlier command."""
    seal_json(folder(run) / "chain.json", {"after_epoch": newest_epoch(run)})
