"""Inside a process that the heterogeneous executor started: who it is, what it was asked to do, and what its signals mean."""

from __future__ import annotations

import importlib
import json
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

from submitit.core.job_environment import SignalHandler, _checkpoint
from submitit.core.logger import get_logger
from submitit.core.utils import DelayedSubmission, JobPaths
from submitit.slurm.slurm import SlurmJobEnvironment

from miles.slurm.command import slurm_command
from miles.slurm.step import check_architecture

CHECKPOINTS = ("checkpoint", "__submitit_checkpoint__")
SAVE_SECONDS = 60.0  # how long the primary component waits for the others' checkpoints before the job is requeued


class Call:
    """A function, or a class whose instance is called, by import name. Only the name is pickled, so each component may have its own interpreter."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._target: Any = None

    @property
    def target(self) -> Any:
        """What the name stands for, in this interpreter."""
        if self._target is None:
            module, _, name = self.name.rpartition(".")
            found = getattr(importlib.import_module(module), name)
            self._target = found() if isinstance(found, type) else found
        return self._target

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        check_architecture()
        return self.target(*arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        if name in CHECKPOINTS:
            return getattr(self.target, name)
        raise AttributeError(name)

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "_target": None}


class HetSlurmJobEnvironment(SlurmJobEnvironment):
    """Slurm's variables, as in submitit's own: ranks count within the component, the job id is the leader's in every component."""

    @property
    def component(self) -> str:
        """The component that this process belongs to."""
        return os.environ["MILES_COMPONENT"]

    @property
    def het_group(self) -> int:
        """The component's group of nodes, from 0."""
        return int(os.environ["MILES_HET_GROUP"])

    @property
    def addresses(self) -> dict[str, list[str]]:
        """Addresses of the nodes of every component, by name, in the order of their ranks."""
        return {name: list(nodes) for name, nodes in json.loads(os.environ["MILES_COMPONENT_ADDRESSES"]).items()}

    @property
    def primary(self) -> bool:
        """Whether this is the component whose end is the job's end."""
        return next(iter(self.addresses)) == self.component

    def saved(self, component: str) -> Path:
        """The mark that a component has saved what it can, in this execution of the job."""
        folder, restart = Path(os.environ["SUBMITIT_FOLDER"]).parent, os.environ.get("SLURM_RESTART_COUNT", "0")
        return folder / component / f"{self.job_id}_{restart}.saved"

    def _handle_signals(self, paths: JobPaths, submission: DelayedSubmission) -> None:
        """submitit's signals, and SIGUSR1 for the stop of a component that is no longer needed, or of a job that Slurm ends.

        A run's supervisors (MILES_TERM_ASKS) mind their signals themselves, and are never requeued from inside.
        """
        if "MILES_TERM_ASKS" in os.environ:
            return
        handler = HetSignalHandler(self, paths, submission)
        signal.signal(signal.SIGTERM, handler.end_if_asked)
        signal.signal(signal.SIGCONT, handler.bypass)
        signal.signal(self._usr_sig(), handler.checkpoint_and_try_requeue)
        signal.signal(signal.SIGUSR1, handler.ask_to_end)

    def _requeue(self, countdown: int) -> None:
        """The whole job, once the other components have saved: only its leader can be requeued, and that ends all of them."""
        others = [name for name in self.addresses if name != self.component]
        deadline = time.monotonic() + SAVE_SECONDS
        while time.monotonic() < deadline and not all(self.saved(name).exists() for name in others):
            time.sleep(0.1)
        late = [name for name in others if not self.saved(name).exists()]
        if late:
            get_logger().warning(f"Requeueing although not saved: {', '.join(late)}")
        slurm_command(["scontrol", "requeue", self.raw_job_id])
        get_logger().info(f"Requeued job {self.raw_job_id} ({countdown} remaining timeouts)")


class HetSignalHandler(SignalHandler):
    """submitit's handler where the primary component is concerned; the others save, and serve on until the job is requeued."""

    env: HetSlurmJobEnvironment
    asked = False

    def ask_to_end(self, signum: int, frame: FrameType | None = None) -> None:
        """End as a service does, by SIGTERM, for which the function may have a handler. Asked again: at once."""
        if self.asked:
            os.kill(os.getpid(), signal.SIGKILL)
        self.asked = True
        signal.raise_signal(signal.SIGTERM)

    def end_if_asked(self, signum: int, frame: FrameType | None = None) -> None:
        """SIGTERM of a preemption comes before the time to save, so it is let pass, as in submitit."""
        if self.asked:
            raise SystemExit(0)
        self.bypass(signum, frame)

    def checkpoint_and_try_requeue(self, signum: int, frame: FrameType | None = None) -> None:
        if self.env.primary:
            super().checkpoint_and_try_requeue(signum, frame)
        elif self.env.global_rank == 0:
            delayed = self._delayed
            if hasattr(delayed.function, "checkpoint"):
                _checkpoint(delayed, self._job_paths.submitted_pickle, delayed._timeout_countdown)
            self.env.saved(self.env.component).touch()
