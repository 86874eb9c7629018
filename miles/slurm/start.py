"""When a submission would start, in Slurm's opinion and in words; and what of the configuration Slurm would not take."""

from __future__ import annotations

import datetime
import re

from miles.config.allocation import Group
from miles.config.placement import node_groups
from miles.config.schema import RunConfig
from miles.config.units import hours
from miles.plan.judge import Finding
from miles.slurm.command import complaint, slurm_command
from miles.slurm.submission import Submission

OURS = ("job-name", "requeue", "no-requeue", "output", "open-mode", "signal", "ntasks-per-node")  # in no group's settings
ESTIMATE = re.compile(r"to start at (\S+) using .*? on (?:nodes? )?(\S+)")


def estimate(submission: Submission, now: datetime.datetime | None = None) -> tuple[str, bool]:
    """(`sbatch --test-only`'s answer in words, whether it would take the job). Nothing is submitted. UserError: no Slurm."""
    done = slurm_command(["sbatch", "--test-only"], input=submission.script, check=False)
    if done.returncode:
        return complaint(done), False
    return words(done.stderr or done.stdout, now or datetime.datetime.now()), True


def refusal(submission: Submission, config: RunConfig, said: str) -> Finding:
    """The error for a submission that Slurm doesn't take (what it said), under the key of the option without which it would."""
    return Finding("error", culprit(submission, config), f"sbatch --test-only: {said}", "mend it, or ask the cluster's operators")


def culprit(submission: Submission, config: RunConfig) -> str:
    """cluster.groups.GROUP.KEY, or as much of it as trying finds out: group by group, then with one option left out at a time. UserError: no Slurm."""
    blocks = [block.splitlines() for block in submission.script.split("#SBATCH hetjob\n")]
    for name, block in zip(submission.groups, ([line for line in block if line.startswith("#SBATCH ")] for block in blocks), strict=True):
        if not _takes(block):
            lines = {_option(line): line for line in block if _option(line) not in OURS}
            lines["partition"] = lines.pop("partition", "")  # last: without it everything else is held against another partition
            option = next((option for option, line in lines.items() if line and _takes([each for each in block if each != line])), None)
            return f"cluster.groups.{name}" + (f".{_key(option, config, name)}" if option else "")
    return "cluster.groups"


def _takes(directives: list[str]) -> bool:
    return slurm_command(["sbatch", "--test-only"], input="\n".join(["#!/bin/bash", *directives, ""]), check=False).returncode == 0


def _option(directive: str) -> str:
    return directive.removeprefix("#SBATCH --").partition("=")[0]


def _key(option: str, config: RunConfig, name: str) -> str:
    ask = next(group.ask for group in node_groups(config) if group.name == name)
    if option == "gres" and ask.gres is None:
        return "gpus_per_node"
    key = option.replace("-", "_")
    return key if key in Group.model_fields and option not in ask.sbatch else f"sbatch.{option}"


def words(said: str, now: datetime.datetime) -> str:
    """Of "sbatch: Job 7 to start at 2026-11-22T12:00:00 using 16 processors on nodes a[0-1] in partition p", the last such line's time."""
    found = ESTIMATE.findall(said)
    if not found:
        return "Slurm would take it, and doesn't say when it starts"
    times = [datetime.datetime.fromisoformat(each) for each, _ in found]
    wait = (max(times) - now).total_seconds() / 60
    nodes = ", ".join(dict.fromkeys(nodes for _, nodes in found))
    return f"now, on {nodes}" if wait < 1 else f"in {hours(wait)} ({max(times):%Y-%m-%d %H:%M}), on {nodes}"
