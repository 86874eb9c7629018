"""`miles-submit status`: what a run is doing, from its service while it lives, else from its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from miles.config.exits import OK, UserError
from miles.data.service_call import call_attempt
from miles.data.store.run_dir import RunDir
from miles.report.records import RunRecord, read_run
from miles.report.scales import number
from miles.report.summary import Summary, duration, merge_service, summarise
from miles.slurm.records import submitted
from miles.slurm.states import JobState

ASK_SECONDS = 3.0
STATE_STYLES = {"new": "yellow", "queued": "yellow", "finished": "green", "running": "cyan", "starting": "cyan", "stopped": "yellow", "lost": "yellow", "failed": "red"}


def status(run_dir: Path, as_json: bool) -> int:
    """Print the state of a run, as a table or as one JSON object. UserError when the folder is not a run directory."""
    summary, run, told = state_of(run_dir), RunDir(run_dir), []
    jobs: list[JobState] = []
    if submitted(run):
        from miles.cli.jobs import job_facts, job_rows, with_jobs
        from miles.slurm.own_jobs import alive

        try:
            jobs = alive(run)
            summary, told = with_jobs(run, summary, jobs), job_rows(run, jobs, summary)
        except UserError as error:  # no Slurm here, or it doesn't answer: the files still speak
            told = [("job", f"{submitted(run)[-1]['job_id']}, in a state unknown here ({error})")]
    if as_json:
        print(json.dumps(summary.as_dict() | ({"jobs": job_facts(jobs)} if submitted(run) else {}), ensure_ascii=False))
        return OK
    lines = rows(summary)
    lines[3:3] = told
    console = Console(highlight=False, emoji=False)
    if console.is_terminal:
        console.print(_table(summary, lines))
    else:
        for name, value in lines:
            print(f"{name}: {value}")
    return OK


def state_of(run_dir: Path) -> Summary:
    """Files first; then the service of the newest attempt, if that has not ended and answers."""
    record = read_run(run_dir)
    summary = summarise(record)
    answer = ask_service(record)
    return merge_service(summary, answer) if answer is not None else summary


def ask_service(record: RunRecord) -> dict[str, Any] | None:
    """GET /status of the newest attempt's service; None when the attempt has ended or nothing answers from here."""
    return call_service(record, "GET", "/status")


def call_service(record: RunRecord, method: str, path: str) -> dict[str, Any] | None:
    """A call to the newest attempt's service; None when the attempt has ended or nothing answers from here."""
    if not record.attempts or record.attempts[-1].outcome is not None or record.attempts[-1].damaged:
        return None
    return call_attempt(record.run_dir, record.attempts[-1].folder, method, path, ASK_SECONDS)


def rows(summary: Summary) -> list[tuple[str, str]]:
    """(name, value) lines of the table; what is unknown is left out, but for the state."""
    step = f"{summary.step if summary.step is not None else 0}"
    if summary.total_steps:
        step += f" of {summary.total_steps} ({100 * min((summary.step or 0) / summary.total_steps, 1):.0f} %)"
    found: list[tuple[str, str | None]] = [
        ("run", summary.run),
        ("directory", summary.run_dir),
        ("state", summary.state + (" (its service answers)" if summary.alive else "")),
        ("reason", summary.reason or None),
        ("step", step + (f", {summary.kind}" if summary.kind else "")),
        ("phase", summary.phase),
        ("reward", number(summary.reward_mean) if summary.reward_mean is not None else None),
        ("accuracy", _accuracy(summary)),
        ("tokens/s", number(summary.tokens_per_second) if summary.tokens_per_second is not None else None),
        ("seconds/step", number(summary.seconds_per_step) if summary.seconds_per_step is not None else None),
        ("time left", duration(summary.seconds_left) if summary.seconds_left else None),  # at 0 the last files are written
        ("attempt", f"{summary.epoch}" + (f" ({summary.restarts} restart{'s' if summary.restarts > 1 else ''})" if summary.restarts else "") if summary.epoch is not None else None),
        ("guarantee", guarantee(summary)),
        ("checkpoint", f"step {summary.checkpoint}" if summary.checkpoint is not None else "none yet"),
        ("message", summary.message or None),
    ]
    return [(name, value) for name, value in found if value is not None]


def guarantee(summary: Summary) -> str | None:
    """The tier, since when it is that weak, and why."""
    if summary.tier is None:
        return None
    since = f" since attempt {summary.tier_since}" if summary.tier_since is not None else ""
    return summary.tier + since + (f": {summary.tier_why}" if summary.tier_why else "")


def _accuracy(summary: Summary) -> str | None:
    if summary.accuracy is None:
        return None
    known = summary.accuracy_low is not None and summary.accuracy_high is not None
    return f"{summary.accuracy:.3f}" + (f" (95 % {summary.accuracy_low:.3f} to {summary.accuracy_high:.3f})" if known else "")


def _table(summary: Summary, lines: list[tuple[str, str]]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in lines:
        style = STATE_STYLES.get(summary.state, "") if name == "state" else "bold" if name == "run" else ""
        table.add_row(name, Text(value, style=style))
    return table
