"""Placement jobs: how the trainer's job and the rollout's find each other through the run directory, and how long one waits for the other.

The address of the newest attempt's rollout service lies in its folder; a call with the attempt's token verifies that it is there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from miles.config.exits import UserError
from miles.config.schema import RunConfig
from miles.data.service_call import call
from miles.data.store.epoch import newest_epoch
from miles.data.store.run_dir import RunDir
from miles.slurm import queue
from miles.slurm.own_jobs import parts_of
from miles.slurm.records import submitted

LOOK_SECONDS = 5.0  # between two questions to Slurm while they haven't met
CALM_SECONDS = 30.0  # once they have: Slurm serves thousands of jobs
HEARD_SECONDS = 5.0  # a partner that was met so lately is there
HANDSHAKE_SECONDS = 5.0
QUEUED = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "CONFIGURING", "COMPLETING")


@dataclass(frozen=True)
class Found:
    """An attempt whose rollout service answered."""

    epoch: int
    url: str
    token: str


def find(run: RunDir) -> Found | None:
    """The newest attempt, if its rollout service answers to its token. The folder is listed anew each time: names may be cached, listings are not."""
    epoch = newest_epoch(run)
    folder = run.attempt(epoch)
    if epoch == 0 or (folder / "exit.json").exists():
        return None
    try:
        url, token = str(json.loads((folder / "service.json").read_text())["url"]), (folder / "token").read_text()
    except (FileNotFoundError, ValueError):  # being written
        return None
    status = call(url, token, "GET", "/status", seconds=HANDSHAKE_SECONDS)
    return Found(epoch, url, token) if status is not None and status.get("epoch") == epoch else None


def job_of(run: RunDir, group: str) -> tuple[int | None, str]:
    """The oldest job of a group that is not over, else the newest of all, and its state; (None, unknown) where no job is known (submitted by hand, not started)."""
    found: tuple[int | None, str] = None, "unknown"
    for entry in submitted(run):
        if group in entry["groups"]:
            found = int(entry["job_id"]), state(entry)
            if found[1] != "gone":  # where nobody answers, nobody is asked about the next
                break
    return found


def state(entry: Mapping[str, Any]) -> str:
    """Of a job of job.json: running, queued, gone (or its id is another job's), or unknown (nobody answers at once: more than a job that runs waits for it)."""
    try:
        found = {part.state for part in parts_of(entry, queue.QUICK_SECONDS)}
    except UserError:
        return "unknown"
    if found & set(QUEUED):
        return "queued"
    return "running" if "RUNNING" in found else "gone"


class Waiting:
    """The patience of one job with the other: one clock runs while both run, another one while the other queues."""

    def __init__(self, run: RunDir, config: RunConfig, other: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.run, self.other, self.clock = run, other, clock
        self.both_limit, self.queue_limit = config.cluster.slurm.partner_seconds, config.cluster.slurm.queue_seconds
        self.job: int | None = None
        self.both = self.queued = 0.0
        self.looked: float | None = None
        self.heard: float | None = None
        self.was = "unknown"

    def met(self) -> None:
        """They meet, now: nothing that was waited so far counts, and as long as this is said Slurm isn't asked."""
        self.both = self.queued = 0.0
        self.heard = self.clock()
        self.was = "unknown"

    def look(self) -> str | None:
        """None: wait on. Else why not: gone (the other has ended), missed (it runs, and is not met), released (its queueing took too long)."""
        now = self.clock()
        if self.heard is not None and now - self.heard < HEARD_SECONDS:
            return None
        if self.looked is not None:
            if now - self.looked < (LOOK_SECONDS if self.heard is None else CALM_SECONDS):
                return None
            self.both += (now - self.looked) * (self.was == "running")
            self.queued += (now - self.looked) * (self.was == "queued")
        self.looked = now
        self.job, self.was = job_of(self.run, self.other)
        if self.was == "gone":
            return "gone"
        if self.both > self.both_limit:
            return "missed"
        return "released" if self.queue_limit is not None and self.queued > self.queue_limit else None

    def words(self, why: str) -> str:
        """What a person should read of it."""
        job = f"the job of group {self.other} ({self.job})"
        return {
            "gone": f"{job} has ended",
            "missed": f"{job} has been running for {self.both:.0f} s without being met (cluster.slurm.partner_seconds)",
            "released": f"{job} has queued for {self.queued:.0f} s while these nodes waited (cluster.slurm.queue_seconds)",
        }[why]
