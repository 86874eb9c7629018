"""`miles-submit sweep`: several runs of one recipe, what becomes of them, and their end."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console

from miles.cli.cancel import cancel as cancel_run
from miles.cli.inputs import configuration, with_absolute_paths
from miles.cli.run import make, refuse_errors, refuse_foreign, write_run
from miles.cli.status import state_of as summary_of
from miles.cli.submit import refuse
from miles.config.exits import OK, UserError
from miles.config.schema import RunConfig
from miles.data.store.epoch import newest_epoch
from miles.data.store.run_dir import RunDir
from miles.report.scales import number
from miles.slurm import records
from miles.slurm import sweep as sweeps
from miles.slurm.all_or_none import AllOrNone
from miles.slurm.checks import in_use
from miles.slurm.own_jobs import alive, array_state, state_of
from miles.slurm.records import submitted
from miles.slurm.sole import alone, only_launcher
from miles.slurm.states import FORGOTTEN


def sweep(words: list[str], folder: Path | None, most: int | None, as_json: bool) -> int:
    """Check all, write all, submit all; then print what was submitted. Nothing is written before every run has been checked."""
    console = Console(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False)
    shared, members = sweeps.members(words)
    configs = [with_absolute_paths(configuration([*shared, *member.words])) for member in members]
    if configs[0].cluster.executor != "slurm":
        raise UserError(f"cluster.executor: {configs[0].cluster.executor} has no queue; compose with a cluster, such as clusters/h200, or start the runs one by one")
    root = (folder or Path("runs") / f"{configs[0].name}-sweep").absolute()
    runs = [RunDir(root / member.name) for member in members]
    refuse_taken(root, runs)
    for run, config, member in zip(runs, configs, members, strict=True):
        try:
            refuse_errors(config, console, run)
        except UserError as error:
            raise UserError(f"{member.name}: {error}") from error
    array = sweeps.one_array(configs)
    for run, config in zip(runs[:1] if array else runs, configs, strict=False):
        refuse(config, run, console)
    make(RunDir(root))
    with alone(root, "another command is submitting a sweep here; choose another --run-dir, or wait for it"):
        refuse_taken(root, runs)  # once more: the command that held it before may have submitted one since
        job, ids = _submit(root, runs, configs, members, array, most, console)
    if as_json:
        print(json.dumps({"folder": str(root), **sweeps.read_record(root)}, indent=1, ensure_ascii=False))
        return OK
    for index, (run, member) in enumerate(zip(runs, members, strict=True)):
        print(f"{f'{job}_{index}' if array else ', '.join(map(str, ids[index]))}  {run.path}  {' '.join(member.words)}")
    how = f"one array, job {job}" if array else "a job each" if configs[0].cluster.placement != "jobs" else "jobs of their own"
    console.print(f"submitted {len(runs)} runs as {how}{f', at most {most} at a time' if most else ''}; follow them with: miles-submit status {shlex.quote(str(root))}")
    return OK


def refuse_taken(root: Path, runs: list[RunDir]) -> None:
    """A sweep needs a folder of its own, or one in which the same was begun and taken back. UserError: neither."""
    if (root / sweeps.FILE).exists() and (sweeps.noted(sweeps.read_record(root)) or any(submitted(run) for run in runs)):
        raise UserError(f"{root}: holds a sweep already; its state: miles-submit status {shlex.quote(str(root))}; choose another --run-dir for a new one")
    if not root.is_dir() or not all(_taken_back(entry, runs) for entry in root.iterdir()):
        refuse_foreign(root)


def _taken_back(entry: Path, runs: list[RunDir]) -> bool:
    """Whether it is what a sweep of these runs left that was stopped or killed before it had submitted anything: no attempt began, and no job will make one."""
    if entry.name in (sweeps.SCRIPT, sweeps.FILE):
        return True
    run = next((run for run in runs if run.path == entry), None)
    return run is not None and run.path.is_dir() and not newest_epoch(run) and not any(in_use(run))


def _submit(root: Path, runs: list[RunDir], configs: list[RunConfig], members: list[sweeps.Member], array: bool, most: int | None, console: Console) -> tuple[int | None, list[list[int]]]:
    """Write all, submit all or none; returns (the array's job, []) or (None, the jobs of each run)."""
    for run, config in zip(runs, configs, strict=True):
        make(run)
        with only_launcher(run):
            write_run(run, config)
    sweeps.write_record(root, runs, members, None, [])  # the array's tasks look into it, and may start at once
    jobs = AllOrNone()
    try:
        with jobs:
            job = sweeps.submit_array(jobs, root, runs, configs, most) if array else None
            ids = [] if array else sweeps.submit_each(jobs, runs, configs, most)
            sweeps.write_record(root, runs, members, job, ids)
    except BaseException:
        if jobs.taken_back:
            (root / sweeps.FILE).unlink()
            some = jobs.jobs or any((records.folder(run) / "job.json").exists() for run in runs)  # the one that was being submitted was taken back before
            console.print(f"no run of the sweep is submitted{'; the jobs that were are cancelled' if some else ''}")
        raise
    return job, ids


def status(root: Path, as_json: bool) -> int:
    """A line a run: its state, step, reward, and job."""
    record = sweeps.read_record(root)
    found = [_one(index, entry, record) for index, entry in enumerate(record["runs"])]
    if as_json:
        print(json.dumps({"folder": str(root), "array": record["array"], "runs": found}, indent=1, ensure_ascii=False))
        return OK
    wide = max(len(each["name"]) for each in found)
    for each in found:
        step = f"step {each['step'] or 0} of {each['total_steps']}" if each["total_steps"] else ""
        reward = f"reward {number(each['reward'])}" if each["reward"] is not None else ""
        print("  ".join(filter(None, [f"{each['name']:<{wide}}", f"{each['state']:<8}", step, reward, f"job {each['job']}", each["reason"] or ""])))
    states = [each["state"] for each in found]
    print(f"{len(found)} runs: {', '.join(f'{states.count(state)} {state}' for state in dict.fromkeys(states))}")
    return OK


def cancel(root: Path, now: bool) -> int:
    """Cancel every run that waits or runs, the last first: one that ends lets another begin. UserError when none does."""
    console = Console(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False)
    record = sweeps.read_record(root)
    waiting = sweeps.cancel_waiting(root, record["array"], len(record["runs"])) if record["array"] else 0
    if waiting:
        console.print(f"{waiting} task{'' if waiting == 1 else 's'} of array {record['array']} that had not begun {'is' if waiting == 1 else 'are'} cancelled")
    live = [run for run in (Path(entry["run_dir"]) for entry in reversed(record["runs"])) if alive(RunDir(run))]
    if not live and not waiting:
        raise UserError(f"{root}: none of its runs waits or runs, so there is nothing to cancel")
    for run in live:
        cancel_run(run, now)
    return OK


def _one(index: int, entry: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """What is known of one run; before it has begun, what Slurm says of its job."""
    run = RunDir(Path(entry["run_dir"]))
    summary = summary_of(run.path)
    known = submitted(run)
    job = str(known[-1]["job_id"]) if known else f"{record['array']}_{index}" if record["array"] else ""
    state, reason = summary.state, summary.reason
    if job and state not in ("running", "finished"):
        told = state_of(known[-1]) if known else array_state(run.path.parent, job)
        if told.over and state == "new":  # a task that never began
            state, reason = ("lost" if told.state == FORGOTTEN else told.state.lower()), told.reason
        elif not told.over:
            state, reason = ("starting", "") if told.state == "RUNNING" else ("queued", told.reason)
    return {"name": entry["name"], "run_dir": entry["run_dir"], "words": entry["words"], "state": state, "reason": reason, "step": summary.step, "total_steps": summary.total_steps, "reward": summary.reward_mean, "job": job}
