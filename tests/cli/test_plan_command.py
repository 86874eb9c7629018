"""miles-submit plan, where no Slurm is: everything but the cluster's own opinion."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from miles.cli.plan import plan
from miles.config.compose import configs_dir
from miles.config.exits import OK, WRONG

HET = [
    "recipes/tiny", "cluster.executor=slurm", "cluster.placement=het", "cluster.slurm.python=/shared/bin/python", "cluster.groups.all.time=2:00:00",
    "cluster.groups.train={partition: a, gpu_type: gb300, gpus_per_node: 4}", "cluster.groups.rollout={partition: b, gpu_type: h200, gpus_per_node: 8}",
]  # fmt: skip


@pytest.fixture(autouse=True)
def without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """4 + 8 GPUs for two hours; what could not be asked is not checked, never fine."""
    assert plan(HET, tmp_path / "run", with_script=False, as_json=True) == OK
    page = json.loads(capsys.readouterr().out)
    assert (page["ok"], page["executor"], page["placement"], page["gpu_hours"]["total"]) == (True, "slurm", "het", 24.0)
    assert [(group["group"], group["nodes"], group["gpus_per_node"], group["ask"]["partition"]) for group in page["groups"]] == [("train", 1, 4, "a"), ("rollout", 1, 8, "b")]
    (only,) = page["submissions"]
    assert (only["groups"], only["start"], only["command"]) == (["train", "rollout"], "not checked", f"sbatch --parsable {tmp_path}/run/slurm/train-rollout.sbatch")
    assert only["script"].splitlines()[-1] == f"exec /shared/bin/python -m miles.slurm.batch {tmp_path}/run"
    assert [finding["message"].split(":")[0] for finding in page["findings"] if finding["level"] == "warning"] == ["not checked against a cluster"]
    assert not (tmp_path / "run").exists()


def test_page_and_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan([*HET, "cluster.groups.rollout.segment=3"], tmp_path / "run", with_script=True, as_json=False) == WRONG
    page = capsys.readouterr().out
    (line,) = [line for line in page.splitlines() if line.startswith("rollout ")]
    assert line.startswith("rollout     1 node × 8 h200, ")
    assert {"partition b", "time 2:00:00", "segment 3"} <= set(line.split(", "))
    assert "error: cluster.groups.rollout.segment: segments of 3 nodes do not divide the group's 1 nodes; set cluster.groups.rollout.segment=1" in page
    assert "--- train-rollout.sbatch\n#!/bin/bash\n" in page


def test_plan_imports_no_numpy_and_no_torch() -> None:
    """It answers while somebody waits."""
    code = f"import sys\nfrom miles.cli.plan import plan\nplan({HET!r}, None, False, True)\nprint(sorted({{'torch', 'transformers', 'numpy', 'h5py'}} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=configs_dir().parent)
    assert done.stderr.strip() == "[]"
