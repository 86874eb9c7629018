"""Nodes that failed, told from those that only lost a process."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterable

from miles.config.exits import UserError
from miles.slurm.command import clean_environment
from miles.slurm.job_here import JobHere
from miles.slurm.patience import patiently

BROKEN = ("DOWN", "FAIL", "NOT_RESPONDING", "ERROR", "POWERED_DOWN", "REBOOT")
PROBE_SECONDS = 30.0
TRIES = 3


def broken(nodes: Iterable[str]) -> dict[str, str]:
    """Of these nodes those that Slurm itself holds for broken, with its state as the reason."""
    names = ",".join(nodes)
    return in_words(patiently(["scontrol", "-o", "show", "node", names], check=False).stdout) if names else {}


def in_words(said: str) -> dict[str, str]:
    """The broken ones of `scontrol -o show node`, with their state."""
    found = {}
    for line in said.splitlines():
        fields = dict(word.split("=", 1) for word in reversed(line.split()) if "=" in word)  # an administrator's reason and comment come last
        states = fields.get("State", "").replace("*", "+NOT_RESPONDING").split("+")
        if any(state in BROKEN for state in states):
            found[fields["NodeName"]] = f"Slurm says {'+'.join(states)}"
    return found


def silent(job: JobHere, seconds: float = PROBE_SECONDS) -> dict[str, str]:
    """Nodes of this job that don't run a command within so many seconds: Slurm's own word on a dead node may take minutes.

    One small step a group, side by side.
    """
    many, env = len(job.groups) > 1, clean_environment() | {"SLURM_JOB_ID": str(job.id)}
    steps = []
    for group, nodes in enumerate(job.groups):
        which = [f"--het-group={group}"] if many else []
        size = [f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1"]
        words = ["srun", *which, f"--jobid={job.id}", *size, "--overlap", "--mem=0", "--no-kill", "--kill-on-bad-exit=0", "--quiet", "sh", "-c", "echo $SLURMD_NODENAME"]
        steps.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env))
    deadline, answered = time.monotonic() + seconds, set()
    for step in steps:
        try:
            said = step.communicate(timeout=max(deadline - time.monotonic(), 0.1))[0]
        except subprocess.TimeoutExpired:
            step.kill()
            said = step.communicate()[0]
        answered |= set(said.split())
    return {node: f"did not run a command within {seconds:g} s" for node in job.nodes if node not in answered}


def failed(job: JobHere) -> dict[str, str]:
    """Nodes of this job that nothing can be started on any more, with the reason. A controller that is away blames nobody."""
    here = os.environ.get("SLURMD_NODENAME")
    for _ in range(TRIES):
        try:
            known = patiently(["scontrol", "-o", "show", "node", ",".join(job.nodes)], check=False).stdout
        except UserError:
            return {}
        found = in_words(known) or silent(job)
        if here not in found:
            return found
    return {}  # we run on that node: it is the steps that can't be started
