"""A task of a sweep's array becomes the batch process of its run. `python -m miles.slurm.sweep_task SWEEP`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from miles.data.store.files import read_json
from miles.data.store.run_dir import RunDir
from miles.slurm import records
from miles.slurm.own_jobs import note_here
from miles.slurm.submission import BATCH


def main(folder: Path) -> None:
    """Note the task's own job id where the run's commands look for it, write to the run's own log, and be miles.slurm.batch from there on."""
    task, job = int(os.environ["SLURM_ARRAY_TASK_ID"]), int(os.environ["SLURM_JOB_ID"])
    runs = read_json(folder / "sweep.json")["runs"]
    if task == len(runs):
        return  # see submit_array
    run = RunDir(Path(runs[task]["run_dir"]))
    records.folder(run).mkdir(exist_ok=True)
    note_here(run, ["all"])
    sys.stdout.flush()
    log = os.open(records.folder(run) / f"{job}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.execv(sys.executable, [sys.executable, "-m", BATCH, str(run.path)])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
