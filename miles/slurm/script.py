"""The batch script of a job: a block of #SBATCH lines for each group of nodes, then one command on the first node of the first."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from miles.config.exits import WRONG, UserError
from miles.slurm.options import Options, sbatch_options

if TYPE_CHECKING:
    from miles.config.allocation import Slurm
    from miles.config.placement import NodeGroup

ENVIRONMENT_FD = 9  # where the command can read the environment as Slurm gave it, NUL-separated

FAILED_SETUP = "error: line"


def script(job: Slurm, name: str, groups: Sequence[NodeGroup], command: Sequence[str], output: Path, *, device: str = "cpu") -> str:
    """The whole text. output is the batch process's log, with sbatch's patterns (%j: job id).

    USR1 goes to the command alone, job.lead_seconds before the time limit. Raises UserError for what can't stand in a script.
    """
    whole: Options = {"job-name": job.job_name or name, "requeue" if job.requeue == "requeue" else "no-requeue": None}
    first: Options = {**whole, "output": str(output), "open-mode": "append", "signal": f"B:USR1@{job.lead_seconds}"}
    blocks = [{**(whole if number else first), **sbatch_options(group, device)} for number, group in enumerate(groups)]
    ask = groups[0].ask
    return render(blocks, command, setup=ask.setup, environment=ask.environment)


def render(blocks: Sequence[Options], command: Sequence[str], *, setup: Iterable[str] = (), environment: Mapping[str, str] | None = None) -> str:
    """Text of a script of these blocks; setup and environment are those of the first group, where the command runs.

    The other groups must not inherit them, so the command finds the environment from before on file descriptor ENVIRONMENT_FD.
    """
    lines = ["#!/bin/bash"]
    for number, options in enumerate(blocks):
        lines += [*(["#SBATCH hetjob"] if number else []), *(directive(option, value) for option, value in options.items())]
    lines.append("")
    prepare = [*(f"export {key}={shlex.quote(value)}" for key, value in (environment or {}).items()), *setup_lines(setup)]
    if prepare:
        lines += [f"exec {ENVIRONMENT_FD}< <(env -0)", f"export MILES_ENVIRONMENT_FD={ENVIRONMENT_FD}", *prepare, ""]
    return "\n".join([*lines, f"exec {shlex.join(command)}", ""])


def setup_lines(setup: Iterable[str]) -> list[str]:
    """Shell lines that run setup one after another, and end with exit code 78 and a word at the first that fails. No function: what they declare stays."""
    lines = list(setup)
    if not lines:
        return []
    return [
        "miles_setup=(",
        *(f"  {shlex.quote(line)}" for line in lines),
        ")",
        'for miles_line in "${!miles_setup[@]}"; do',
        '  eval "${miles_setup[miles_line]}" || {',
        f'    echo "{FAILED_SETUP} $((miles_line + 1)) of the group\'s setup ended with exit code $?: ${{miles_setup[miles_line]%%$\'\\n\'*}}"',
        f"    exit {WRONG}",
        "  }",
        "done",
    ]


def directive(name: str, value: str | int | None) -> str:
    """One #SBATCH line."""
    return one_line(f"#SBATCH --{name}" + ("" if value is None else f"={shlex.quote(str(value))}"))


def one_line(text: str) -> str:
    """text, if it is one line: a line break would end the directive, and what follows would be run."""
    if any(mark in text for mark in "\n\r\0"):
        raise UserError(f"{text!r}: a batch script can't hold a line break here; write it in one line")
    return text
