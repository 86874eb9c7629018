"""The analysis under srun and by its batch script: over two nodes the output of one process; a launch whose processes can't meet is refused."""

from __future__ import annotations

import sys
from pathlib import Path

from miles.slurm.minicluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests/analysis"))

from made_runs import random_run  # noqa: E402


def test_srun_gives_what_one_process_gives_and_refuses_processes_that_are_alone(slurm: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    random_run(run, longest=50)
    tool = [sys.executable, ROOT / "tools/analyze/logprob_mismatch.py", run, "--json"]
    job = ["srun", "-p", "h200", "-N2", "-n3"]
    here = slurm.run(["srun", "-p", "h200", "-n1", "--mpi=none", *tool], timeout=300)
    met = slurm.run([*job, "--mpi=pmi2", *tool], timeout=300)
    assert met.stdout == here.stdout != ""
    alone = slurm.run([*job, "--mpi=none", *tool], check=False, timeout=300)
    assert alone.returncode == 78
    assert alone.stdout == ""
    assert "3 processes were started (SLURM_STEP_NUM_TASKS), and MPI sees 1" in alone.stderr


def test_the_batch_script_runs_by_hand(slurm: Cluster, tmp_path: Path) -> None:
    """Two tasks on two nodes: the output of one process, and the exit code of the limits."""
    run = tmp_path / "run"
    random_run(run, longest=50)
    here = slurm.run([sys.executable, ROOT / "tools/analyze/logprob_mismatch.py", run, "--json"], check=False, timeout=300)
    assert here.stdout
    wanted = [*(f"--output={tmp_path}/job.txt", "-p", "h200", "-N2", "--ntasks-per-node=1", "--mem=0", "--wait", "--parsable"), ROOT / "sbatch/analyze.sbatch", run, "--json"]
    done = slurm.run(["sbatch", *wanted], check=False, timeout=300, cwd=ROOT, env={**slurm.env(), "PYTHON": sys.executable})
    assert (tmp_path / "job.txt").exists(), done.stderr
    said = (tmp_path / "job.txt").read_text()
    assert said.startswith(here.stdout.rstrip())
    assert done.returncode == here.returncode
