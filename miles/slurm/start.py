"""When a submission would start, in Slurm's opinion and in words."""

from __future__ import annotations

import datetime
import re

from miles.config.units import hours
from miles.slurm.command import complaint, slurm_command
from miles.slurm.submission import Submission

ESTIMATE = re.compile(r"to start at (\S+) using .*? on (?:nodes? )?(\S+)")


def estimate(submission: Submission, now: datetime.datetime | None = None) -> tuple[str, bool]:
    """(`sbatch --test-only`'s answer in words, whether it would take the job). Nothing is submitted. UserError: no Slurm."""
    done = slurm_command(["sbatch", "--test-only"], input=submission.script, check=False)
    if done.returncode:
        return complaint(done), False
    return words(done.stderr or done.stdout, now or datetime.datetime.now()), True


def words(said: str, now: datetime.datetime) -> str:
    """Of "sbatch: Job 7 to start at 2026-11-22T12:00:00 using 16 processors on nodes a[0-1] in partition p", the last such line's time."""
    found = ESTIMATE.findall(said)
    if not found:
        return "Slurm would take it, and doesn't say when it starts"
    times = [datetime.datetime.fromisoformat(each) for each, _ in found]
    wait = (max(times) - now).total_seconds() / 60
    nodes = ", ".join(dict.fromkeys(nodes for _, nodes in found))
    return f"now, on {nodes}" if wait < 1 else f"in {hours(wait)} ({max(times):%Y-%m-%d %H:%M}), on {nodes}"
