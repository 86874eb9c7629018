"""Slurm's commands while its controller restarts: what could not be asked is asked again."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence

from miles.config.exits import UserError
from miles.slurm.command import complaint, slurm_command

PATIENCE_SECONDS = 120.0
AGAIN_SECONDS = 1.0
AWAY = ("unable to contact", "socket timed out", "connection refused", "zero bytes", "message connect failure", "message receive failure", "not responding", "try again", "temporarily")


def patiently(command: Sequence[str], patience: float = PATIENCE_SECONDS, check: bool = True) -> subprocess.CompletedProcess[str]:
    """slurm_command, tried again while the controller is away, for at most so many seconds. UserError: it stays away, or (check) refuses.

    So is one that was killed: where Slurm ends or requeues a job, it tells every process of the batch step.
    """
    deadline = time.monotonic() + patience
    while True:
        left = max(deadline - time.monotonic(), AGAIN_SECONDS)
        done = slurm_command(command, timeout=min(60.0, left), check=False)
        if not done.returncode:
            return done
        why = complaint(done)
        killed = done.returncode < 0
        if not (killed or any(word in why.lower() for word in AWAY)) or time.monotonic() > deadline:
            if check:
                raise UserError(f"{command[0]}: {why}")
            return done
        time.sleep(AGAIN_SECONDS)
