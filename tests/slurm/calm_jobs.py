"""What the runs of jobs.py are compared with: the same on this machine, without Slurm, that nothing happens to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import whole_runs as runs
from jobs import STEPS


def calm_run(folder: Path, *words: str) -> Path:
    """A run with the functions of this folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]))
        runs.run(folder, *words)
    return folder


@pytest.fixture(scope="session")
def calm_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of jobs.STEPS."""
    return calm_run(tmp_path_factory.mktemp("calm_steps") / "run", *STEPS)
