"""Several MPI processes give the same bits as one; launches that fell apart are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_runs import random_run

from miles.analysis.analyze import analyze
from miles.analysis.evidence import ARRAYS
from miles.analysis.ranks import Alone, launched
from miles.analysis.state import State
from miles.config.exits import UserError

ROOT = Path(__file__).resolve().parents[2]
MPIRUN = Path(sys.executable).with_name("mpirun")
SCRIPT = ROOT / "tools/analyze/logprob_mismatch.py"
PART = """
import sys
from pathlib import Path
from miles.analysis.analyze import analyze
from miles.analysis.ranks import launched
ranks = launched()
assert ranks.size == int(sys.argv[2])
state = analyze(Path(sys.argv[1]), ranks, chunk=2000)
if ranks.rank == 0:
    Path(sys.argv[3]).write_bytes(state.pack())
"""


def clean_environment() -> dict[str, str]:
    """Without what a launcher around the tests says."""
    hidden = ("PMI", "PMIX", "MPI", "OMPI", "SLURM", "HYD")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    return {**kept, "PYTHONPATH": str(ROOT), "HYDRA_LAUNCHER": "fork"}


def as_numbers(state: State) -> dict:
    """Everything in it that has an order of its own put in one order."""
    slices = sorted((label, state.slices.digits[row].tobytes()) for label, row in state.slices.rows.items())
    tokens = sorted((int(name), state.tokens.digits[row].tobytes()) for row, name in enumerate(state.tokens.ids))
    simple = [getattr(state, name).tobytes() for name in ("sums", "bootstrap", "sequence_sums", "counts", "odd", "histogram", "sequence_histogram", "divergence", "seen")]
    simple += [getattr(state.simulation, name).tobytes() for name in ("classes", "weights", "density")]
    simple += [repr(sorted((repr(label), state.simulation.places.digits[row].tobytes()) for label, row in state.simulation.places.rows.items()))]
    simple += [state.experts.by_expert.tobytes(), state.experts.whole.tobytes()]
    evidence = state.evidence
    cells = sorted((repr(label), evidence.cells.digits[row].tobytes()) for label, row in evidence.cells.rows.items())
    simple += [cells, evidence.openings.tobytes(), *(getattr(evidence, name).tobytes() for name in ARRAYS)]
    return {"slices": repr(slices), "tokens": repr(tokens), "simple": simple, "worst": state.worst.tobytes(), "greatest": state.greatest, "recorded": state.recorded}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    random_run(folder, seed=3)
    return folder


@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_number_of_processes_gives_the_same_bits(run, tmp_path, size):
    command = [MPIRUN, "-n", str(size), sys.executable, "-c", PART, run, str(size), tmp_path / "state"]
    subprocess.run(command, env=clean_environment(), check=True, timeout=300)
    one = as_numbers(analyze(run, Alone(), chunk=2000))
    assert as_numbers(State.unpack((tmp_path / "state").read_bytes())) == one


def test_the_tool_prints_the_same_over_mpi(run):
    texts = set()
    for launcher in ([], [MPIRUN, "-n", "2"]):
        done = subprocess.run([*launcher, sys.executable, SCRIPT, run, "--json"], env=clean_environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode in (0, 1), done.stderr
        texts.add(done.stdout)
    assert len(texts) == 1
    assert json.loads(texts.pop())["tokens"]["tokens"] > 1000


def test_a_comparison_where_only_one_run_has_data_ends_all_processes(run, tmp_path):
    (tmp_path / "batches").mkdir()
    done = subprocess.run([MPIRUN, "-n", "2", sys.executable, SCRIPT, tmp_path, "--against", run], env=clean_environment(), capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.count("nothing to compare") == 1


def test_other_chunks_give_the_same_counts_and_sums_within_rounding(run):
    small, large = analyze(run, Alone(), chunk=1), analyze(run, Alone())
    assert (small.counts == large.counts).all()
    assert (small.histogram == large.histogram).all()
    assert small.worst.tobytes() == large.worst.tobytes()


def test_a_mistake_is_said_once_and_ends_all_processes(run):
    done = subprocess.run([MPIRUN, "-n", "3", sys.executable, SCRIPT, run / "nowhere"], env=clean_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 78
    assert done.stderr.count("no such folder") == 1
    assert "Traceback" not in done.stderr


def test_processes_that_find_nobody_are_refused(run):
    """As under srun without its pmi2, or under another MPI's mpirun: each process is alone and knows that it was started as one of four."""
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        done = subprocess.run([sys.executable, SCRIPT, run], env={**clean_environment(), name: "4"}, capture_output=True, text=True, timeout=300)
        assert done.returncode == 78
        assert f"4 processes were started ({name}), and MPI sees 1" in done.stderr


def test_without_a_launcher_mpi_is_not_asked():
    def world():
        raise AssertionError("asked")

    assert isinstance(launched({}, world), Alone)
    assert isinstance(launched({"SLURM_NTASKS": "8"}, world), Alone)  # a batch script is one process


def test_without_mpi4py_several_processes_are_refused():
    def world():
        raise ImportError("No module named 'mpi4py'")

    with pytest.raises(UserError, match="pip install"):
        launched({"PMI_SIZE": "2"}, world)
