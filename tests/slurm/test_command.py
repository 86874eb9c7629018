"""Slurm's commands are run without another job's settings, and fail in one line."""

from __future__ import annotations

import pytest

from miles.config.exits import UserError
from miles.slurm.command import clean_environment, slurm_command
from miles.slurm.minicluster import Cluster


def test_a_job_around_us_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Submission from inside of a job: sbatch takes options from SBATCH_*, srun from SLURM_*."""
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_HET_SIZE", "SLURMD_NODENAME", "SBATCH_ACCOUNT", "SRUN_DEBUG", "PMI_RANK", "SACCT_FORMAT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/elsewhere/slurm.conf")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    seen = dict(line.split("=", 1) for line in slurm_command(["env"]).stdout.splitlines() if "=" in line)
    assert {name for name in seen if name.startswith(("SLURM", "SBATCH", "SRUN", "PMI", "SACCT"))} == {"SLURM_CONF"}
    assert seen["WANDB_API_KEY"] == "secret"
    assert clean_environment({"SLURM_JOB_ID": "1", "SLURM_CONF": "x", "HOME": "/h"}) == {"SLURM_CONF": "x", "HOME": "/h"}


def test_absent_and_silent_commands() -> None:
    with pytest.raises(UserError, match=r"^sbatch-that-is-not-here: command not found; .* cluster.executor: local$"):
        slurm_command(["sbatch-that-is-not-here"])
    with pytest.raises(UserError, match=r"^sleep: Slurm didn't answer within 0.1 s"):
        slurm_command(["sleep", "5"], timeout=0.1)


def test_refusals_are_one_line(slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in slurm.env().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as refused:
        slurm_command(["sbatch", "--partition=nowhere", "--wrap=true"])
    assert str(refused.value) == "sbatch: Invalid partition name specified (invalid partition specified: nowhere)"
    done = slurm_command(["scontrol", "show", "job", "424242"], check=False)
    assert done.returncode == 1
    assert "Invalid job id" in done.stderr
