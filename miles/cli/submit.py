"""The Slurm side of `miles-submit run` and `render`: held against the cluster, written, submitted, followed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from miles.cli.progress import Progress
from miles.cli.status import ask_service
from miles.config.exits import AGAIN, OK, WRONG, UserError, full, no_room
from miles.config.schema import RunConfig
from miles.data.store.epoch import newest_epoch
from miles.data.store.files import Damaged, read_json
from miles.data.store.run_dir import RunDir
from miles.plan.judge import Finding
from miles.report.records import Attempt, RunRecord
from miles.slurm import checks, site, start
from miles.slurm.own_jobs import state_of
from miles.slurm.states import JobState, watched
from miles.slurm.submission import prepare, submit

POLL_SECONDS = 2.0


def refuse(config: RunConfig, run: RunDir, console: Console, need_slurm: bool = True) -> None:
    """What Slurm has against it, before anything is written: warnings are printed, the first error ends it."""
    try:
        there = site.ask()
    except UserError as error:
        if need_slurm:
            raise
        console.print(f"warning: not checked against a cluster: {error}")
        found = list(checks.files(config, run))
    else:
        found = checks.refused(config, run, there)
        if not any(finding.level == "error" for finding in found):
            found += opinion(config, run)
    for finding in found:
        if finding.level == "warning":
            console.print(f"warning: {finding}")
    errors = [finding for finding in found if finding.level == "error"]
    if errors:
        more = f" ({len(errors) - 1} more: miles-submit plan)" if len(errors) > 1 else ""
        raise UserError(f"{errors[0]}{more}")


def refuse_in_use(run: RunDir) -> None:
    """Once more, by who holds the lock: the command that held it before may have submitted a job since."""
    for finding in checks.in_use(run):
        raise UserError(str(finding))


def opinion(config: RunConfig, run: RunDir) -> list[Finding]:
    """An error for each batch script that sbatch itself would not take."""
    said = [(each, *start.estimate(each)) for each in {each.script: each for each in prepare(config, run)}.values()]
    return [start.refusal(each, config, words) for each, words, taken in said if not taken]


def submit_run(run: RunDir, config: RunConfig, console: Console) -> Callable[[], int]:
    """Submit, say the jobs and how to follow them; returns what waits for the end, and gives the run's exit code."""
    before = newest_epoch(run)
    entries = submit(run, prepare(config, run))
    for entry in entries:
        console.print(f"submitted job {entry['job_id']}: {entry['name']} ({', '.join(entry['groups'])})")
    folder = run.quoted
    console.print(f"follow it with: miles-submit status {folder}; miles-submit logs -f {folder}; its own output: {run.path}/slurm/{entries[0]['job_id']}.log")

    def wait() -> int:
        try:
            return follow(run, entries, before, console)
        except KeyboardInterrupt:
            console.print(f"no longer followed; the job goes on, and ends with: miles-submit cancel {folder}")
            raise

    return wait


def follow(run: RunDir, entries: list[dict[str, Any]], before: int, console: Console) -> int:
    """Show the progress until none of the jobs has anything to do; returns the exit code of the newest attempt after `before`, else of the job."""
    progress, said = Progress(), ""
    states: list[JobState] = []
    try:
        for states in watched(lambda: [state_of(entry) for entry in entries], progress.say, POLL_SECONDS):
            words = "; ".join(state.words for state in states if not state.over)
            answer = ask_service(_newest(run)) if words else None
            if answer is not None:
                progress.update({name: value for name, value in answer.items() if name not in ("message", "notices")})
            elif words and words != said:
                progress.say(words)
                said = words
    finally:
        progress.close(None)
    return _end(run, states, before, console)


def _end(run: RunDir, states: list[JobState], before: int, console: Console) -> int:
    newest = _newest(run)
    attempt = newest.attempts[-1] if newest.attempts else None
    if attempt is not None and attempt.epoch > before and attempt.outcome is not None:
        code, reason = int(attempt.outcome["code"]), str(attempt.outcome["reason"])
    else:
        well = all(state.state == "COMPLETED" for state in states)  # one that was cancelled before it began has exit code 0, too
        code = next((state.exit_code for state in states if state.exit_code), None) or (OK if well else AGAIN)
        reason = full(run.path) if code == WRONG and no_room(run.path) else "; ".join(state.words for state in states)
    console.print(f"finished: {run.path}" if code == OK else f"ended with exit code {code}: {reason}; {run.path}")
    return code


def _newest(run: RunDir) -> RunRecord:
    """The newest attempt alone: the rest of a long run's files is not read every two seconds."""
    epoch = newest_epoch(run)
    if not epoch:
        return RunRecord(run)
    folder: Path = run.attempt(epoch)
    outcome: dict[str, Any] | None = None
    with contextlib.suppress(FileNotFoundError, Damaged):  # it goes on, or died without a word
        outcome = read_json(folder / "exit.json")
    return RunRecord(run, attempts=[Attempt(epoch, folder, outcome)])
