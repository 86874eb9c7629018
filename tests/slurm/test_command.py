"""Slurm's commands are run without another job's settings, and fail in one line."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from miles.config.exits import UserError
from miles.slurm.command import OF_PROCESSES, clean_environment, complaint, slurm_command
from miles.slurm.minicluster import Cluster
from miles.slurm.srun import batch_environment


def test_a_job_around_us_is_not_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Submission from inside of a job: sbatch takes options from SBATCH_*, srun from SLURM_*."""
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_HET_SIZE", "SLURMD_NODENAME", "SBATCH_ACCOUNT", "SRUN_DEBUG", "PMI_RANK", "SACCT_FORMAT"):
        monkeypatch.setenv(name, "1")
    (tmp_path / "slurm.conf").touch()
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    for name in (*OF_PROCESSES - {"MILES_ENVIRONMENT_FD"}, "MILES_SILENCE_SECONDS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    seen = dict(line.split("=", 1) for line in slurm_command(["env"]).stdout.splitlines() if "=" in line)
    assert {name for name in seen if name.startswith(("SLURM", "SBATCH", "SRUN", "PMI", "SACCT"))} == {"SLURM_CONF"}
    assert {name for name in seen if name.startswith(("MILES_", "SUBMITIT_"))} & {*OF_PROCESSES, "MILES_SILENCE_SECONDS"} == {"MILES_SILENCE_SECONDS"}
    assert set(batch_environment()) & OF_PROCESSES == set()
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


def test_a_slurm_conf_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", "/nope/slurm.conf")
    with pytest.raises(UserError, match=r"^sinfo: SLURM_CONF=/nope/slurm.conf: no such file; set it to your cluster's slurm.conf, or unset it$"):
        slurm_command(["sinfo"])


def test_a_hint_is_no_verdict() -> None:
    said = "sbatch: unrecognized option '--qoss=x'\nTry \"sbatch --help\" for more information\n"
    assert complaint(subprocess.CompletedProcess([], 1, "", said)) == "unrecognized option '--qoss=x'"
