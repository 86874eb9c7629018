"""What a run gives to sbatch: the texts, their files in RUN/slurm, and the jobs that came of them (RUN/slurm/job.json)."""

from __future__ import annotations

import hashlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles.config.exits import UserError
from miles.config.placement import NodeGroup, node_groups
from miles.config.schema import RunConfig
from miles.data.store.files import seal_bytes
from miles.data.store.run_dir import RunDir
from miles.slurm.all_or_none import AllOrNone
from miles.slurm.command import TIMEOUT_SECONDS
from miles.slurm.own_jobs import cluster_name, entry_of
from miles.slurm.records import begin_chain, folder, forget, left_out, note
from miles.slurm.script import script

BATCH = "miles.slurm.batch"


@dataclass(frozen=True)
class Submission:
    """One job: its name, its groups of nodes, its batch script, and sbatch's arguments before the script's file."""

    name: str
    groups: tuple[str, ...]
    script: str
    arguments: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """Name of the script in RUN/slurm; the jobs of a chain share it."""
        return f"{'-'.join(self.groups)}.sbatch"


def prepare(config: RunConfig, run: RunDir) -> list[Submission]:
    """The jobs of a run: one; placement jobs: one a group, the trainer's first; cluster.slurm.requeue=chain: so many times that.

    A batch script ends in `PYTHON -m miles.slurm.batch RUN`; with placement jobs the name of its group follows. Pure, but for
    RUN/slurm/exclude.json and cluster.slurm.exclude_file, whose nodes are added to every group's --exclude.
    """
    groups = [without(group, left_out(run, config)) for group in node_groups(config)]
    apart = [[group] for group in groups] if config.cluster.placement == "jobs" else [groups]
    job, found = config.cluster.slurm, []
    chained = job.requeue == "chain"
    for together in apart:
        alone = len(apart) > 1
        name = _name(config, run) + (f"-{together[0].name}" if alone else "")
        command = [batch_python(config, together[0]), "-m", BATCH, str(run.path), *([together[0].name] if alone else [])]
        text = script(job.model_copy(update={"job_name": name}), name, together, command, _log(run), device=config.cluster.device)
        once = Submission(name, tuple(group.name for group in together), text, ("--dependency=singleton",) if chained else ())
        found += [once] * (job.chain if chained else 1)
    return found


def write(run: RunDir, submissions: Sequence[Submission]) -> list[Path]:
    """Write the batch scripts; returns a file for each submission."""
    folder(run).mkdir(parents=True, exist_ok=True)
    files = [folder(run) / each.file for each in submissions]
    for path, each in dict(zip(files, submissions, strict=True)).items():
        seal_bytes(path, each.script.encode())
    return files


def command(submission: Submission, path: Path) -> list[str]:
    """The command that submits it."""
    return ["sbatch", "--parsable", *submission.arguments, str(path)]


def by_hand(run: RunDir, submissions: Sequence[Submission]) -> list[str]:
    """Lines for a shell that do what submit does; the jobs note themselves in job.json when they start."""
    return [shlex.join(command(each, folder(run) / each.file)) for each in submissions]


def submit(run: RunDir, submissions: Sequence[Submission]) -> list[dict[str, Any]]:
    """Write the scripts and submit them, all or none; returns the new entries of job.json, which keeps the older ones.

    Each is on record before the next is submitted. UserError: what Slurm refuses.
    """
    entries: list[dict[str, Any]] = []
    files = write(run, submissions)
    begin_chain(run)
    jobs, cluster = AllOrNone(), cluster_name()
    try:
        with jobs:
            for each, path in zip(submissions, files, strict=True):
                entries.append(entry_of(run, jobs.sbatch(command(each, path)), each.name, each.groups, cluster, TIMEOUT_SECONDS))
                note(run, entries[-1])
    except BaseException as error:
        if jobs.taken_back:
            forget(run, jobs.jobs)
        elif isinstance(error, UserError):
            known = ", ".join(map(str, jobs.jobs))
            raise UserError(f"{error}; what was submitted before could not be cancelled (job {known}): miles-submit cancel {run.quoted}") from error
        raise
    return entries


def without(group: NodeGroup, nodes: list[str]) -> NodeGroup:
    """The group, with these nodes added to its --exclude."""
    if not nodes:
        return group
    words = [*([group.ask.exclude] if group.ask.exclude else []), *nodes]
    return NodeGroup(group.name, group.nodes, group.gpus_per_node, group.components, group.ask.model_copy(update={"exclude": ",".join(words)}))


def _name(config: RunConfig, run: RunDir) -> str:
    """The jobs of a chain find each other by their name (singleton), so it is the run directory's own there."""
    name = config.cluster.slurm.job_name or config.name
    if config.cluster.slurm.requeue != "chain":
        return name
    return f"{name}.{hashlib.sha256(str(run.path).encode()).hexdigest()[:8]}"


def _log(run: RunDir) -> Path:
    """The batch process's log; a percent sign of the folder's is none of sbatch's patterns."""
    return Path(str(folder(run)).replace("%", "%%")) / "%j.log"


def batch_python(config: RunConfig, first: NodeGroup) -> str:
    """The interpreter of a batch script. The batch script runs on the first node itself, where an image's interpreter is not."""
    asked = config.cluster.slurm.python or (None if first.ask.container_image else first.ask.python)
    return asked or sys.executable
