"""The local executor: submitit's, on this machine, with components that outlive a Ctrl-C and stop when told to."""

from __future__ import annotations

import contextlib
import importlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from submitit.core.utils import UncompletedJobError
from submitit.local.local import LocalExecutor, LocalJob

from miles.config.exits import AGAIN

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


class LocalComponent:
    """A submitted component."""

    def __init__(self, name: str, job: LocalJob[dict[str, Any]]) -> None:
        self.name = name
        self.job = job

    def running(self) -> bool:
        """Whether its process lives."""
        return self.job.state == "RUNNING"

    def outcome(self) -> dict[str, Any]:
        """{code, role, rank, reason} of an ended component; a supervisor that died without a word counts as killed."""
        try:
            return self.job.result()
        except UncompletedJobError:
            return {"code": AGAIN, "role": self.name, "rank": 0, "reason": f"the supervisor of component {self.name} was killed", "killed": True}

    def terminate(self) -> None:
        """Ask it to stop its roles and end."""
        if self.running() and self.job._process is not None:
            self.job._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once: its roles die with it."""
        if self.running() and self.job._process is not None:
            controller = psutil.Process(self.job._process.pid)
            for process in [*controller.children(recursive=True), controller]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.job._process.wait()


class LocalRunner:
    """Submits the components of one attempt on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def submit(self, component: str, function: str, *arguments: Any, gpus: int = 0) -> LocalComponent:
        """Start `function(*arguments)` as the component's job; its files lie in folder/component."""
        executor = LocalExecutor(folder=self.folder / component)
        executor.update_parameters(timeout_min=A_YEAR_MINUTES, tasks_per_node=1, gpus_per_node=gpus, stderr_to_stdout=True)
        with _terminal_signals_ignored():
            job: LocalJob[dict[str, Any]] = executor.submit(call, function, *arguments)  # type: ignore[assignment]
        job._results_timeout_s = 1  # a job on this machine has written its result by the time it is gone
        return LocalComponent(component, job)
