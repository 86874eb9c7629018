"""`miles-submit cancel`: a run saves and ends for good, or ends at once."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from miles.cli.status import call_service
from miles.config.compose import load_config
from miles.config.exits import OK, UserError
from miles.data.store.run_dir import RunDir
from miles.report.records import read_run, require_run_dir
from miles.slurm import records
from miles.slurm.command import slurm_command
from miles.slurm.own_jobs import alive


def cancel(run_dir: Path, now: bool) -> int:
    """Ask a run to save and end for good; now: end it without saving. UserError where nothing is to be ended."""
    run, console = require_run_dir(run_dir), Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    if load_config([run.run_yaml]).cluster.executor == "local":
        return _cancel_here(run, now, console)
    jobs = alive(run)
    if not jobs:
        raise UserError(f"{run_dir}: none of its jobs waits or runs, so there is nothing to cancel")
    folder = run.quoted
    records.cancel(run, [int(state.job_id) for state in jobs])  # first: one that is about to start ends at once
    for state in sorted(jobs, key=lambda state: state.state == "RUNNING"):  # those that wait would start when a running one ends
        if state.state == "RUNNING" and not now:
            slurm_command(["scancel", "--batch", "--signal=USR2", state.job_id])
            console.print(f"job {state.job_id} was asked to save and end; follow it with: miles-submit status {folder}")
        else:
            slurm_command(["scancel", state.job_id])
            console.print(f"job {state.job_id} ({state.state.lower()}) is cancelled")
    console.print(f"go on later with: miles-submit resume {folder}")
    return OK


def _cancel_here(run: RunDir, now: bool, console: Console) -> int:
    """The same for a run on this machine, by its service."""
    if now:
        raise UserError("--now is for jobs; on this machine, press Ctrl-C twice where the run was started")
    if call_service(read_run(run.path), "POST", "/stop") is None:
        raise UserError(f"{run.path}: does not run, or not on this machine")
    console.print(f"asked to save and end; follow it with: miles-submit status {run.quoted}")
    return OK
