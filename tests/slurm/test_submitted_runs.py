"""A whole run through miles-submit on a real Slurm: --wait ends as the run does."""

from __future__ import annotations

from pathlib import Path

from jobs import SHORT, miles

from miles.data.store.files import read_json
from miles.data.store.run_dir import RunDir
from miles.slurm.minicluster import Cluster
from miles.slurm.records import submitted


def test_wait_ends_as_the_run_does(slurm: Cluster, tmp_path: Path) -> None:
    """A function that raises is the user's own bug: the job fails and is never requeued, and so does the command, with the reason."""
    (tmp_path / "own.py").write_text("def build(folder, seed):\n    raise RuntimeError('a bug of my own')\n")
    words = ["recipes/tiny", *SHORT, "cluster.executor=slurm", "cluster.groups.all.partition=cpu", "cluster.groups.all.time=30", "model.build=own.build"]
    done = miles(slurm, "run", *words, "--run-dir", str(tmp_path / "run"), "--wait", cwd=tmp_path)
    run = RunDir(tmp_path / "run")
    outcome = read_json(run.latest / "exit.json")
    assert (done.returncode, outcome["code"], outcome["goes_on"], run.latest.resolve().name) == (78, 78, False, "000001")
    assert f"ended with exit code 78: {outcome['reason']}" in " ".join(done.stderr.split())
    (entry,) = submitted(run)
    job = slurm.run(["scontrol", "-o", "show", "job", str(entry["job_id"])]).stdout.split()
    assert {"JobState=FAILED", "ExitCode=78:0", "Restarts=0"} <= set(job)
    assert slurm.run(["squeue", "-h"]).stdout == ""
