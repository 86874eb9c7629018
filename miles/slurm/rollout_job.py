"""The rollout's own job (placement jobs): its component for the trainer's present attempt, and again for each later one, until the run is finished."""

from __future__ import annotations

import time
from typing import Any

from miles.config.exits import AGAIN, OK
from miles.data.service_call import call
from miles.data.store.epoch import newest_epoch
from miles.slurm.attempt import SUPERVISE, Component, wait_for
from miles.slurm.partner import Found, Waiting, find
from miles.slurm.progress import ending, furthest
from miles.slurm.requeue import go_on
from miles.slurm.srun import SrunRunner, steps
from miles.slurm.trainer_job import TrainerJob

POLL_SECONDS = 0.5
LEAVE_SECONDS = 20.0  # for a worker to hear that its attempt is over


class RolloutJob(TrainerJob):
    """Engines and workers that come and go, while training goes on without them."""

    starts = 0
    failures: tuple[int, int] = (0, 0)  # step that the run had come to, failures since

    def start(self) -> int:
        """To the end; returns the exit code."""
        waiting = Waiting(self.run, self.config, "train")
        while self.signals.by is None:
            if (over := self.over()) is not None:
                return over
            found = find(self.run)
            if found is not None:
                code = self.serve(found)
                if code is not None:
                    return code
                waiting = Waiting(self.run, self.config, "train")  # for another attempt, from now on
            elif (why := waiting.look()) is not None:
                self.say(waiting.words(why))
                more = (f"Dependency=after:{waiting.job}",)
                return go_on(self.run, self.config, self.job, self.say, more) if why == "released" else AGAIN
            time.sleep(POLL_SECONDS)
        return self.leave()

    def over(self) -> int | None:
        """As for the trainer's job; besides, nothing goes on after an attempt that ended the run."""
        if (code := super().over()) is not None:
            return code
        end = ending(self.run, newest_epoch(self.run))
        return int(end["code"]) if end.get("goes_on") is False and end["time"] > self.began else None

    def serve(self, found: Found) -> int | None:
        """The component, as long as its attempt lasts; returns the exit code, None when there may be more to do."""
        self.starts += 1
        folder = self.run.attempt(found.epoch) / "submitit" / f"{self.job.id}.{self.job.restarts}.{self.starts}"
        step = steps(self.config, self.run.path)["rollout"]
        component = SrunRunner(folder, reachable=True, term_asks=False).submit("rollout", SUPERVISE, str(self.run.path), "rollout", found.epoch, step=step)
        self.say(f"attempt {found.epoch}: engines and workers are started")
        while component.running() and self.signals.by is None and not self.superseded(found):
            time.sleep(POLL_SECONDS)
        if self.superseded(found) and self.signals.by is None:
            wait_for(component, LEAVE_SECONDS)
        end(component)
        outcome = component.outcome()
        if outcome["code"] == OK or self.signals.by is not None or self.ends(found):
            return None
        return self.failure(found, outcome)

    def superseded(self, found: Found) -> bool:
        """Whether the attempt is over."""
        return newest_epoch(self.run) != found.epoch or (self.run.attempt(found.epoch) / "exit.json").exists()

    def ends(self, found: Found) -> bool:
        """Whether the attempt is over, too, and with it the reason for whatever its processes said: asked until its service answers, or is done with."""
        deadline = time.monotonic() + LEAVE_SECONDS
        while not self.superseded(found) and find(self.run) is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return self.superseded(found)

    def failure(self, found: Found, outcome: dict[str, Any]) -> int | None:
        """The component failed while its attempt goes on: again on these nodes, on others, or, where it would only fail again, not at all."""
        self.say(f"attempt {found.epoch}: {outcome['reason']}")
        if outcome["code"] != AGAIN:  # the trainer would wait in vain
            # No answer: it has ended already.
            call(found.url, found.token, "POST", "/finish", {"exit": outcome["code"], "message": outcome["reason"]}, seconds=10.0)
            return int(outcome["code"])
        failed = self.failed(outcome)
        self.exclude(failed, found.epoch)
        if failed:
            return self.leave()
        reached, before = furthest(self.run), self.failures
        self.failures = (reached, before[1] + 1 if before[0] == reached else 1)
        if self.failures[1] > self.config.cluster.restarts:
            self.say(f"gave up after {self.failures[1]} starts without a new step (cluster.restarts)")
            return AGAIN
        return None


def end(component: Component) -> None:
    """End a component, whatever it takes."""
    component.terminate()
    wait_for(component, LEAVE_SECONDS)
    component.kill()
