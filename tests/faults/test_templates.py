"""The templates of sbatch/ run by hand on a real Slurm."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import REPOSITORY, SHORT, miles, with_path

from miles.data.store.files import read_json
from miles.data.store.run_dir import RunDir
from miles.slurm.minicluster import Cluster
from miles.slurm.records import submitted


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder) / "c") as cluster:
        yield cluster


@pytest.mark.parametrize("name", ["colocated", "split", "heterogeneous"])
def test_a_template_runs_by_hand(slurm: Cluster, tmp_path: Path, name: str) -> None:
    """`render`, then `sbatch sbatch/NAME.sbatch` from the folder above: without miles-submit from there on. The job is the run's all the same."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    rendered = miles(slurm, "render", f"runs/{name}", str(REPOSITORY / "sbatch" / f"{name}.yaml"), *SHORT, cwd=tmp_path)
    assert rendered.returncode == 0, rendered.stderr
    job = slurm.run(["sbatch", "--parsable", REPOSITORY / "sbatch" / f"{name}.sbatch"], cwd=tmp_path, env=with_path(slurm, REPOSITORY)).stdout.strip()
    run, deadline = RunDir(tmp_path / "runs" / name), time.monotonic() + 600  # as long as a busy machine takes
    while f"JobId={job} " in (said := slurm.run(["scontrol", "-o", "show", "job", job]).stdout) and any(word in said for word in ("JobState=PENDING", "JobState=RUNNING", "JobState=COMPLETING")):
        assert time.monotonic() < deadline, (run.path / "slurm" / f"{job}.log").read_text()
        time.sleep(0.5)
    assert read_json(run.latest / "exit.json")["code"] == 0, (run.path / "slurm" / f"{job}.log").read_text()
    (entry,) = submitted(run)
    groups = ["train", "rollout"] if name == "heterogeneous" else ["all"]
    assert (entry["job_id"], entry["groups"], entry["output"], entry["run_dir"]) == (int(job), groups, f"{run.path}/slurm/{job}.log", str(run.path))
    assert f"job: {job} completed" in miles(slurm, "status", str(run.path), cwd=tmp_path).stdout
