"""What the controller knows of a job, from squeue with named fields; the one that is a user's text, the path of the batch log, comes last.

A job's name, comment or folder may read like any field of `scontrol show job`, whichever of two is taken.
"""

from __future__ import annotations

import datetime
import re
import subprocess
from dataclasses import dataclass

from miles.config.exits import UserError
from miles.slurm.command import complaint, slurm_command
from miles.slurm.patience import patiently

# Slurm and its administrators write the reason, in words of any kind. Without a separator behind ":" a field is cut at 20 characters.
WORD, JOB = "\x1f", "\x1e"  # end such a text, and all of a job
FIELDS = f"JobID:|,HetJobID:|,HetJobOffset:|,State:|,NodeList:|,RestartCnt:|,exit_code:|,StartTime:|,EndTime:|,SubmitTime:|,Reason:{WORD},STDOUT:{JOB}"
QUICK_SECONDS = 2.0  # where something else waits for the answer


@dataclass(frozen=True)
class Part:
    """A job, or one of a heterogeneous job's: leader is that job's id, group its place there. exit_code is `code:signal`; start and end (the time limit's,
    while it runs) are None where Slurm names none. submitted: as Slurm says it, a requeue's is later; output: the batch log."""

    job_id: str
    leader: str
    group: int
    state: str
    nodes: str
    restarts: int
    exit_code: str
    start: datetime.datetime | None
    end: datetime.datetime | None
    submitted: str
    reason: str
    output: str

    @property
    def name(self) -> str:
        """What Slurm's commands call it: J, or J+k."""
        return f"{self.leader}+{self.group}" if self.leader else self.job_id


def parts(job: int | str, seconds: float | None = None) -> list[Part]:
    """A job's parts, the leader first; none of a job that the controller doesn't know.

    seconds: asked once, for at most so long; None: while the controller restarts, too. UserError: no answer.
    """
    return parse(_squeue(job, seconds, "--Format", FIELDS))


def excluded(job: int | str) -> dict[str, str]:
    """The nodes that each part of a job was submitted without, in Slurm's notation, by its job id."""
    rows = (line.split("|") for line in _squeue(job, None, "--format", "%A|%x").splitlines())  # what --Format calls them differs between versions
    return {row[0]: "" if row[1] in ("(null)", "N/A") else row[1] for row in rows}


def arrays() -> list[tuple[int, str]]:
    """(id, batch log) of every array of ours that the controller knows. UserError: no answer."""
    said = slurm_command(["squeue", "--me", "--noheader", "--states=all", "--Format", f"ArrayJobID:{WORD},STDOUT:{JOB}"]).stdout
    rows = (line.split(WORD, 1) for line in said.split(f"{JOB}\n")[:-1])
    return list({int(job): _path(output, job) for job, output in rows if job.isdecimal()}.items())


def parse(said: str) -> list[Part]:
    """squeue's answer to FIELDS."""
    found = []
    for line in said.split(f"{JOB}\n")[:-1]:
        named, output = line.split(WORD, 1)
        job_id, leader, group, state, nodes, restarts, code, start, end, submitted, reason = ("" if word in ("N/A", "(null)") else word for word in named.split("|", 10))
        when = _moment(start), _moment(end), submitted
        found.append(Part(job_id, leader, int(group or 0), state, nodes, int(restarts or 0), _exit_code(code), *when, reason, _path(output, leader or job_id)))
    return sorted(found, key=lambda part: part.group)


def _squeue(job: int | str, seconds: float | None, *words: str) -> str:
    command = ["squeue", "--noheader", "--states=all", f"--jobs={job}", *words]
    done: subprocess.CompletedProcess[str] = patiently(command, check=False) if seconds is None else slurm_command(command, timeout=seconds, check=False)
    if not done.returncode:
        return done.stdout
    if "Invalid job id" in done.stderr:
        return ""
    raise UserError(f"squeue: {complaint(done)}")


def _path(pattern: str, job: str) -> str:
    """Of a batch log: sbatch's pattern, as squeue has it, for this job."""
    return re.sub("%[%j]", lambda sign: "%" if sign[0] == "%%" else job, pattern)


def _exit_code(text: str) -> str:
    """22.05 prints the status as wait() has it."""
    return f"{int(text) >> 8}:{int(text) & 127}" if text.isdecimal() else text


def _moment(text: str) -> datetime.datetime | None:
    """Slurm also says NONE and Unknown."""
    try:
        return datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
