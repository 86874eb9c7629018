"""What is remembered of a run's jobs: the small files of RUN/slurm. Everything may be missing: a run that was submitted by hand has none."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles.config.exits import UserError
from miles.data.store.epoch import newest_epoch
from miles.data.store.files import Damaged, read_json, seal_json
from miles.data.store.run_dir import RunDir

if TYPE_CHECKING:
    from miles.config.schema import RunConfig


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


def exclude_list(run: RunDir, config: RunConfig) -> Path:
    """Where a preflight writes bad nodes: the list that several runs share, else the run's own."""
    shared = config.cluster.slurm.exclude_file
    return Path(shared) if shared else folder(run) / "exclude.json"


def left_out(run: RunDir, config: RunConfig) -> list[str]:
    """Nodes that are not asked for, sorted: the run's own bad ones, and those of cluster.slurm.exclude_file. UserError: that can't be read."""
    shared = config.cluster.slurm.exclude_file
    if not shared or not Path(shared).exists():
        return excluded(run)
    mend = "choose another, or remove it and let miles-submit preflight write it"
    try:
        content = read_json(Path(shared))
    except OSError as error:
        raise UserError(f"cluster.slurm.exclude_file: {shared} can't be read ({error.strerror}); {mend}") from error
    except Damaged as error:
        raise UserError(f"cluster.slurm.exclude_file: {error}; {mend}") from error
    nodes = content.get("nodes") if isinstance(content, dict) else None
    if not isinstance(nodes, dict) or not all(re.fullmatch(r"[\w.-]+", name) for name in nodes):
        raise UserError(f'cluster.slurm.exclude_file: {shared} is no list of nodes ({{"nodes": {{NAME: ...}}}}); {mend}')
    return sorted({*excluded(run), *nodes})


def exclude(run: RunDir, found: Mapping[str, str], epoch: int) -> None:
    """Remember nodes and the reason, beside those that are there already."""
    exclude_in(folder(run) / "exclude.json", found, epoch)


def exclude_in(path: Path, found: Mapping[str, str], epoch: int) -> None:
    """The same in any list; epoch 0: before any attempt."""
    known = dict(read_json(path)).get("nodes", {}) if path.exists() else {}
    new = {node: {"reason": reason, "time": time.time(), "epoch": epoch} for node, reason in found.items() if node not in known}
    if new:
        seal_json(path, {"nodes": {**known, **new}})


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
