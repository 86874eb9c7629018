"""The local executor: submitit's, on this machine, with components that outlive a Ctrl-C and stop when told to."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from submitit.core.utils import UncompletedJobError
from submitit.local.local import LocalExecutor, LocalJob

from miles.config.exits import AGAIN, OK, first_cause

A_YEAR_MINUTES = 60 * 24 * 365


def call(function: str, *arguments: Any) -> Any:
    """The payload of every job: a function by its import name, and plain arguments. Never an object graph."""
    module, _, name = function.rpartition(".")
    return getattr(importlib.import_module(module), name)(*arguments)


@contextlib.contextmanager
def _terminal_signals_ignored() -> Iterator[None]:
    """Children started here inherit that Ctrl-C and a closed terminal are the launcher's affair."""
    kept = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def enter(visible: str | None, function: str, *arguments: Any) -> Any:
    """call() with the accelerators that the launcher sees; submitit's executor hides or numbers them anew."""
    if visible is None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    return call(function, *arguments)


class LocalComponent:
    """A submitted component: one job a node, all on this machine. They share their fate: the first that fails ends the others."""

    def __init__(self, name: str, jobs: list[LocalJob[dict[str, Any]]]) -> None:
        self.name = name
        self.jobs = jobs
        self._ending = False

    def running(self) -> bool:
        """Whether any of its processes lives."""
        alive = self._alive()
        if alive and not self._ending and any(self._outcome(job)["code"] != OK for job in self.jobs if job not in alive):
            self.terminate()
        return bool(alive)

    def outcome(self) -> dict[str, Any]:
        """{code, role, rank, reason, …} of an ended component, the first cause of its nodes'; a supervisor that died without a word counts as killed."""
        return first_cause([self._outcome(job) for job in self.jobs])

    def terminate(self) -> None:
        """Ask it to stop its roles and end."""
        self._ending = True
        for job in self._alive():
            job._process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]

    def kill(self) -> None:
        """End it at once: its roles die with it."""
        for job in self._alive():
            controller = psutil.Process(job._process.pid)  # type: ignore[union-attr]
            for process in [*controller.children(recursive=True), controller]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            job._process.wait()  # type: ignore[union-attr]

    def _alive(self) -> list[LocalJob[dict[str, Any]]]:
        return [job for job in self.jobs if job.state == "RUNNING" and job._process is not None]

    def _outcome(self, job: LocalJob[dict[str, Any]]) -> dict[str, Any]:
        try:
            return job.result()
        except UncompletedJobError:
            node = self.jobs.index(job)
            which = f"component {self.name}" + (f" on node {node}" if len(self.jobs) > 1 else "")
            return {"code": AGAIN, "role": self.name, "rank": node, "reason": f"the supervisor of {which} was killed", "killed": True}


class LocalRunner:
    """Submits the components of one attempt on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def submit(self, component: str, function: str, *arguments: Any, nodes: int | None = None) -> LocalComponent:
        """Start `function(*arguments)` as the component's job; its files lie in folder/component.

        nodes: so many jobs, each called with its number (from 0) as a last argument, as if each were a machine of its own.
        """
        executor = LocalExecutor(folder=self.folder / component)
        executor.update_parameters(timeout_min=A_YEAR_MINUTES, tasks_per_node=1, stderr_to_stdout=True)
        jobs = []
        for node in [()] if nodes is None else [(number,) for number in range(nodes)]:
            with _terminal_signals_ignored():
                job: LocalJob[dict[str, Any]] = executor.submit(enter, os.environ.get("CUDA_VISIBLE_DEVICES"), function, *arguments, *node)  # type: ignore[assignment]
            job._results_timeout_s = 1  # a job on this machine has written its result by the time it is gone
            jobs.append(job)
        return LocalComponent(component, jobs)
