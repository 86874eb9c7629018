"""A whole run through miles-submit on a real Slurm: --wait ends as the run does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from miles.config.compose import configs_dir
from miles.data.store.files import read_json
from miles.data.store.run_dir import RunDir
from miles.slurm.minicluster import Cluster

ROOT = configs_dir().parent
SHORT = ["num_rollout=1", "warm_start.steps=0", "eval.interval=null", "checkpoint.save_hf=false"]


def submit(cluster: Cluster, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**cluster.env(), "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, "-m", "miles.cli", *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=180)


def test_wait_ends_as_the_run_does(slurm: Cluster, tmp_path: Path) -> None:
    """A function that raises is the user's own bug: the job fails, and so does the command, with the reason."""
    (tmp_path / "own.py").write_text("def build(folder, seed):\n    raise RuntimeError('a bug of my own')\n")
    words = ["recipes/tiny", *SHORT, "cluster.executor=slurm", "cluster.groups.all.partition=cpu", "cluster.groups.all.time=30", "model.build=own.build"]
    done = submit(slurm, "run", *words, "--run-dir", str(tmp_path / "run"), "--wait", cwd=tmp_path)
    outcome = read_json(RunDir(tmp_path / "run").latest / "exit.json")
    assert done.returncode == outcome["code"] != 0
    assert f"ended with exit code {done.returncode}: {outcome['reason']}" in " ".join(done.stderr.split())
    assert slurm.run(["squeue", "-h"]).stdout == ""
