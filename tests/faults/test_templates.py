"""The templates of sbatch/ run by hand on a real Slurm."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from miles.config.compose import configs_dir
from miles.data.store.files import read_json
from miles.data.store.run_dir import RunDir
from miles.slurm.minicluster import Cluster

ROOT = configs_dir().parent
SHORT = ["num_rollout=1", "warm_start.steps=0", "eval.interval=null", "checkpoint.save_hf=false"]


def submit(cluster: Cluster, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**cluster.env(), "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, "-m", "miles.cli", *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=180)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder) / "c") as cluster:
        yield cluster


@pytest.mark.parametrize("name", ["colocated", "split", "heterogeneous"])
def test_a_template_runs_by_hand(slurm: Cluster, tmp_path: Path, name: str) -> None:
    """`render`, then `sbatch sbatch/NAME.sbatch` from the folder above: without miles-submit from there on, and without job.json."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    rendered = submit(slurm, "render", f"runs/{name}", str(ROOT / "sbatch" / f"{name}.yaml"), *SHORT, cwd=tmp_path)
    assert rendered.returncode == 0, rendered.stderr
    environment = {**slurm.env(), "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    job = slurm.run(["sbatch", "--parsable", ROOT / "sbatch" / f"{name}.sbatch"], cwd=tmp_path, env=environment).stdout.strip()
    run, deadline = RunDir(tmp_path / "runs" / name), time.monotonic() + 600  # as long as a busy machine takes
    while f"JobId={job} " in (said := slurm.run(["scontrol", "-o", "show", "job", job]).stdout) and any(word in said for word in ("JobState=PENDING", "JobState=RUNNING", "JobState=COMPLETING")):
        assert time.monotonic() < deadline, (run.path / "slurm" / f"{job}.log").read_text()
        time.sleep(0.5)
    assert read_json(run.latest / "exit.json")["code"] == 0, (run.path / "slurm" / f"{job}.log").read_text()
    assert not (run.path / "slurm" / "job.json").exists()
