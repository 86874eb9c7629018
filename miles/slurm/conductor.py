"""The batch process of the heterogeneous executor's jobs: one srun a component, and their shared fate.

The end of the primary component (the first) is the job's end: the others are asked to stop, then killed. Any failure ends all at once.
It needs nothing but the standard library until the components have started.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles.config.exits import UserError
from miles.slurm.srun import GONE_SECONDS, Step, addresses, batch_environment, failures, job_nodes, srun, start

POLL_SECONDS = 0.1
SETTLE_SECONDS = 0.5
CANCEL_SECONDS = 3.0  # for tasks to end in a job that Slurm is ending
LOST = ("Node failure on", "Job step aborted")  # srun's words for a step that is ended from outside


@dataclass
class Component:
    """A component's srun."""

    name: str
    tasks: int
    process: subprocess.Popen[bytes]
    said: Path

    def failure(self) -> dict[str, Any] | None:
        """{component, task, node, word} of its first failure, None while all is well."""
        for rank, (node, word) in failures(self.said).items():
            return {"component": self.name, "task": rank, "node": node, "word": word}
        if code := self.process.poll():
            return {"component": self.name, "word": self.words()[-1] if self.words() else f"srun ended with exit code {code}"}
        return None

    def words(self) -> list[str]:
        """What srun has said."""
        lines = self.said.read_text(errors="replace").splitlines()
        return [line.removeprefix("srun: ").removeprefix("error: ") for line in lines]

    def aborted(self) -> bool:
        """Whether the step is being ended from outside; srun waits for its tasks then, and passes on nothing but USR1 and USR2."""
        return any(line.startswith(LOST) for line in self.words())

    def ask(self) -> None:
        """Ask its tasks to end; asked again, they die (miles.slurm.environment)."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR1)

    def end(self) -> None:
        """Kill its tasks. (SIGTERM is srun's order for that.)"""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)


class Conductor:
    """One execution of a job."""

    def __init__(self, folder: Path, uid: str) -> None:
        self.folder, self.uid = folder, uid
        self.leader = os.environ["SLURM_JOB_ID"]
        self.told: dict[str, Any] = json.loads((folder / f".submission_{uid}.json").read_text())
        self.components: list[Component] = []
        # Slurm tells the steps, too, and they tell us. (A handler, not SIG_IGN, which sruns would inherit.)
        signal.signal(signal.SIGTERM, lambda signum, frame: None)

    def start(self) -> None:
        """Start every component."""
        base, where, nodes = batch_environment(), addresses(), {}
        (self.folder / f"{self.leader}_end.json").unlink(missing_ok=True)  # of an execution before a requeue
        steps = {each["name"]: Step(**each["step"]) for each in self.told["components"]}
        for name, step in steps.items():
            nodes[name] = [where.get(node, node) for node in job_nodes(step.het_group)]
        for name, step in steps.items():
            folder = self.folder / name
            self.clear(folder)
            environment = {
                **base,
                **step.environment,
                "SUBMITIT_EXECUTOR": "hetslurm",
                "MILES_COMPONENT": name,
                "MILES_HET_GROUP": str(step.het_group or 0),
                "MILES_COMPONENT_ADDRESSES": json.dumps(nodes),
                **({"MILES_ARCHITECTURE": step.architecture} if step.architecture else {}),
            }
            command = [*step.python, "-u", "-m", "miles.slurm.task", str(folder)]
            said = folder / f"{self.leader}_srun.err"
            with said.open("wb") as log:
                process = start(srun(step, name, folder / self.leader, command, bool(self.told["stderr_to_stdout"])), environment, log)
            self.components.append(Component(name, step.nodes * step.tasks_per_node, process, said))

    def clear(self, folder: Path) -> None:
        """Put the payload where submitit looks for it (the one who submitted may not have come to it), and results of an earlier execution away."""
        with contextlib.suppress(FileNotFoundError):
            (folder / f"{self.uid}.pkl").rename(folder / f"{self.leader}_submitted.pkl")
        for old in folder.glob(f"{self.leader}_*_result.pkl"):
            old.unlink()

    def watch(self) -> int:
        """Follow the components to the job's end; returns its exit code."""
        primary, *others = self.components
        while True:
            if any(component.aborted() for component in self.components):
                return self.abort()
            first = next((failure for component in self.components if (failure := component.failure())), None)
            if first:
                return self.fail(first)
            if primary.process.poll() == 0:
                return self.finish(others)
            time.sleep(POLL_SECONDS)

    def fail(self, first: dict[str, Any]) -> int:
        """End everything at once: nobody computes on, and no node is held."""
        self.leave({"cause": first})
        time.sleep(SETTLE_SECONDS)  # what failed with it may still say so
        for component in self.components:
            component.end()
        return self.over(first)

    def abort(self) -> int:
        """Slurm ends the job or one of its components. Tasks that let SIGTERM pass (submitit's do) would hold their nodes for Slurm's KillWait."""
        time.sleep(SETTLE_SECONDS)
        first: dict[str, Any] = {"component": None, "word": why_ended(self.leader)}
        self.leave({"cause": first})
        for seconds in (min(CANCEL_SECONDS, float(self.told["stop_grace_s"])), 0.0):
            for component in self.components:
                component.ask()
            deadline = time.monotonic() + seconds
            for component in self.components:
                self.wait(component, max(0.0, deadline - time.monotonic()))
        for component in self.components:
            component.end()
        return self.over(first)

    def over(self, first: dict[str, Any]) -> int:
        """Wait for every srun; returns the exit code of what failed first."""
        for component in self.components:
            self.wait(component, GONE_SECONDS)
        print(": ".join(text for text in (first["component"], first["word"]) if text), flush=True)
        codes = [component.process.returncode for component in self.components if first["component"] in (None, component.name)]
        return code_of(first["word"]) or next((code for code in codes if code and code > 0), 1)

    def finish(self, others: list[Component]) -> int:
        """The primary component has ended well: ask the others to stop, then kill those that don't."""
        alive = [component for component in others if component.process.poll() is None]
        self.leave({"stopped": [component.name for component in alive]})
        for component in alive:
            component.ask()
        deadline = time.monotonic() + float(self.told["stop_grace_s"])
        for component in alive:
            self.wait(component, max(0.0, deadline - time.monotonic()))
            component.end()
            self.wait(component, GONE_SECONDS)
        return 0

    def leave(self, told: dict[str, Any]) -> None:
        """Tell the job's owner how it ended."""
        path = self.folder / f"{self.leader}_end.json"
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps(told))
        partial.rename(path)

    def wait(self, component: Component, seconds: float) -> None:
        """Wait for an srun's end, at most so long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            component.process.wait(seconds)


def code_of(word: str) -> int | None:
    """The exit code in srun's word for a task's end; srun's own is the highest of all its tasks, killed ones included."""
    return int(word.rpartition(" ")[2]) if word.startswith("Exited with exit code ") else None


def why_ended(leader: str) -> str:
    """Why Slurm ended a step, in words."""
    from miles.slurm.states import job_state

    try:
        state = job_state(leader)
    except UserError as error:
        return f"a step was ended by Slurm ({error})"
    if state.state == "RUNNING":
        return f"a step was ended by Slurm: {state.reason or 'a node was lost, or a component cancelled'}"
    return f"the job was ended by Slurm: {state.reason or 'cancelled, preempted or requeued'}"


def main(folder: str, uid: str) -> int:
    """Body of the batch script."""
    conductor = Conductor(Path(folder), uid)
    conductor.start()
    return conductor.watch()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
