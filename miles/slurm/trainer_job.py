"""A job's work on a run: attempts as steps of the job, until the run is finished, must make room for others, or is wrong."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from miles.config.exits import AGAIN, OK, WRONG, UserError
from miles.config.schema import RunConfig
from miles.data.store.epoch import newest_epoch
from miles.data.store.files import seal_json
from miles.data.store.run_dir import RunDir, read_provenance
from miles.slurm import nodes, records, requeue, stop_times
from miles.slurm.attempt import SUPERVISE, Attempt, Component, Start, because_of_disk
from miles.slurm.job_here import JobHere
from miles.slurm.own_jobs import state_of
from miles.slurm.partner import Waiting
from miles.slurm.patience import patiently
from miles.slurm.progress import ending, finished, fruitless
from miles.slurm.signals import Signals
from miles.slurm.srun import SrunRunner, steps

CANCELLED = 130  # as after a Ctrl-C
HERE_SECONDS = 30.0  # a worker that spoke so lately is there
Say = Callable[[str], None]


class TrainerJob:
    """The job of the whole run; with placement jobs that of the trainer."""

    def __init__(self, run: RunDir, config: RunConfig, job: JobHere, signals: Signals, say: Say, poke: Callable[[], None] = lambda: None) -> None:
        """poke: called when a step was made."""
        self.run, self.config, self.job, self.signals, self.say, self.poke = run, config, job, signals, say, poke
        self.began = time.time()
        self.apart = config.cluster.placement == "jobs"
        self.waiting = Waiting(run, config, "rollout") if self.apart else None
        self.parted: str | None = None  # why the other job is waited for no longer
        self.newest: int | None = None  # attempt of this process
        self.time_is_up = False  # stopped for the time limit's sake
        self.shown: Any = None

    def start(self) -> int:
        """To the end; returns the exit code."""
        if (over := self.over()) is not None:
            return over
        self.blame_lost_attempt()
        restart = newest_epoch(self.run) > 0
        while self.signals.by is None:
            if (tried := fruitless(self.run, self.ours)) > self.config.cluster.restarts:
                self.say(f"gave up after {tried} attempts without a new step (cluster.restarts); look at: miles-submit status {self.run.quoted}")
                return AGAIN
            code = self.attempt(restart)
            if code is not None:
                return code
            restart = True
        return self.leave()

    # Before an attempt.

    def over(self) -> int | None:
        """Exit code of a job that has nothing left to do; None for one that has."""
        if finished(self.run, self.config):
            self.say("the run is finished")
            return OK
        if self.job.id in records.cancelled(self.run):
            self.say("the run was cancelled")
            return OK
        entries = [entry for entry in read_provenance(self.run)["attempts"] if self.ours(entry)]
        end = ending(self.run, int(entries[-1]["epoch"])) if entries and entries[-1].get("job") != self.job.id else {}
        if end.get("goes_on") is False:
            self.say(f"attempt {entries[-1]['epoch']} ended the run ({end.get('reason')}); nothing is tried again")
            return int(end["code"])
        return None

    def ours(self, entry: dict[str, Any]) -> bool:
        """Whether an attempt is of the command that this job is of: jobs of a chain belong together."""
        if self.config.cluster.slurm.requeue == "chain":
            return int(entry["epoch"]) > records.chain_began(self.run)
        return entry.get("job") == self.job.id

    def blame_lost_attempt(self) -> None:
        """The attempt before may have lost a node, whether it could say so or not (Slurm asks it to stop then, too): Slurm knows by now."""
        entries = read_provenance(self.run)["attempts"]
        if entries and ending(self.run, int(entries[-1]["epoch"])).get("code") != OK:
            try:
                found = nodes.broken(entries[-1].get("nodes") or [])
            except UserError as error:
                self.say(f"warning: not known whether attempt {entries[-1]['epoch']} lost a node: {error}")
            else:
                self.exclude(found, int(entries[-1]["epoch"]))

    def exclude(self, found: dict[str, str], epoch: int) -> None:
        """Remember failed nodes, if the configuration wants that."""
        for node, reason in found.items():
            self.say(f"node {node} failed in attempt {epoch}: {reason}")
        if self.config.cluster.slurm.exclude_failed:
            records.exclude(self.run, found, epoch)

    # An attempt.

    def attempt(self, restart: bool) -> int | None:
        """One attempt; returns the exit code, None when another one may follow here."""
        here = {"job": self.job.id, "nodes": list(self.job.nodes)}
        # A process that outlived its node's slurmd must not take the run away from the requeued job.
        attempt = Attempt(self.run, self.config, self.say, self.starter(), restart=restart, after=self.newest, **here)
        self.newest = attempt.epoch
        attempt.submit()
        outcome = because_of_disk(self.run, attempt.watch(self.update, lambda: self.pass_on(attempt)))
        ended = time.time()
        if outcome["code"] != OK:
            attempt.fence.check()  # a newer one goes on with the run: nothing is ours any more
        stopped = bool(attempt.stop_asked)
        failed = self.failed(outcome) if outcome["code"] == AGAIN and not stopped else {}
        self.exclude(failed, attempt.epoch)
        goes_on = outcome["code"] == AGAIN and self.goes_on(stopped, leaves=stopped or bool(failed))
        attempt.close(outcome, goes_on=goes_on)
        code = self.after(attempt, outcome, stopped, failed)
        if stopped and outcome["code"] == AGAIN and (line := stop_times.account(self.run, attempt.epoch, attempt.stop_told, ended, attempt.stop_seconds)):
            self.say(line)
        return code

    def goes_on(self, stopped: bool, leaves: bool) -> bool:
        """Whether another attempt follows one that was killed, lost or stopped, by itself: in this job, or, if we leave our nodes, in another one."""
        if self.signals.by == "user" or self.parted not in (None, "released") or (leaves and self.config.cluster.slurm.requeue == "none"):
            return False
        return stopped or fruitless(self.run, self.ours) <= self.config.cluster.restarts

    def after(self, attempt: Attempt, outcome: dict[str, Any], stopped: bool, failed: dict[str, str]) -> int | None:
        """What an attempt's end means for the job: its exit code, None when another attempt may follow here."""
        if outcome["code"] == OK:
            self.say(f"finished: {self.run.path}" if finished(self.run, self.config) else f"stopped after step {self.config.last_step} (debug.stop_after)")
            self.let_partner_go()
        elif outcome["code"] != AGAIN:
            self.say(f"{'error' if outcome['code'] == WRONG else 'failed'}: {outcome['reason']}")
        else:
            self.say(f"attempt {attempt.epoch}: {ending(self.run, attempt.epoch).get('reason', outcome['reason'])}")
            return self.leave() if stopped or failed else None
        return int(outcome["code"])

    def starter(self) -> Start:
        """How components are started as steps of this job; with placement jobs only the trainer's is ours."""
        where = steps(self.config, self.run.path)

        def start(attempt: Attempt, component: str) -> Component:
            runner = SrunRunner(attempt.folder / "submitit", reachable=self.apart)
            return runner.submit(component, SUPERVISE, str(self.run.path), component, attempt.epoch, step=where[component])

        return start

    def failed(self, outcome: dict[str, Any]) -> dict[str, str]:
        """Nodes that the next attempt can't have, with the reason: those that nothing runs on, and the one that hung."""
        found = nodes.failed(self.job)
        if outcome.get("told") and outcome.get("node"):  # the watchdog's word, or a role's that fell silent
            found[str(outcome["node"])] = str(outcome["reason"])
        return found

    def leave(self) -> int:
        """End after a stop or for want of nodes; the run goes on in a later job, if it may and is set up so."""
        if self.signals.by == "user":
            self.say(f"saved and ended; go on with: miles-submit resume {self.run.quoted}")
            return CANCELLED
        more: tuple[str, ...] = ()
        if self.waiting is not None and self.parted is not None:
            if self.parted != "released":
                if self.parted == "missed":
                    self.release(self.waiting.job)
                self.say(f"ended; go on with: miles-submit resume {self.run.quoted}")
                return AGAIN
            more = (f"Dependency=after:{self.waiting.job}",)  # our nodes are held again once the other has its own
        return requeue.go_on(self.run, self.config, self.job, self.say, more)

    def release(self, job: int | None) -> None:
        """End a job that runs and can't be met: what it waits for may never come, and its nodes are others'."""
        with contextlib.suppress(UserError):  # it ends by itself once it looks for us
            patiently(["scancel", str(job)], check=False)

    def let_partner_go(self) -> None:
        """A rollout job that still queues would start for nothing."""
        entries = [entry for entry in records.submitted(self.run) if "rollout" in entry["groups"]] if self.waiting is not None else []
        with contextlib.suppress(UserError):  # Slurm doesn't answer: it starts, and ends at once
            if jobs := [str(entry["job_id"]) for entry in entries if not state_of(entry).over]:
                patiently(["scancel", "--state=PENDING", *jobs], check=False)

    # During an attempt.

    def pass_on(self, attempt: Attempt) -> None:
        """A signal, or a partner that doesn't come, becomes a stop request, once."""
        if self.signals.by is not None and not attempt.stop_asked:
            attempt.request_stop(requeue.seconds_to_save(self.config, None))
            attempt.tell_stop()  # before Slurm is asked anything: its controller may be away
            left = requeue.seconds_left(self.job)
            self.time_is_up = self.signals.by == "slurm" and requeue.time_is_up(self.config, left)
            attempt.stop_seconds = requeue.seconds_to_save(self.config, left)
            self.say(f"asked to stop: saving, for at most {attempt.stop_seconds:.0f} s")
        if self.waiting is not None and not attempt.stop_asked and (why := self.waiting.look()) is not None:
            self.parted = why
            self.say(self.waiting.words(why))
            attempt.request_stop()
        if attempt.stop_asked and not (attempt.folder / "stop.json").exists():
            asked = {"by": self.signals.by or self.parted or "slurm", "time": self.signals.at or time.time(), "time_is_up": self.time_is_up}
            seal_json(attempt.folder / "stop.json", asked)

    def update(self, status: dict[str, Any]) -> None:
        """A line in the job's output for every step."""
        if self.waiting is not None and any(role["role"] == "worker" and role["silent_seconds"] < HERE_SECONDS for role in status.get("roles", [])):
            self.waiting.met()
        step = status.get("step"), status.get("total_steps"), status.get("kind")
        if isinstance(step[0], int) and step != self.shown:
            self.shown = step
            self.poke()
            self.say(f"at step {step[0]} of {step[1]} ({step[2]})")
