"""A run's jobs in words, for `status`; none of a run on this machine."""

from __future__ import annotations

import datetime
from typing import Any

from miles.config.exits import UserError, full, no_room
from miles.data.store.run_dir import RunDir
from miles.report.summary import Summary, duration
from miles.slurm import queue, records
from miles.slurm.command import TIMEOUT_SECONDS
from miles.slurm.own_jobs import state_of
from miles.slurm.states import FORGOTTEN, ComponentState, JobState

SAID = ("finished", "stopped", "failed")  # by exit.json of the newest attempt


def with_jobs(run: RunDir, summary: Summary, jobs: list[JobState]) -> Summary:
    """A run whose attempt has ended goes on while it has a job: it waits in the queue, or begins another attempt. Without one nothing does."""
    if not jobs and summary.state in ("running", "starting") and not summary.alive:
        summary.state, summary.seconds_left = "lost", None
        summary.reason = full(run.path) if no_room(run.path) else f"its job has ended without a word on the attempt; look at: miles-submit doctor {run.quoted}"
        return summary
    more = [state for state in jobs if state.state != "COMPLETING"]  # Slurm only clears up behind such a one; if it goes on, it is queued next
    if not more or summary.state in ("running", "starting", "finished"):
        return summary
    running = [state for state in more if state.state == "RUNNING"]
    summary.state = "starting" if running else "queued"
    summary.reason = "the job runs, and begins an attempt" if running else more[0].reason
    return summary


def job_rows(run: RunDir, jobs: list[JobState], summary: Summary) -> list[tuple[str, str]]:
    """(name, value) lines of the jobs that wait or run, else of the run's last one. That Slurm has forgotten that is told where the run's files don't say how it ended."""
    if not (entries := records.submitted(run)):
        return []
    rows = []
    for state in jobs or [state_of(entries[-1])]:
        rows.append(("job", f"{state.job_id} ended" if state.state == FORGOTTEN and summary.state in SAID else job_words(state)))
        names: list[str] = next((entry["groups"] for entry in entries if str(entry["job_id"]) == state.job_id), [])
        rows += [(f"group {name}", _group(each)) for name, each in zip(names, state.components, strict=False) if len(names) > 1 and not state.over]
    if bad := records.excluded(run):
        rows.append(("left out", f"{', '.join(bad)} (failed; RUN/slurm/exclude.json says why)"))
    return rows


def job_facts(jobs: list[JobState]) -> list[dict[str, Any]]:
    """The same for --json."""
    return [{"job_id": int(state.job_id), "state": state.state, "reason": state.reason, "nodes": state.nodes, "restarts": state.restarts} for state in jobs]


def _group(each: ComponentState) -> str:
    where = f" on {each.nodes}" if each.nodes else ""
    return f"{each.state.lower()}{where}" + (f" ({each.reason})" if each.reason else "")


def job_words(state: JobState) -> str:
    """One job in words: its state, where, why not yet or how it ended, how often requeued, and how long it has or has to wait."""
    reason = state.meant or state.reason
    text = f"{state.job_id} {'ended' if state.meant else state.state.lower().replace('_', ' ')}"
    text += f" on {state.nodes}" if state.nodes and not state.over else ""
    text += f" ({reason})" if reason else ""
    text += f", requeued {state.restarts} time{'s' if state.restarts > 1 else ''}" if state.restarts else ""
    text += f", exit code {state.exit_code}" if state.exit_code is not None else ""
    if state.over:
        return text
    try:
        leader = next(iter(queue.parts(state.job_id, TIMEOUT_SECONDS)), None)
    except UserError:  # the accounting answered in the controller's stead, and knows no more
        return text
    if state.state == "RUNNING":
        left = _until(leader.end if leader else None)
        return text + (f", time limit in {duration(left)}" if left is not None else "")
    wait = _until(leader.start if leader else None)
    return text + (f", Slurm expects it to start in {duration(wait)}" if wait is not None else "")


def _until(moment: datetime.datetime | None) -> float | None:
    """Seconds until a moment of Slurm's; None for none, and for what is past."""
    if moment is None:
        return None
    left = (moment - datetime.datetime.now()).total_seconds()
    return left if 0 < left < 86400 * 300 else None  # without a limit Slurm names a day a year ahead
