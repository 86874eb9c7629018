"""Jobs of the heterogeneous executor, with submitit's interface: results, logs and states by component, every action on the leader."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, TypeVar

from submitit.core.core import InfoWatcher, Job
from submitit.core.logger import get_logger
from submitit.core.utils import UncompletedJobError

from miles.config.exits import UserError
from miles.slurm.command import slurm_command
from miles.slurm.environment import HetSlurmJobEnvironment as HetSlurmJobEnvironment  # where the plugin's entry point finds it
from miles.slurm.states import ALIVE, JobState, job_state

R = TypeVar("R")
BEFORE = ("PENDING", "CONFIGURING", "UNKNOWN")  # states in which a job has not run
POLL_SECONDS = 4  # at most, between two questions to Slurm
LATE_SECONDS = 2.0  # for the result of a job that failed to show on a shared file system
COMPLETE_SECONDS = 15.0  # of one that completed: it must be there


class HetSlurmInfoWatcher(InfoWatcher):
    """Asks for the state of jobs by their leaders' ids; needs no accounting, and doesn't wait for a job that Slurm has forgotten."""

    def __init__(self, delay_s: int = POLL_SECONDS) -> None:
        super().__init__(delay_s)
        self.states: dict[str, JobState] = {}
        self.ended: dict[str, float] = {}

    def update(self) -> None:
        """Ask for every job that isn't over yet; where Slurm doesn't answer, what was known stays."""
        for job_id in self._registered - self._finished:
            self._num_calls += 1
            try:
                found = job_state(job_id)
            except UserError as error:
                get_logger().warning(f"Job {job_id}: {error}")
                continue
            self.states[job_id] = found
            self._info_dict[job_id] = {
                "JobID": job_id,
                "State": found.state,
                "NodeList": found.nodes,
                "Reason": found.reason,
                "Restarts": str(found.restarts),
                "ExitCode": "" if found.exit_code is None else str(found.exit_code),
            }
            if found.over:
                self.ended.setdefault(job_id, time.time())
                self._finished.add(job_id)
        self._last_status_check = time.time()

    def get_state(self, job_id: str, mode: str = "standard") -> str:
        """Slurm's word for the state; UNKNOWN only until Slurm has answered for the first time."""
        return self.get_info(job_id, mode=mode).get("State", "UNKNOWN")

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        """Whether nothing more will come of the job."""
        return self.get_state(job_id, mode=mode) not in (*ALIVE, "UNKNOWN")

    def clear(self) -> None:
        """Forget what is known."""
        super().clear()
        self.states.clear()
        self.ended.clear()


class HetSlurmJob(Job[R]):
    """One component of a job; `components` has all of them by name. The one that `submit` returns is the primary, whose end is the job's end."""

    watcher = HetSlurmInfoWatcher()

    def __init__(self, folder: Path | str, job_id: str, tasks: Any = (0,)) -> None:
        super().__init__(folder, job_id, tasks)
        self.name = Path(folder).name
        self.root = Path(folder).expanduser().absolute().parent
        self.ending = self.root / f"{job_id}_end.json"

    @property
    def components(self) -> dict[str, HetSlurmJob[Any]]:
        """Every component's job, the primary first."""
        told = json.loads((self.root / f"{self.job_id}_job.json").read_text())
        return {each["name"]: type(self)(self.root / each["name"], self.job_id, range(each["tasks"])) for each in told["components"]}

    @property
    def state(self) -> str:
        """Slurm's word for the state, at most POLL_SECONDS old; asked again now where the job has left more than that word allows."""
        known = super().state
        outdated = known in BEFORE and (self.paths.result_pickle.exists() or self.ending.exists())
        return self.watcher.get_state(self.job_id, mode="force") if outdated else known

    @property
    def _results_timeout_s(self) -> float:  # type: ignore[override]
        """Seconds that are left to wait for a result; one allowance for all tasks, from when the job was seen to be over."""
        ended = self.watcher.ended.get(self.job_id)
        complete = self.watcher.get_state(self.job_id, mode="cache") == "COMPLETED"
        allowance = COMPLETE_SECONDS if complete else LATE_SECONDS
        return allowance if ended is None else max(0.0, ended + allowance - time.time())

    def _get_outcome_and_result(self) -> tuple[str, Any]:
        if self.stopped() and not self.paths.result_pickle.exists():
            return "success", None
        try:
            return super()._get_outcome_and_result()
        except UncompletedJobError as error:
            because = self.because()
            raise type(error)(f"{because}\n{error}" if because else str(error)) from None

    def stopped(self) -> bool:
        """Whether this component was stopped because the primary had ended well: then it has no result to give."""
        return self.name in (self._told("stopped") or [])

    def because(self) -> str:
        """Which process ended the job, in words; empty where none did."""
        first = self._told("cause")
        if not first:
            return ""
        if "task" in first:
            return f"Task {first['task']} of component {first['component']} on {first['node']}: {first['word']}"
        return f"Component {first['component']}: {first['word']}" if first["component"] else str(first["word"])

    def done(self, force_check: bool = False) -> bool:
        """Whether the job is over, or its results are there. What the batch process has left at its end is a reason to ask Slurm now."""
        return super().done(force_check or self.ending.exists())

    def _told(self, what: str) -> Any:
        """What the job's batch process has left."""
        return json.loads(self.ending.read_text()).get(what) if self.ending.exists() else None

    def cancel(self, check: bool = True) -> None:
        """Cancel the whole job. A component alone can't be: Slurm would leave the others running."""
        slurm_command(["scancel", self.job_id], check=check)

    def _interrupt(self, timeout: bool = False) -> None:
        """Send the signals of a preemption, or of a time limit (for tests, as in submitit)."""
        for name in [] if timeout else ["SIGTERM"]:
            slurm_command(["scancel", "--signal", name, self.job_id])
        slurm_command(["scancel", "--signal", "SIGUSR2", self.job_id])

    @staticmethod
    def of(folder: Path | str, job_id: str) -> HetSlurmJob[Any]:
        """A job that was submitted earlier, by its executor's folder and its id: the primary component's."""
        root = Path(folder).expanduser().absolute()
        first = json.loads((root / f"{job_id}_job.json").read_text())["components"][0]
        return HetSlurmJob(root / first["name"], job_id, range(first["tasks"]))
