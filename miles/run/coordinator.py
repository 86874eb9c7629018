"""A role's side of the rollout service: a few blocking calls, and a heartbeat."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from typing import Any, NoReturn

import httpx

from miles.config.exits import AGAIN, TryAgain, UserError
from miles.run.role import Role
from miles.training.progress import HERE, Progress

HEARTBEAT_SECONDS = 2.0
PATIENCE_SECONDS = 60.0


class StopRequested(Exception):
    """Someone asked the run to stop: save, then end."""


class NewEngines(Exception):
    """Engines came that don't hold the weights yet (placement jobs)."""

    def __init__(self, urls: list[str]) -> None:
        super().__init__(", ".join(urls))
        self.urls = urls


class Coordinator:
    """Calls of one role to the rollout service, with the run's token and this attempt's epoch."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.http = httpx.Client(base_url=role.service, headers={"Authorization": f"Bearer {role.token}"}, timeout=40.0, trust_env=False)

    def call(self, method: str, path: str, json: dict[str, Any] | None = None, params: dict[str, Any] | None = None) -> tuple[int, Any]:
        """One call; retried while the service is starting. Raises TryAgain when it is lost or this attempt is fenced off."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                reply = self.http.request(method, path, json=json, params=params)
                break
            except httpx.TransportError as error:
                if time.monotonic() > deadline:
                    raise TryAgain(f"the rollout service at {self.role.service} is lost ({error})") from error
                time.sleep(0.2)
        body = reply.json() if reply.content and reply.headers.get("content-type") == "application/json" else {}
        if reply.status_code == 409:
            raise TryAgain(body.get("message") or body.get("error") or "the attempt is over")
        if reply.status_code == 422:
            raise UserError(body["error"])
        if reply.status_code not in (200, 202):
            raise RuntimeError(f"rollout service: {method} {path} answered {reply.status_code}: {reply.text[:500]}")
        return reply.status_code, body

    def register(self, **more: Any) -> int:
        """Tell the service who is here; returns this process's rank, which is another than the supervisor's for a worker that comes late."""
        role = self.role
        _, body = self.call("POST", "/register", {"role": role.name, "rank": role.rank, "epoch": role.epoch, "node": role.node_name, "place": role.place, **more})
        return int(body["rank"])

    def peers(self, role: str, count: int, **where: Any) -> list[dict[str, Any]]:
        """Wait until `count` processes of a role have registered; where: their place, if only those count."""
        with HERE.waiting():
            while True:
                code, body = self.call("GET", "/peers", params={"role": role, "count": count, "wait": 20, **where})
                if code == 200:
                    return list(body)

    def engines(self) -> list[str]:
        """Addresses of the engines that are here now."""
        return list(self.call("GET", "/engines")[1])

    def synced(self, checksum: str, engines: list[str], lost: list[str]) -> None:
        """Say which engines hold the weights of this checksum, and which could not be reached (placement jobs)."""
        self.call("POST", "/sync", {"checksum": checksum, "engines": engines, "lost": lost, "epoch": self.role.epoch})

    def publish(self, key: str, value: Any) -> None:
        """Leave a value for the others (a port, a folder)."""
        self.call("POST", "/value", {"key": key, "value": value, "epoch": self.role.epoch})

    def lookup(self, key: str) -> Any:
        """Wait for a value."""
        with HERE.waiting():
            while True:
                code, body = self.call("GET", "/value", params={"key": key, "wait": 20})
                if code == 200:
                    return body["value"]

    def batch(self, job: dict[str, Any], through_stop: bool = False) -> str:
        """Wait for a sealed batch; returns the manifest's path.

        Raises StopRequested, unless the wait goes on through a stop, and NewEngines: ask again once they have the weights.
        """
        with HERE.waiting():
            while True:
                code, body = self.call("POST", "/batch", {"job": job, "epoch": self.role.epoch})
                if body.get("stop") and not through_stop:
                    raise StopRequested  # a batch that is sealed already is used when the run goes on
                if code == 200:
                    return str(body["manifest"])
                if body.get("engines"):
                    raise NewEngines(body["engines"])

    def announce(self, **what: Any) -> bool:
        """Say what the trainer does (for `status`); returns whether a stop was asked for."""
        _, body = self.call("POST", "/announce", {"epoch": self.role.epoch, **what})
        return bool(body.get("stop"))

    def finish(self) -> None:
        """The run is over: workers may go."""
        self.call("POST", "/finish", {"epoch": self.role.epoch})

    def keep_alive(self, every: float = HEARTBEAT_SECONDS, progress: Progress | None = None) -> None:
        """Heartbeats from a thread; the process ends with 75 when the service is gone or says so.

        progress: what the service's watchdog should know of this rank. When it asks, the stacks of all threads go to the log.
        """
        threading.Thread(target=self._beat, args=(every, progress), name="heartbeat", daemon=True).start()

    def _beat(self, every: float, progress: Progress | None) -> None:
        beat, dumped = Coordinator(self.role), False
        word = {"role": self.role.name, "rank": self.role.rank, "place": self.role.place, "epoch": self.role.epoch}
        while True:
            told = {} if progress is None else {"progress": progress.told(), "dumped": dumped}
            try:
                _, answer = beat.call("POST", "/heartbeat", {**word, **told})
            except TryAgain as error:
                end(self.role, str(error))
            except (UserError, RuntimeError) as error:  # the attempt is over; the role's own next call says so in full
                print(f"{self.role.name}: heartbeat: {error}", file=sys.stderr, flush=True)
                return
            if answer.get("dump") and not dumped:
                print(f"{self.role.name} {self.role.rank}: the run hangs; the stacks of all threads:", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                dumped = True
                continue
            time.sleep(every)


def end(role: Role, why: str) -> NoReturn:
    """End this process at once with 75: from a thread whose exception nobody would see."""
    print(f"{role.name}: {why}", file=sys.stderr, flush=True)
    os._exit(AGAIN)
