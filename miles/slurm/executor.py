"""A submitit executor for heterogeneous jobs: one component a group of nodes, each with its own hardware, partition and interpreter.

Functions are given by import name, so that no component needs another's packages. It is registered as submitit's plugin `hetslurm`.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import shlex
import shutil
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from submitit.core.core import EquivalenceDict, Executor
from submitit.core.utils import DelayedSubmission, FailedSubmissionError

from miles.config.exits import UserError
from miles.slurm.command import slurm_command
from miles.slurm.environment import Call
from miles.slurm.job import HetSlurmJob

JOB = {"job_name": "submitit", "signal_delay_s": 90, "stop_grace_s": 10, "stderr_to_stdout": False}  # parameters of the job as a whole
DEFAULT_MINUTES = 5  # of submitit, for its count of time-outs


class HetSlurmExecutor(Executor):
    """Submits jobs of one or more components; without `component` there is one, `main`.

    folder: on a file system that all nodes share; each component has a folder of its own in it, with submitit's files.
    max_num_timeout: how often a job whose function can save itself is requeued at its time limit. python: command of the interpreter, for
    components that don't say otherwise (their `python`).
    """

    job_class = HetSlurmJob

    def __init__(self, folder: str | Path, max_num_timeout: int = 3, python: str | None = None) -> None:
        super().__init__(folder)
        self.max_num_timeout = max_num_timeout
        self.python = shlex.quote(sys.executable) if python is None else python
        self.groups: dict[str, dict[str, Any]] = {}

    @classmethod
    def affinity(cls) -> int:
        """Available where srun is, and taken only when asked for."""
        return -1 if shutil.which("srun") is None else 0

    @classmethod
    def _equivalence_dict(cls) -> EquivalenceDict:
        return {
            "name": "job_name",
            "timeout_min": "time",
            "mem_gb": "mem",
            "nodes": "nodes",
            "cpus_per_task": "cpus_per_task",
            "gpus_per_node": "gpus_per_node",
            "tasks_per_node": "tasks_per_node",
        }

    @classmethod
    def _valid_parameters(cls) -> set[str]:
        from miles.config.allocation import Group

        return {*JOB, *Group.model_fields, "tasks_per_node"}

    def _convert_parameters(self, params: dict[str, Any]) -> dict[str, Any]:
        params = super()._convert_parameters(params)
        if "mem" in params:
            params["mem"] = f"{round(params['mem'] * 1024)}M"
        return params

    def _internal_update_parameters(self, **kwargs: Any) -> None:
        """Parameters of the job, and of every component that doesn't say otherwise. Raises ValueError, with what there is, for an unknown one."""
        self._refuse_unknown(kwargs, self._valid_parameters())
        super()._internal_update_parameters(**kwargs)
        self._resolved("main", {})

    def component(self, name: str, **parameters: Any) -> None:
        """Add a component, on nodes of its own: parameters as those of a group in the configuration (miles.config.allocation.Group), and
        tasks_per_node. The first one is the primary. Raises ValueError, with what there is, for an unknown parameter or a wrong value."""
        if not name or not all(letter.isalnum() or letter in "-_" for letter in name):
            raise ValueError(f"component {name!r}: a name is made of letters, digits, - and _, since it names a folder")
        self._refuse_unknown(parameters, self._valid_parameters() - set(JOB))
        self._resolved(name, parameters)
        self.groups[name] = parameters

    @staticmethod
    def _refuse_unknown(given: Mapping[str, Any], valid: set[str]) -> None:
        unknown = sorted(set(given) - valid)
        if unknown:
            raise ValueError(f"unavailable parameter(s): {', '.join(unknown)}; there are: {', '.join(sorted(valid))}")

    def _resolved(self, name: str, own: Mapping[str, Any]) -> tuple[Any, int]:
        """(nodes of a component, tasks a node): what it says over what all say; environment, sbatch and srun key by key."""
        from pydantic import ValidationError

        from miles.config.allocation import Group
        from miles.config.placement import MERGED, NodeGroup

        wanted = {key: value for key, value in {**self.parameters, **own}.items() if key not in JOB}
        for key in MERGED:
            wanted[key] = {**(self.parameters.get(key) or {}), **(own.get(key) or {})}
        tasks, gpus = int(wanted.pop("tasks_per_node", 1)), wanted.pop("gpus_per_node", None) or 0
        try:
            ask = Group(**wanted)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"component {name}, {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        return NodeGroup(name, ask.nodes or 1, gpus, (name,), ask), tasks

    def _internal_process_submissions(self, delayed_submissions: list[DelayedSubmission]) -> list[HetSlurmJob[Any]]:  # type: ignore[override]
        """One job for each: heterogeneous jobs can't be arrays. Every component calls the same function."""
        jobs = []
        for delayed in delayed_submissions:
            names = list(self.groups) or ["main"]
            jobs.append(self._submit({name: (delayed.function, delayed.args, delayed.kwargs) for name in names}))
        return jobs

    def submit_components(self, payloads: Mapping[str, Sequence[Any]]) -> HetSlurmJob[Any]:
        """Submit a job in which each component calls its own function: {component: (function, argument, …)}. Returns the primary's job."""
        wanted = list(self.groups) or ["main"]
        if set(payloads) != set(wanted):
            raise ValueError(f"functions are given for {', '.join(payloads)}, but the components are {', '.join(wanted)}")
        return self._submit({name: (payloads[name][0], tuple(payloads[name][1:]), {}) for name in wanted})

    def _submit(self, payloads: Mapping[str, tuple[Any, Sequence[Any], Mapping[str, Any]]]) -> HetSlurmJob[Any]:
        from miles.config.units import minutes_of
        from miles.slurm.options import sbatch_options, srun_options
        from miles.slurm.script import render

        uid = uuid.uuid4().hex
        job = {**JOB, **{key: value for key, value in self.parameters.items() if key in JOB}}
        blocks: list[Any] = []
        told: list[dict[str, Any]] = []
        self.folder.mkdir(parents=True, exist_ok=True)
        resolved = {name: self._resolved(name, self.groups.get(name, {})) for name in payloads}
        for number, (name, (function, arguments, keywords)) in enumerate(payloads.items()):
            group, tasks = resolved[name]
            options: dict[str, Any] = {"job-name": job["job_name"], "signal": f"USR2@{job['signal_delay_s']}"}
            if not number:
                options |= {"output": f"{str(self.folder).replace('%', '%%')}/%j_log.out", "open-mode": "append"}
            blocks.append({**options, **sbatch_options(group, "cuda"), "ntasks-per-node": tasks, **group.ask.sbatch})
            step = {
                "het_group": number if len(payloads) > 1 else None,
                "first_node": 0,
                "nodes": group.nodes,
                "tasks_per_node": tasks,
                "options": srun_options(group, "cuda"),
                "python": shlex.split(group.ask.python or self.python),
                "setup": group.ask.setup,
                "environment": group.ask.environment,
                "architecture": group.ask.architecture,
            }
            told.append({"name": name, "tasks": group.nodes * tasks, "step": step})
            delayed = DelayedSubmission(Call(import_name(function)), *arguments, **keywords)
            minutes = minutes_of(group.ask.time) if group.ask.time else DEFAULT_MINUTES
            delayed.set_timeout(round(minutes or sys.maxsize), self.max_num_timeout)
            (self.folder / name).mkdir(exist_ok=True)
            delayed.dump(self.folder / name / f"{uid}.pkl")
        first = resolved[next(iter(resolved))][0].ask
        command = [*shlex.split(first.python or self.python), "-m", "miles.slurm.conductor", str(self.folder), uid]
        text = render(blocks, command, setup=first.setup, environment=first.environment)
        spec, script = self.folder / f".submission_{uid}.json", self.folder / f".submission_{uid}.sh"
        spec.write_text(json.dumps({"stop_grace_s": job["stop_grace_s"], "stderr_to_stdout": job["stderr_to_stdout"], "components": told}, indent=1))
        script.write_text(text)
        try:
            leader = slurm_command(["sbatch", "--parsable", str(script)]).stdout.strip().partition(";")[0]
        except UserError as error:
            for left in (spec, script, *(self.folder / name / f"{uid}.pkl" for name in payloads)):
                left.unlink()
            raise FailedSubmissionError(str(error)) from None
        (self.folder / f"{leader}_job.json").symlink_to(spec.name)
        for name in payloads:
            (self.folder / name / f"{leader}_submission.sh").symlink_to(f"../{script.name}")
            # Its batch process may have been faster.
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name / f"{uid}.pkl").rename(self.folder / name / f"{leader}_submitted.pkl")
        return HetSlurmJob.of(self.folder, leader)


def import_name(function: str | Callable[..., Any]) -> str:
    """The name by which every interpreter finds a function or a class: `package.module.name`. Raises ValueError for one that has none."""
    if isinstance(function, Call):
        return function.name
    if isinstance(function, str):
        if "." not in function:
            raise ValueError(f"{function!r}: a function is given by its import name, package.module.function")
        return function
    module, name = getattr(function, "__module__", "__main__"), getattr(function, "__qualname__", "")
    if module == "__main__" or not name.isidentifier() or not (inspect.isfunction(function) or inspect.isclass(function) or inspect.isbuiltin(function)):
        raise ValueError(f"{function!r} can't be imported by the job's interpreters: put it at the top of a module of your own, and submit that, or its import name")
    return f"{module}.{name}"
