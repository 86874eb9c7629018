"""The environment of commands that talk to a private cluster."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

INHERITED = ("SLURM", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_")  # of another Slurm, or of a job around us


def command_env(conf: Path, commands: Path | None) -> dict[str, str]:
    """Our environment without another Slurm's variables, with SLURM_CONF, and with the folder of commands first in PATH."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(INHERITED)}
    if commands is not None:
        kept["PATH"] = f"{commands}{os.pathsep}{kept.get('PATH', os.defpath)}"
    return kept | {"SLURM_CONF": str(conf)}


def export_line(conf: Path, commands: Path | None) -> str:
    """The same for a shell, as one line."""
    line = f"export SLURM_CONF={shlex.quote(str(conf))}"
    return line if commands is None else f'{line} PATH={shlex.quote(str(commands))}:"$PATH"'
