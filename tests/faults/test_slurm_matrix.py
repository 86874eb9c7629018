"""The fault matrix on a real Slurm: everything that a run consists of × every phase of a step.

CELLS=trainer:*,job:save chooses cells, SHARD=2/4 a share of them. With `pytest -n 8` every worker has a cluster of its own. A line a cell is
left in runs/faults/slurm_matrix.jsonl.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import matrix
import pytest
import shared

from miles.slurm.minicluster import Cluster

cluster, calm = matrix.cluster, matrix.calm  # fixtures


@pytest.mark.parametrize("name", matrix.chosen(os.environ.get("CELLS", ""), os.environ.get("SHARD", "")))
def test_cell(cluster: Cluster, calm: Path, tmp_path: Path, name: str) -> None:
    """The run finishes with the bits of the undisturbed one, makes and trains on every sample once, and leaves no process and no node behind."""
    began, found = time.monotonic(), {}
    try:
        found = matrix.cell(cluster, calm, tmp_path, *matrix.CELLS[name])
    finally:
        told = {"cell": name, "verdict": "passed" if found else "FAILED", "seconds": round(time.monotonic() - began, 1), **found}
        shared.say(f"cell {name}: {told['verdict']} after {told['seconds']:.0f} s" + (f", {found['after_kill']:.0f} s after the kill, {found['attempts']} attempts" if found else ""))
        shared.SUMMARIES.mkdir(parents=True, exist_ok=True)
        with (shared.SUMMARIES / "slurm_matrix.jsonl").open("a") as log:
            log.write(json.dumps(told) + "\n")
