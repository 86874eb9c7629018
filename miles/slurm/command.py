"""Slurm's commands: argument lists, without the settings of a job that we may be inside of, and with one-line errors."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from miles.config.exits import UserError

KEPT = ("SLURM_CONF", "SLURM_JWT")  # which cluster, and the right to ask it; everything else belongs to another job
PREFIXES = ("SLURM", "SBATCH_", "SALLOC_", "SRUN_", "SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_", "SPRIO_", "PMI_", "PMIX_")
# What steps and supervisors set for their own processes: a job that is submitted from inside of one is another's.
OF_PROCESSES = frozenset(
    {"SUBMITIT_EXECUTOR"}
    | {
        f"MILES_{name}"
        for name in (
            *("ADDRESSES", "ARCHITECTURE", "COMPONENT", "COMPONENT_ADDRESSES", "ENVIRONMENT_FD", "EPOCH", "HET_GROUP", "HOST", "NODE", "NODE_NAME"),
            *("PLACE", "RANK", "RUN_DIR", "SERVICE", "TERM_ASKS", "TOKEN", "WORLD_SIZE"),
        )
    }
)
HIDDEN_TOO = {"SCONTROL_ALL": "1", "SINFO_ALL": "1", "SQUEUE_ALL": "1"}  # a run may be in a partition that is hidden, and Slurm then denies its nodes and jobs
TIMEOUT_SECONDS = 60.0
HINT = 'Try "'  # Try "sbatch --help" for more information
NOISE = ("Batch job submission failed: ", "allocation failure: ")


def clean_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment (default: ours) without what Slurm set for a job, or what would change Slurm's answers."""
    given = os.environ if environment is None else environment
    return {name: value for name, value in given.items() if name in KEPT or not (name.startswith(PREFIXES) or name in OF_PROCESSES)}


def slurm_command(
    command: Sequence[str], *, timeout: float = TIMEOUT_SECONDS, input: str | None = None, check: bool = True, own_session: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands and return its texts. check: a refusal is a UserError; otherwise the caller reads the exit code.
    own_session: a Ctrl-C in the terminal doesn't reach it.

    Raises UserError when the command or the file of SLURM_CONF is absent, doesn't answer within timeout seconds, or (check) is refused.
    """
    name = command[0]
    conf = os.environ.get("SLURM_CONF")
    if conf and not Path(conf).is_file():  # Slurm's commands would wait for it, then blame the controller
        raise UserError(f"{name}: SLURM_CONF={conf}: no such file; set it to your cluster's slurm.conf, or unset it")
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout, input=input, env=clean_environment() | HIDDEN_TOO, start_new_session=own_session)
    except FileNotFoundError:
        raise UserError(f"{name}: command not found; is this a node of a Slurm cluster? Without Slurm, set cluster.executor: local") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{name}: Slurm didn't answer within {timeout:g} s; is its controller up (`scontrol ping`)?") from None
    if check and done.returncode:
        raise UserError(f"{name}: {complaint(done)}")
    return done


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """What a failed command says, in one line: its errors without prefixes, the last one first, since that is the verdict."""
    lines = [re.sub(r"^\S+: (error: |fatal: |(?=unrecognized option|invalid option))", "", line).strip() for line in (done.stderr or done.stdout).splitlines()]
    lines = [line for line in dict.fromkeys(lines) if line and not line.startswith(HINT)]
    if not lines:
        return f"ended with exit code {done.returncode} and no word"
    verdict, *before = reversed(lines)
    for noise in NOISE:
        verdict = verdict.replace(noise, "")
    return verdict + (f" ({'; '.join(reversed(before))})" if before else "")
