"""One run on this machine: attempts one after another until it is finished, stopped, or wrong.

The launcher holds no state that matters: kill it, and the components go on; run it again, and the run resumes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from miles.config.address import bind_host, family_of, url_of
from miles.config.exits import AGAIN, OK, WRONG, UserError, disk_full, first_cause, full
from miles.config.placement import components
from miles.config.schema import RunConfig
from miles.data.store.epoch import Fence, new_epoch
from miles.data.store.files import Damaged, read_json, seal_json
from miles.data.store.import_roots import import_roots
from miles.data.store.results import last_with_results
from miles.data.store.run_dir import RunDir, environment, newest_complete_checkpoint, read_provenance, record_attempt
from miles.plan.tier import facts, promise
from miles.slurm.local import LocalComponent, LocalRunner

SUPERVISE = "miles.run.component.supervise"
POLL_SECONDS = 0.25
ECHO_SECONDS = 1.0
STATUS_SECONDS = 1.0
FULL_BYTES = 64 << 10  # a disk with less room is the reason for whatever failed on it
Watcher = Callable[[dict[str, Any]], None]


def free_port(host: str, wanted: int) -> int:
    """A TCP port to bind on host: the wanted one if it is free, any free one for 0."""
    with socket.socket(family_of(host), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, wanted))
        except OSError as error:
            raise UserError(f"cluster.port: {host}:{wanted} can't be used ({error.strerror}); choose another, or 0 for a free one") from error
        return int(probe.getsockname()[1])


class Attempt:
    """One attempt at the run: its epoch, its meeting point, its components."""

    def __init__(self, run: RunDir, config: RunConfig, say: Callable[[str], None], restart: bool = False) -> None:
        host = bind_host(config.cluster.host)
        port = free_port(host, config.cluster.port)
        self.run, self.config, self.say = run, config, say
        self.noticed: list[str] = []
        self.epoch = new_epoch(run)
        self.folder = run.attempt(self.epoch)
        self.token = secrets.token_hex(24)  # no "-" in front, which would make it an option on a command line
        self.url = url_of(host, port)
        self.fence = Fence(run, self.epoch)
        (self.folder / "logs").mkdir()
        handle = os.open(self.folder / "token", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(self.token)
        seal_json(self.folder / "service.json", {"url": self.url, "host": host, "port": port})
        self.components: list[LocalComponent] = []
        self.stop_asked = 0.0
        self.stop_told = False
        self.promise(restart)

    def promise(self, restart: bool) -> None:
        """Record what this attempt can promise and why; say it when that is less than the last attempt could that left something."""
        earlier = {entry["epoch"]: entry for entry in read_provenance(self.run)["attempts"] if entry["epoch"] < self.epoch}
        before = earlier.get(last_with_results(self.run, earlier))
        here = {**environment(), **facts(self.config)}
        tier, changed = promise(self.config, before, here)
        told: dict[str, Any] = {"tier": tier.name, "promise": tier.promise, "why": tier.why, "changed": changed}
        record_attempt(self.run, self.epoch, self.fence, **here, **told, executor=self.config.cluster.executor, restart=restart, import_roots=import_roots(self.run))
        if before is not None and before.get("tier") != tier.name:
            self.say(f"guarantee: {tier.name} from attempt {self.epoch} on (before: {before.get('tier')}): {', '.join(changed) or tier.why}")

    def submit(self) -> None:
        """Start the components."""
        runner = LocalRunner(self.folder / "submitit")
        gpus = self.config.cluster.gpus_per_node if self.config.cluster.device == "cuda" else 0
        for name in components(self.config):
            self.components.append(runner.submit(name, SUPERVISE, str(self.run.path), name, self.epoch, gpus=gpus))

    def ask(self, method: str, path: str) -> dict[str, Any] | None:
        """A call to the rollout service; None while it isn't there."""
        try:
            reply = httpx.request(method, self.url + path, headers={"Authorization": f"Bearer {self.token}"}, timeout=2.0, trust_env=False)
        except httpx.HTTPError:
            return None
        return reply.json() if reply.status_code == 200 else None

    def request_stop(self) -> None:
        """First time: stop cleanly (save, then end). Again: end now."""
        if self.stop_asked:
            for component in self.components:
                component.terminate()
        self.stop_asked = self.stop_asked or time.monotonic()

    def watch(self, update: Watcher) -> dict[str, Any]:
        """Follow the attempt to its end; returns {code, role, rank, reason}."""
        shown = 0.0
        update({"run": self.config.name, "epoch": self.epoch, "waiting": "the rollout service to start and read the prompts"})
        while all(component.running() for component in self.components):
            if time.monotonic() - shown > STATUS_SECONDS:
                status = self.ask("GET", "/status")
                if status is not None:
                    self.pass_on(status)
                    update(status)
                shown = time.monotonic()
            if self.stop_asked and not self.stop_told:  # again and again: the service may be starting, or busy
                self.stop_told = self.ask("POST", "/stop") is not None
            if self.stop_asked and time.monotonic() - self.stop_asked > self.config.cluster.stop_seconds:
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
            self.wait_for(train, self.config.cluster.stop_seconds)
        else:
            time.sleep(ECHO_SECONDS)  # what killed one component may have ended the other, too
        ended = [component for component in self.components if not component.running()]
        for component in self.components:
            component.terminate()
        silent = []
        for component in self.components:
            self.wait_for(component, 15.0)
            if component.running():
                silent.append(component)
                component.kill()
        if train.outcome()["code"] == OK:
            return train.outcome()
        # One that was slow to stop its roles may be the one that knows why; one that had to be killed knows nothing.
        spoke = [*ended, *(component for component in self.components if component not in ended and component not in silent)]
        return first_cause([component.outcome() for component in spoke or self.components])

    @staticmethod
    def wait_for(component: LocalComponent, seconds: float) -> None:
        """Wait for a component's end, at most so long."""
        deadline = time.monotonic() + seconds
        while component.running() and time.monotonic() < deadline:
            time.sleep(0.05)

    def close(self, outcome: dict[str, Any]) -> None:
        """Record how the attempt ended; on a full disk it goes unrecorded, and what the launcher says is all there is."""
        try:
            seal_json(self.folder / "exit.json", {**outcome, "time": time.time()})
        except OSError as error:
            if disk_full(error) is None:
                raise


def because_of_disk(run: RunDir, outcome: dict[str, Any]) -> dict[str, Any]:
    """A failure on a full disk is the disk's, whatever each process could still say of it."""
    if outcome["code"] == OK:
        return outcome
    room = os.statvfs(run.path)
    if room.f_bavail * room.f_frsize >= FULL_BYTES and (room.f_favail or not room.f_files):
        return outcome
    return {**outcome, "code": WRONG, "reason": full(run.path)}


@contextlib.contextmanager
def only_launcher(run: RunDir) -> Iterator[None]:
    """Two launchers on one run would only fence each other off: the second is refused, from the first's start on."""
    handle = os.open(run.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run.path}: this run is going on; follow it with `miles-submit logs -f {run.path}`") from None
        refuse_if_running(run)
        yield
    finally:
        os.close(handle)


def refuse_if_running(run: RunDir) -> None:
    """A launcher that was killed leaves a run that goes on."""
    latest = run.latest.resolve()
    if (latest / "exit.json").exists():
        return
    try:
        url = read_json(latest / "service.json")["url"]
    except (FileNotFoundError, Damaged):  # the launcher was killed before it started anything
        return
    headers = {"Authorization": f"Bearer {(latest / 'token').read_text()}"}
    try:
        reply = httpx.get(url + "/status", headers=headers, timeout=2.0, trust_env=False)
    except httpx.HTTPError:
        return
    if reply.status_code == 200 and reply.json().get("run") is not None:
        raise UserError(f"{run.path}: this run is going on (attempt {latest.name}); follow it with `miles-submit logs -f {run.path}`")


def launch(config: RunConfig, run: RunDir, update: Watcher, say: Callable[[str], None]) -> int:
    """Run to the end, restarting after crashes; returns the exit code (docs/formats.md), 130 after Ctrl-C.

    Raises Fenced when somebody else began a newer attempt.
    """
    outcome: dict[str, Any] = {}
    for again in range(config.cluster.restarts + 1):
        attempt = Attempt(run, config, say, restart=again > 0)
        interrupted = _stop_on_interrupt(attempt, say)
        attempt.submit()
        try:
            outcome = because_of_disk(run, attempt.watch(update))
        finally:
            signal.signal(signal.SIGINT, interrupted)
        early = outcome["code"] == OK and config.last_step < config.total_steps
        if early:
            outcome["reason"] = f"stopped after step {config.last_step} (debug.stop_after)"
        attempt.close({**outcome, "stopped": early or bool(attempt.stop_asked)})
        if attempt.stop_asked and outcome["code"] != OK:
            say(f"stopped; {again_with(run)}")
            return 130
        if outcome["code"] != OK:
            attempt.fence.check()  # another attempt of ours would only fence the newer one off
        if outcome["code"] != AGAIN:
            break
        say(f"attempt {attempt.epoch}: {outcome['reason']}" + ("; trying again" if again < config.cluster.restarts else ""))
    if outcome["code"] == WRONG:
        say(f"error: {outcome['reason']}")
    elif outcome["code"] not in (OK, AGAIN):
        say(f"failed: {outcome['reason']}")
    elif outcome["code"] == AGAIN:
        say(f"gave up after {config.cluster.restarts + 1} attempts (cluster.restarts); {again_with(run)}")
    return int(outcome["code"])


def again_with(run: RunDir) -> str:
    """The command that goes on with a run, and whether it resumes or begins again."""
    if newest_complete_checkpoint(run) is None:
        return f"no checkpoint yet, so the same command begins again: miles-submit run {run.path}"
    return f"resume with: miles-submit run {run.path}"


def _stop_on_interrupt(attempt: Attempt, say: Callable[[str], None]) -> Any:
    def handler(signum: int, frame: Any) -> None:
        after = "a checkpoint" if attempt.config.debug.trains else "this step"
        say("stopping at once" if attempt.stop_asked else f"stopping after {after} (Ctrl-C again stops at once)")
        attempt.request_stop()

    return signal.signal(signal.SIGINT, handler)
