"""The folder of another version: made once, and of nobody else's folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from miles.config.exits import UserError
from miles.slurm.minicluster import Cluster, trixie
from miles.slurm.minicluster.packages import COMPLETE, complete, find
from miles.slurm.minicluster.trixie import build


def test_a_complete_folder_is_used_again(slurm24: Cluster) -> None:
    assert slurm24.programs.commands is not None
    folder = slurm24.programs.commands.parent
    before = (folder / COMPLETE).stat()
    assert build(folder) is False
    assert (folder / COMPLETE).stat() == before
    assert json.loads((folder / COMPLETE).read_text())["version"].startswith("24.11")


def test_daemons_and_commands_use_the_unpacked_libraries_alone(slurm24: Cluster) -> None:
    """A library of the machine's other Slurm, or a C library older than the programs, would be taken without a word."""
    assert slurm24.programs.commands is not None
    folder = slurm24.programs.commands.parent
    for process in slurm24.processes():
        if process.name in ("slurmctld", "slurmd"):
            files = {line.split()[-1] for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines() if "/" in line}
            assert not [file for file in files if "slurm" in file and not Path(file).is_relative_to(folder)]
            assert str(folder / "sbin" / process.name) in files
            assert {Path(file).parent for file in files if Path(file).name.startswith("libc.so")} == {folder / "lib"}
    assert slurm24.run(["srun", "-V"]).stdout.startswith("slurm-wlm 24.11")


def test_a_moved_folder_is_not_taken(tmp_path: Path, slurm24: Cluster) -> None:
    assert slurm24.programs.commands is not None
    (tmp_path / "moved").mkdir()
    shutil.copy(slurm24.programs.commands.parent / COMPLETE, tmp_path / "moved" / COMPLETE)
    assert not complete(tmp_path / "moved")
    with pytest.raises(UserError, match=r"Slurm 24\.11 is not here.*make slurm-24"):
        find("24.11", accounting=False, elsewhere=tmp_path / "moved")


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, slurm24: Cluster) -> None:
    (tmp_path / "theirs").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        build(tmp_path)
    assert (tmp_path / "theirs").read_text() == "x"


def test_a_mirror_that_stumbles_is_asked_again(tmp_path: Path, slurm24: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "bin" / "debootstrap"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\necho >> {tmp_path}/asked\nexit 1\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(trixie, "PAUSE_SECONDS", 0.0)
    with pytest.raises(UserError, match=r"^debootstrap .*: exit code 1"):
        build(tmp_path / "new")
    assert (tmp_path / "asked").read_text() == "\n" * trixie.DOWNLOADS
