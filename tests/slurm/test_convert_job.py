"""sbatch/convert.sbatch on a real Slurm: two nodes share a conversion, and leave the files that one process leaves."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "convert"))

from convert_models import write_model

from miles.convert.hf_to_torch_dist import hf_to_torch_dist
from miles.slurm.minicluster import Cluster

ROOT = Path(__file__).parents[2]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ended(cluster: Cluster, job: str) -> str:
    """What Slurm says of a job that is no longer on its nodes."""
    while True:
        state = cluster.run(["scontrol", "-o", "show", "job", job]).stdout
        if not any(f"JobState={going} " in state for going in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")):
            return state
        time.sleep(0.1)


def test_two_nodes_write_what_one_process_writes(slurm: Cluster, tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf", "qwen3", vocab_size=400_000, tie_word_embeddings=False)  # 102 MB, so that there are two files
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "rank $SLURM_PROCID of $SLURM_NTASKS on $SLURMD_NODENAME"\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    command = ["sbatch", "--parsable", "--partition=cpu", "--cpus-per-task=1", "--mem=1G", "--time=5", f"--output={tmp_path}/log", "sbatch/convert.sbatch"]
    environment = {**slurm.env(), "PYTHON": str(python), "PYTHONPATH": str(ROOT)}
    state = ended(slurm, slurm.run([*command, source, tmp_path / "two"], cwd=ROOT, env=environment).stdout.strip())
    said = (tmp_path / "log").read_text()
    assert "JobState=COMPLETED " in state, said
    assert {line for line in said.splitlines() if line.startswith("rank ")} == {"rank 0 of 2 on cpu0", "rank 1 of 2 on cpu1"}
    hf_to_torch_dist(source, tmp_path / "one")
    two = content(tmp_path / "two")
    assert sum(name.endswith(".distcp") for name in two) > 1
    assert two == content(tmp_path / "one")
