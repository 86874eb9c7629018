"""One attempt at a run: its epoch, its meeting point, its components, from their start to the outcome."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from miles.config.exits import AGAIN, OK, WRONG, disk_full, first_cause, full, no_room
from miles.config.placement import components, part, processes
from miles.config.schema import RunConfig
from miles.data.service_call import call
from miles.data.store.epoch import Fence, new_epoch
from miles.data.store.files import seal_json
from miles.data.store.import_roots import import_roots
from miles.data.store.results import last_with_results
from miles.data.store.run_dir import RunDir, environment, read_provenance, record_attempt
from miles.data.store.start_list import StartList
from miles.plan.tier import facts, promise
from miles.slurm.meeting import open_meeting, own_address
from miles.slurm.progress import furthest

SUPERVISE = "miles.run.component.supervise"
POLL_SECONDS = 0.25
ECHO_SECONDS = 1.0
STATUS_SECONDS = 1.0
Watcher = Callable[[dict[str, Any]], None]


class Component(Protocol):
    """A started component, on one node or several."""

    name: str

    def running(self) -> bool:
        """Whether any of it lives."""

    def outcome(self) -> dict[str, Any]:
        """{code, role, rank, reason, …} of an ended one."""

    def terminate(self) -> None:
        """Ask it to stop its roles and end."""

    def kill(self) -> None:
        """End it at once."""


class Attempt:
    """An attempt is made, submitted, watched to its end, and closed.

    start: starts one of its components, on this machine or on the job's nodes. after: the attempt of this process before it; Fenced when somebody
    else has begun one since. more: what else is recorded of it (job, nodes).
    """

    def __init__(
        self, run: RunDir, config: RunConfig, say: Callable[[str], None], start: Start, restart: bool = False, after: int | None = None, **more: Any
    ) -> None:
        host, port, self.port = own_address(config.cluster)  # held until the attempt is closed: its service comes to it seconds later
        self.run, self.config, self.say, self.start = run, config, say, start
        self.noticed: list[str] = []
        self.epoch = new_epoch(run, after)
        self.folder = run.attempt(self.epoch)
        self.fence = Fence(run, self.epoch)
        (self.folder / "logs").mkdir()
        start_list(config).write(self.folder)
        self.meeting = open_meeting(self.folder, host, port)
        self.components: list[Component] = []
        self.stop_asked = 0.0
        self.stop_told: float | None = None  # when the run's processes knew [unix s]
        self.stop_seconds = config.cluster.stop_seconds
        self.promise(restart=restart, furthest=furthest(run), **more)

    def promise(self, **more: Any) -> None:
        """Record what this attempt can promise and why; say it when that is less than the last attempt could that left something."""
        earlier = {entry["epoch"]: entry for entry in read_provenance(self.run)["attempts"] if entry["epoch"] < self.epoch}
        before = earlier.get(last_with_results(self.run, earlier))
        here = {**environment(), **facts(self.config)}
        tier, changed = promise(self.config, before, here)
        told: dict[str, Any] = {"tier": tier.name, "promise": tier.promise, "why": tier.why, "changed": changed}
        executor, roots = self.config.cluster.executor, import_roots(self.run)
        record_attempt(self.run, self.epoch, self.fence, **here, **told, executor=executor, import_roots=roots, **more)
        if before is not None and before.get("tier") != tier.name:
            self.say(f"guarantee: {tier.name} from attempt {self.epoch} on (before: {before.get('tier')}): {', '.join(changed) or tier.why}")

    def submit(self) -> None:
        """Start the components."""
        # With placement jobs the others have a job of their own, and find this attempt in the run directory.
        for name in components(self.config)[: 1 if self.config.cluster.placement == "jobs" and self.config.cluster.executor == "slurm" else None]:
            self.components.append(self.start(self, name))

    def ask(self, method: str, path: str) -> dict[str, Any] | None:
        """A call to the rollout service; None while it isn't there."""
        return call(self.meeting.url, self.meeting.token, method, path)

    def request_stop(self, seconds: float | None = None) -> None:
        """First time: stop cleanly (save, then end), within so many seconds, default cluster.stop_seconds. Again: end now."""
        if self.stop_asked:
            for component in self.components:
                component.terminate()
            return
        self.stop_asked = time.monotonic()
        self.stop_seconds = self.stop_seconds if seconds is None else seconds

    def tell_stop(self) -> None:
        """Pass a stop request on, if the service is there to hear it."""
        if self.ask("POST", "/stop") is not None:
            self.stop_told = time.time()

    def watch(self, update: Watcher, meanwhile: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Follow the attempt to its end; returns {code, role, rank, reason}. meanwhile: called again and again."""
        shown = 0.0
        update({"run": self.config.name, "epoch": self.epoch, "waiting": "the rollout service to start and read the prompts"})
        while all(component.running() for component in self.components):
            meanwhile()
            if time.monotonic() - shown > STATUS_SECONDS:
                status = self.ask("GET", "/status")
                if status is not None:
                    if status.get("stop") and not self.stop_asked:  # somebody else told the service
                        self.request_stop()
                    self.pass_on(status)
                    update(status)
                shown = time.monotonic()
            if self.stop_asked and self.stop_told is None:  # again and again: the service may be starting, or busy
                self.tell_stop()
            if self.stop_asked and time.monotonic() - self.stop_asked > self.stop_seconds:
                self.request_stop()
            time.sleep(POLL_SECONDS)
        return self.settle()

    def pass_on(self, status: dict[str, Any]) -> None:
        """Say what the run's processes have noticed (a damaged checkpoint), once; how it ends is said at the end, once too."""
        status.pop("message", None)
        for line in status.pop("notices", None) or []:
            if line not in self.noticed:
                self.noticed.append(line)
                self.say(f"warning: {line}")

    def settle(self) -> dict[str, Any]:
        """End what still runs, then name the outcome: train's word counts, unless rollout failed first."""
        train, *others = self.components
        if train.running() and all(not other.running() and other.outcome()["code"] == OK for other in others):
            # The worker leaves as soon as the run is finished; the trainer may still be writing its last files.
            wait_for(train, self.config.cluster.stop_seconds)
        else:
            time.sleep(ECHO_SECONDS)  # what killed one component may have ended the other, too
        ended = [component for component in self.components if not component.running()]
        for component in self.components:
            component.terminate()
        silent = []
        for component in self.components:
            wait_for(component, 15.0)
            if component.running():
                silent.append(component)
                component.kill()
        if train.outcome()["code"] == OK:
            return train.outcome()
        # One that was slow to stop its roles may be the one that knows why; one that had to be killed knows nothing.
        spoke = [*ended, *(component for component in self.components if component not in ended and component not in silent)]
        return first_cause([component.outcome() for component in spoke or self.components])

    def close(self, outcome: dict[str, Any], **more: Any) -> None:
        """Record how the attempt ended; on a full disk it goes unrecorded, and what the launcher says is all there is."""
        early = outcome["code"] == OK and self.config.last_step < self.config.total_steps
        reason = {"reason": f"stopped after step {self.config.last_step} (debug.stop_after)"} if early else {}
        if self.stop_asked and outcome["code"] == AGAIN and outcome["role"] in ("trainer", *components(self.config)):
            late = time.monotonic() - self.stop_asked > self.stop_seconds
            reason = {"reason": "stopped on request" + (", before it could save: what came after the last checkpoint is done again" if late else "")}
        stopped = early or bool(self.stop_asked)
        self.port.close()
        try:
            seal_json(self.folder / "exit.json", {**outcome, **reason, "stopped": stopped, **more, "time": time.time()})
        except OSError as error:
            if disk_full(error) is None:
                raise


def start_list(config: RunConfig) -> StartList:
    """What each node starts."""
    everybody = {name: [processes(config, name, node) for node in range(part(config, name).nodes)] for name in components(config)}
    return StartList(config.cluster.host, config.cluster.device, config.cluster.threads, everybody)


def wait_for(component: Component, seconds: float) -> None:
    """Wait for a component's end, at most so long."""
    deadline = time.monotonic() + seconds
    while component.running() and time.monotonic() < deadline:
        time.sleep(0.05)


def because_of_disk(run: RunDir, outcome: dict[str, Any]) -> dict[str, Any]:
    """A failure on a full disk is the disk's, whatever each process could still say of it."""
    if outcome["code"] == OK or not no_room(run.path):
        return outcome
    return {**outcome, "code": WRONG, "reason": full(run.path)}


Start = Callable[[Attempt, str], Component]
