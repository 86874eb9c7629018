"""A sweep whose runs die, and what the doctor says of each."""

from __future__ import annotations

import json
from pathlib import Path

from test_sweep import SLURM, miles, over

from miles.slurm.minicluster import Cluster

NODES = {"train": 1, "infer": 0, "cpu": 0}


def test_an_array_whose_runs_die_each_for_its_own_reason(cluster: Cluster, tmp_path: Path) -> None:
    """One wrong configuration, one worker that is killed again and again; one after the other. Status and doctor say so."""
    root = tmp_path / "sweep"
    words = ["recipes/tiny", *SLURM, "warm_start.steps=0", "cluster.restarts=0", "model.build=dies.build,miles.recipes.quickstart.build_tiny", "rollout.generate_path=dies.generate"]
    said = miles(cluster, "sweep", *words, "--run-dir", str(root), "--max-parallel", "1", "--json")
    array = json.loads(said.stdout)["array"]
    assert "ArrayTaskThrottle=1" in cluster.run(["scontrol", "-o", "show", "job", str(array)]).stdout
    over(cluster)
    runs = json.loads(miles(cluster, "status", str(root), "--json").stdout)["runs"]
    assert [each["state"] for each in runs] == ["failed", "stopped"]
    first, second = (json.loads(miles(cluster, "doctor", each["run_dir"], "--json").stdout)["diagnoses"] for each in runs)
    assert first[0]["cause"] == "wrong"
    assert first[0]["happened"].startswith("model.build: dies.build raised ValueError: no such thing")
    assert [each["cause"] for each in second][:2] == ["killed", "budget"]
    assert "worker 0 was killed by SIGKILL" in second[0]["happened"]
    assert second[0]["node"]
    assert miles(cluster, "sweep", *words, "--run-dir", str(root), check=False).returncode == 78
