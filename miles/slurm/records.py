"""What is remembered of a run's jobs: the small files of RUN/slurm. Everything may be missing: a run that was submitted by hand has none."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles.config.exits import UserError
from miles.data.store.epoch import newest_epoch
from miles.data.store.files import Damaged, read_json, seal_json
from miles.data.store.run_dir import RunDir

if TYPE_CHECKING:
    from miles.config.schema import RunConfig

KEYS = ("job_id", "name", "groups", "time", "cluster", "submitted", "output", "run_dir")  # of a submission


def folder(run: RunDir) -> Path:
    """RUN/slurm."""
    return run.path / "slurm"


def _read(run: RunDir, name: str) -> dict[str, Any]:
    path = folder(run) / name
    return dict(read_json(path)) if path.exists() else {}


def submitted(run: RunDir) -> list[dict[str, Any]]:
    """Every job of this run so far, oldest first (docs/formats.md has an entry's keys). Damaged when the record is not readable.

    A copied directory has none of the original's: they write into the other one.
    """
    return [entry for entry in _submissions(run) if run.is_at(entry["run_dir"])]


def note(run: RunDir, entry: Mapping[str, Any]) -> None:
    """Add a job, in place of an entry with its id. The command that submits and the job itself may do it at once."""
    with _locked(run):
        others = [each for each in _submissions(run) if each["job_id"] != entry["job_id"] or not run.is_at(each["run_dir"])]
        seal_json(folder(run) / "job.json", {"submissions": [*others, entry]})
        if entry["job_id"] in (known := cancelled(run)):  # an earlier job that had the id
            seal_json(folder(run) / "cancelled.json", {"jobs": sorted(known - {entry["job_id"]})})


def forget(run: RunDir, jobs: Iterable[int]) -> None:
    """Take jobs out again that were cancelled before the command that submitted them was done."""
    with _locked(run):
        gone = set(jobs)
        seal_json(folder(run) / "job.json", {"submissions": [each for each in _submissions(run) if each["job_id"] not in gone or not run.is_at(each["run_dir"])]})


def _submissions(run: RunDir) -> list[dict[str, Any]]:
    entries = list(_read(run, "job.json").get("submissions", []))
    for number, entry in enumerate(entries, 1):
        if missing := [key for key in KEYS if key not in entry]:
            raise Damaged(f"{folder(run) / 'job.json'}: submission {number} has no {', '.join(missing)}")
    return entries


@contextlib.contextmanager
def _locked(run: RunDir) -> Iterator[None]:
    """A file that is open for writing: a network file system locks no other."""
    folder(run).mkdir(parents=True, exist_ok=True)
    handle = os.open(folder(run) / "job.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


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
    with _locked(run):
        seal_json(folder(run) / "cancelled.json", {"jobs": sorted(cancelled(run) | set(jobs))})


def chain_began(run: RunDir) -> int:
    """The last attempt before the present chain of jobs was submitted; 0 for the first."""
    return int(_read(run, "chain.json").get("after_epoch", 0))


def begin_chain(run: RunDir) -> None:
    """Said before jobs are submitted: attempts up to now belong to an earlier command."""
    seal_json(folder(run) / "chain.json", {"after_epoch": newest_epoch(run)})
