"""Two cells of the fault matrix; `make test-faults` has all of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from miles.slurm.minicluster import Cluster

sys.path.insert(0, str(Path(__file__).parents[1] / "end_to_end"))
sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

import matrix

cluster, calm = matrix.cluster, matrix.calm  # fixtures


@pytest.mark.parametrize("name", ["trainer:sync", "orchestrator:sync"])
def test_cell(cluster: Cluster, calm: Path, tmp_path: Path, name: str) -> None:
    """One that goes on by itself, and one that nobody goes on with until a person resumes it."""
    matrix.cell(cluster, calm, tmp_path, *matrix.CELLS[name])


def test_cells_are_chosen_by_name_and_divided() -> None:
    """Every cell is in one share."""
    assert len(matrix.chosen()) == 28
    assert matrix.chosen("job:s*, engine:train") == ["engine:train", "job:sync", "job:save"]
    assert sorted(name for share in ("1/3", "2/3", "3/3") for name in matrix.chosen(share=share)) == sorted(matrix.CELLS)
    with pytest.raises(AssertionError, match="no cell is called nobody"):
        matrix.chosen("nobody:save")
