"""How a run goes on after its job: the job is requeued, the next of its chain starts, or nothing does."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from functools import partial
from itertools import dropwhile
from typing import TYPE_CHECKING

from miles.config.exits import AGAIN, UserError
from miles.data.store.run_dir import RunDir
from miles.slurm import queue
from miles.slurm.job_here import JobHere
from miles.slurm.own_jobs import parts_of
from miles.slurm.patience import patiently
from miles.slurm.records import excluded, submitted

if TYPE_CHECKING:
    from miles.config.schema import RunConfig

ENDING_SECONDS = 30.0  # at most so long it takes to end what could not save in time, and to requeue
EARLY_SECONDS = 60.0  # Slurm sends the signal of a time limit up to so much early
Say = Callable[[str], None]


def seconds_left(job: JobHere) -> float | None:
    """Seconds until the job's time limit; None where there is none, or Slurm doesn't say so at once."""
    try:
        parts = queue.parts(job.id, queue.QUICK_SECONDS)
    except UserError:  # the controller is away
        return None
    end = parts[0].end if parts else None
    return None if end is None else max((end - datetime.datetime.now()).total_seconds(), 0.0)


def seconds_to_save(config: RunConfig, left: float | None) -> float:
    """Seconds from now on in which an attempt may save before it is ended: the lead, or what the time limit leaves, less what ending takes."""
    whole = float(config.cluster.slurm.lead_seconds)
    whole = whole if left is None else min(whole, left)
    return whole - min(ENDING_SECONDS, whole / 2)


def time_is_up(config: RunConfig, left: float | None) -> bool:
    """Whether it is for the time limit that Slurm asks now, and not for somebody else's sake."""
    return left is not None and left <= config.cluster.slurm.lead_seconds + EARLY_SECONDS


def go_on(run: RunDir, config: RunConfig, job: JobHere, say: Say, more: tuple[str, ...] = ()) -> int:
    """Make room, and see to it that the run goes on, without the nodes that failed. more: further settings of the requeued job. Returns the exit code."""
    how = config.cluster.slurm.requeue
    try:
        if how == "requeue":
            _requeue(run, job, say, more)
        elif how == "chain":
            for following in [*dropwhile(lambda entry: entry["job_id"] != job.id, submitted(run))][1:]:
                _without(run, following["job_id"], partial(parts_of, following), say)
            say("ended; the next job of the chain goes on")
        else:
            say(f"ended (cluster.slurm.requeue: none); go on with: miles-submit resume {run.quoted}")
    except UserError as error:
        say(f"warning: {error}; go on with: miles-submit resume {run.quoted}")
    return AGAIN


def _requeue(run: RunDir, job: JobHere, say: Say, more: tuple[str, ...]) -> None:
    """Requeue the leader, and with it the whole job. When Slurm is ending the job already, what comes next is Slurm's."""
    try:
        states = {part.state for part in queue.parts(job.id)}
    except UserError as error:  # the controller may yet be back for the requeue
        say(f"warning: {error}")
        states = set()
    if states and states != {"RUNNING"}:
        say(f"ended; Slurm has the job as {', '.join(sorted(states))}")
        return
    patiently(["scontrol", "requeue", str(job.id)])
    say(f"job {job.id} is requeued")
    _without(run, job.id, partial(queue.parts, job.id), say, more)  # only a job that doesn't run can be changed: there is time until Slurm kills this process


def _without(run: RunDir, job: int, ask: Callable[[], list[queue.Part]], say: Say, more: tuple[str, ...] = ()) -> None:
    """Keep a waiting job off the nodes that failed, in addition to those that it was submitted without. ask: for its parts."""
    bad = excluded(run)
    if not bad and not more:
        return
    try:
        parts, before = ask(), queue.excluded(job)
    except UserError as error:
        say(f"warning: job {job} could not be kept off {', '.join(bad) or 'nodes'}: {error}")
        return
    for part in parts:
        unwanted = ",".join(filter(None, [*bad, before.get(part.job_id)]))
        settings = [*([f"ExcNodeList={unwanted}"] if bad else []), *more]
        done = patiently(["scontrol", "update", f"JobId={part.name}", *settings], check=False)
        if done.returncode:
            say(f"warning: job {part.name} could not be given {' '.join(settings)}: {' '.join(done.stderr.split())}")
