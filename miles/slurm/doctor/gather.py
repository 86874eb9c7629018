"""Reads a run's directory, Slurm's records and the ends of logs into one Evidence. Whatever is missing is left out; nothing is changed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from pathlib import Path
from typing import Any

from miles.config.compose import load_config
from miles.config.exits import UserError
from miles.config.placement import components, node_groups, part, processes
from miles.config.schema import RunConfig
from miles.data.service_call import call_attempt
from miles.data.store.epoch import newest_epoch
from miles.data.store.files import Damaged, read_json
from miles.data.store.run_dir import RunDir, newest_complete_checkpoint, read_provenance
from miles.slurm import nodes, own_jobs, records
from miles.slurm.doctor.evidence import Ended, Evidence, Line
from miles.slurm.states import JobState

TAIL_BYTES = 1 << 20  # of a log: a run's end is at its end
ROLE_LOG = re.compile(r"(service|trainer|engine|worker)\.(\d+)\.log")


def gather(run: RunDir) -> Evidence:
    """Everything at hand. UserError: the folder is no run directory, or its run.yaml can't be read."""
    if (run.path / "sweep.json").is_file():
        raise UserError(f"{run.path}: a sweep; give one of its runs, which `miles-submit status {run.quoted}` lists")
    if not run.run_yaml.is_file():
        raise UserError(f"{run.path}: not a run directory (no run.yaml); give the folder that --run-dir named")
    config = load_config([run.run_yaml])
    attempts = _attempts(run)
    jobs, unasked = _jobs(run)
    mine = attempts[-1].nodes if attempts else ()
    broken: dict[str, str] = {}
    if jobs and mine:
        try:
            broken = nodes.broken(mine)
        except UserError as error:
            unasked = unasked or str(error)
    room = os.statvfs(run.path)
    return Evidence(
        run=str(run.path),
        attempts=attempts,
        jobs=jobs,
        cancelled=frozenset(records.cancelled(run)),
        logs=_logs(run, jobs),
        homes=homes(config, mine),
        broken_nodes=broken,
        free_bytes=room.f_bavail * room.f_frsize,
        restarts=config.cluster.restarts,
        requeue=config.cluster.slurm.requeue,
        unasked=unasked,
        lives=_lives(run, attempts, jobs),
        saved=newest_complete_checkpoint(run) is not None,
        submitted=tuple(entry["job_id"] for entry in records.submitted(run)),
    )


def _lives(run: RunDir, attempts: tuple[Ended, ...], jobs: tuple[JobState, ...]) -> bool:
    """Whether an attempt without an outcome goes on all the same; Slurm's word on its jobs comes first."""
    if not attempts or attempts[-1].outcome is not None or jobs:
        return False
    handle = os.open(run.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # a launcher holds it
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return call_attempt(run, run.attempt(attempts[-1].epoch), "GET", "/status") is not None


def homes(config: RunConfig, names: tuple[str, ...]) -> dict[str, str]:
    """The node of every role's log of an attempt that had these nodes, group after group; roles of another job are left out."""
    found, first = {}, {}
    before = 0
    for group in node_groups(config):
        first[group.name] = before
        before += group.nodes
    for component in components(config):
        place = part(config, component)
        for number in range(place.nodes):
            index = first[place.group] + place.first_node + number
            for role in processes(config, component, number):
                if index < len(names):
                    found[f"{role.role}.{role.rank}"] = names[index]
    return found


def _attempts(run: RunDir) -> tuple[Ended, ...]:
    entries: dict[int, dict[str, Any]] = {}
    with contextlib.suppress(Damaged, FileNotFoundError):  # the attempts' own folders still speak
        entries = {int(entry["epoch"]): entry for entry in read_provenance(run)["attempts"]}
    found = []
    for epoch in range(1, newest_epoch(run) + 1):
        folder, entry = run.attempt(epoch), entries.get(epoch, {})
        if folder.is_dir():
            faults = tuple((_name(run, path), fault) for path in sorted(folder.glob("logs/fault.*.json")) if (fault := _json(path)) is not None)
            found.append(Ended(epoch, _json(folder / "exit.json"), faults, entry.get("job"), tuple(entry.get("nodes") or ()), str((_json(folder / "stop.json") or {}).get("by", ""))))
    return tuple(found)


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return dict(read_json(path))
    except (FileNotFoundError, Damaged):
        return None


def _jobs(run: RunDir) -> tuple[tuple[JobState, ...], str]:
    """(the run's jobs, why Slurm could not be asked)."""
    try:
        return tuple(own_jobs.states(run)), ""
    except UserError as error:
        return (), str(error)


def _logs(run: RunDir, jobs: tuple[JobState, ...]) -> tuple[Line, ...]:
    """The ends of the newest attempt's logs and of the newest job's."""
    paths: list[Path] = []
    if epoch := newest_epoch(run):
        folder = run.attempt(epoch)
        paths += [*sorted(folder.glob("logs/*.log")), *sorted(folder.glob("submitit/*/*_srun.err")), *sorted(folder.glob("submitit/*/*_log.out"))]
    entries = records.submitted(run)
    paths += [path for entry in entries[-2:] if (path := records.folder(run) / f"{entry['job_id']}.log").exists()]
    return tuple(line for path in paths for line in tail(path, _name(run, path)))


def tail(path: Path, name: str) -> list[Line]:
    """The last lines of a log, numbered as they are in the file."""
    match = ROLE_LOG.fullmatch(path.name)
    log = f"{match[1]}.{match[2]}" if match else ""
    with path.open("rb") as file:
        start, before = max(path.stat().st_size - TAIL_BYTES, 0), 0
        while file.tell() < start:
            before += file.read(min(TAIL_BYTES, start - file.tell())).count(b"\n")
        lines = file.read().decode(errors="replace").split("\n")
    return [Line(f"{name}:{before + number}", text.rstrip(), log) for number, text in enumerate(lines, 1) if text.strip()]


def _name(run: RunDir, path: Path) -> str:
    return str(path.relative_to(run.path))
