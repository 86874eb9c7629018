"""Sweeps: what varies (pure), and an array and single jobs on a real Slurm. Runs that die are in tests/faults/test_sweeps.py."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jobs import REPOSITORY

from miles.config.exits import UserError
from miles.slurm.minicluster import Cluster
from miles.slurm.sweep import members, split

CASES = [
    ("1,2", ["1", "2"]),
    ("[1,2]", ["[1,2]"]),
    ("[1,2],[3]", ["[1,2]", "[3]"]),
    ("{a: 1, b: 2}", ["{a: 1, b: 2}"]),
    ("'a,b',c", ["'a,b'", "c"]),
    ("one", ["one"]),
]


@pytest.mark.parametrize(("text", "parts"), CASES)
def test_commas(text: str, parts: list[str]) -> None:
    assert split(text) == parts


def test_every_combination() -> None:
    shared, found = members(["recipes/tiny", "seed=1,2", "train.optimizer.lr=1e-4,3e-4", "--kl-coef", "0.1", "num_rollout=3"])
    assert shared == ["recipes/tiny", "--kl-coef", "0.1", "num_rollout=3"]
    assert [member.name for member in found] == ["seed=1_lr=1e-4", "seed=1_lr=3e-4", "seed=2_lr=1e-4", "seed=2_lr=3e-4"]
    assert found[1].words == ("seed=1", "train.optimizer.lr=3e-4")


def test_names_are_folders_and_told_apart() -> None:
    _, found = members(["a.size=1,2", "b.size=1,2", "model.hf_checkpoint=/models/x,/models/y"])
    assert found[0].name == "a.size=1_b.size=1_hf_checkpoint=x"
    _, same = members(["model.hf_checkpoint=/a/x,/b/x"])
    assert [member.name for member in same] == ["000_hf_checkpoint=x", "001_hf_checkpoint=x"]
    assert all("/" not in member.name for member in [*found, *same])


@pytest.mark.parametrize(("words", "what"), [(["recipes/tiny"], "nothing varies"), (["seed=1,1"], "given twice"), (["seed=1,"], "empty"), (["seed=1,2", "seed=3,4"], "a key is given twice"), ([f"seed={','.join(map(str, range(40)))}", f"num_rollout={','.join(map(str, range(1, 41)))}"], "more than 1000")])  # fmt: skip
def test_what_is_no_sweep(words: list[str], what: str) -> None:
    with pytest.raises(UserError, match=what):
        members(words)


def miles(cluster: Cluster, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    here = os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)])
    return cluster.run([sys.executable, "-m", "miles.cli", *words], env=cluster.env() | {"PYTHONPATH": here}, cwd=REPOSITORY, check=check, timeout=300)


def over(cluster: Cluster) -> None:
    """Wait until no job is left."""
    deadline = time.monotonic() + 240
    while cluster.run(["squeue", "-h"]).stdout:
        assert time.monotonic() < deadline
        time.sleep(0.2)


SLURM = ["cluster.executor=slurm", "cluster.groups.all.mem=100", "cluster.groups.all.time=10"]


def test_an_array_is_cancelled_as_a_whole(slurm: Cluster, tmp_path: Path) -> None:
    """Its tasks wait, one at a time would begin; afterwards there is nothing left to cancel, and no second sweep in its folder."""
    root = tmp_path / "sweep"
    words = ["recipes/tiny", *SLURM, "cluster.groups.all.sbatch={hold: null}", "seed=1,2", "train.optimizer.lr=1e-4,3e-4"]
    array = json.loads(miles(slurm, "sweep", *words, "--run-dir", str(root), "--max-parallel", "1", "--json").stdout)["array"]
    assert "ArrayTaskThrottle=1" in slurm.run(["scontrol", "-o", "show", "job", str(array)]).stdout
    found = json.loads(miles(slurm, "status", str(root), "--json").stdout)["runs"]
    assert [(each["state"], each["job"]) for each in found] == [("queued", f"{array}_{task}") for task in range(4)]
    assert f"4 tasks of array {array} that had not begun are cancelled" in miles(slurm, "cancel", str(root)).stderr
    over(slurm)
    assert {each["state"] for each in json.loads(miles(slurm, "status", str(root), "--json").stdout)["runs"]} <= {"cancelled", "lost"}
    refused = [miles(slurm, *command, check=False) for command in (["cancel", str(root)], ["sweep", *words, "--run-dir", str(root)], ["doctor", str(root)])]
    assert [each.returncode for each in refused] == [78, 78, 78]
    assert all(each.stderr.count("\n") == 1 for each in refused)


def test_an_array_whose_command_was_killed_is_found_again(slurm: Cluster, tmp_path: Path) -> None:
    """kill -9 as soon as sbatch has the job."""
    root, bin_folder = tmp_path / "sweep", tmp_path / "bin"
    bin_folder.mkdir()
    kills = 'case "$*" in *test-only*) ;; *) kill -9 $PPID;; esac'
    (bin_folder / "sbatch").write_text(f'#!/bin/bash\n{shutil.which("sbatch", path=slurm.env()["PATH"])} "$@" || exit\n{kills}\n')
    (bin_folder / "sbatch").chmod(0o755)
    words = ["recipes/tiny", *SLURM, "cluster.groups.all.sbatch={hold: null}", "seed=1,2", "--run-dir", str(root)]
    environment = slurm.env() | {"PYTHONPATH": str(REPOSITORY)}
    killed = slurm.run([sys.executable, "-m", "miles.cli", "sweep", *words], env=environment | {"PATH": f"{bin_folder}:{environment['PATH']}"}, cwd=REPOSITORY, check=False, timeout=300)
    assert (killed.returncode, killed.stdout, json.loads((root / "sweep.json").read_text())["array"]) == (-signal.SIGKILL, "", None)
    (array,) = set(slurm.run(["squeue", "-h", "-o", "%F"]).stdout.split())
    assert "holds a sweep already" in miles(slurm, "sweep", *words, check=False).stderr
    found = json.loads(miles(slurm, "status", str(root), "--json").stdout)
    assert (found["array"], [each["job"] for each in found["runs"]]) == (int(array), [f"{array}_0", f"{array}_1"])
    assert f"2 tasks of array {array} that had not begun are cancelled" in miles(slurm, "cancel", str(root)).stderr
    over(slurm)


def test_jobs_of_their_own_wait_for_each_other(slurm: Cluster, tmp_path: Path) -> None:
    """Het jobs can't be arrays; held, they never start, and the doctor says why."""
    root = tmp_path / "sweep"
    words = ["recipes/tiny", *SLURM, "cluster.placement=het", "cluster.groups.rollout.partition=h200", "cluster.groups.all.sbatch={hold: null}", "seed=1,2,3"]
    said = json.loads(miles(slurm, "sweep", *words, "--run-dir", str(root), "--max-parallel", "2", "--json").stdout)
    ids = [each["jobs"][0] for each in said["runs"]]
    try:
        shown = [slurm.run(["scontrol", "-o", "show", "job", str(job)]).stdout for job in ids]
        assert [f"Dependency=afterany:{ids[0]}" in each for each in shown] == [False, False, True]
        (found,) = json.loads(miles(slurm, "doctor", said["runs"][0]["run_dir"], "--json").stdout)["diagnoses"]
        assert (found["cause"], "held by its user" in found["happened"]) == ("pending", True)
        assert [each["state"] for each in json.loads(miles(slurm, "status", str(root), "--json").stdout)["runs"]] == ["queued"] * 3
    finally:
        slurm.run(["scancel", *map(str, ids)])
        over(slurm)
    (found,) = json.loads(miles(slurm, "doctor", said["runs"][0]["run_dir"], "--json").stdout)["diagnoses"][:1]
    assert found["cause"] == "cancelled"


def test_one_command_a_folder_and_what_it_took_back_may_be_done_again(slurm: Cluster, tmp_path: Path) -> None:
    """Ctrl-C leaves no job and says so; of the same command, given twice at once, one submits every run once."""
    root = tmp_path / "sweep"
    words = ["recipes/tiny", *SLURM, "cluster.placement=het", "cluster.groups.rollout.partition=h200", "cluster.groups.all.sbatch={hold: null}", "seed=1,2,3"]

    def begun() -> subprocess.Popen[str]:
        environment = slurm.env() | {"PYTHONPATH": str(REPOSITORY)}
        return subprocess.Popen([sys.executable, "-m", "miles.cli", "sweep", *words, "--run-dir", str(root)], env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    command, deadline = begun(), time.monotonic() + 180
    while not (root / "seed=1" / "slurm" / "job.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    command.send_signal(signal.SIGINT)
    assert command.communicate(timeout=180) == ("", "no run of the sweep is submitted; the jobs that were are cancelled\n")
    assert command.returncode == 130
    over(slurm)
    both = [begun(), begun()]
    said = [each.communicate(timeout=300) for each in both]
    try:
        assert sorted(each.returncode for each in both) == [0, 78], said
        queued = {int(job.partition("+")[0]) for job in slurm.run(["squeue", "-h", "-o", "%i"]).stdout.split()}
        assert queued == {job for each in json.loads((root / "sweep.json").read_text())["runs"] for job in each["jobs"]}
        assert len(queued) == 3
    finally:
        miles(slurm, "cancel", str(root), check=False)
        over(slurm)
