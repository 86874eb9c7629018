"""A job whose disk becomes full in the middle of a run, and is given room again: `python slurm_full_disk.py FOLDER`, in a mount namespace.

Prints one JSON object with what a user sees, and leaves a copy of the finished run in FOLDER/copy.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "slurm"), str(TESTS / "end_to_end")]

import whole_runs as runs  # noqa: E402
from clusters import cluster_or_skip  # noqa: E402
from full_disk import SIZE, fill  # noqa: E402
from jobs import HET, Job  # noqa: E402


def main(folder: Path) -> None:
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "small", str(disk)], check=True)
    with cluster_or_skip(nodes={"train": 1, "infer": 1, "cpu": 0}) as cluster:
        job = Job(cluster, disk / "run", *HET, pace=1.0)
        job.until(lambda: runs.trained(job.run_dir) >= 2, "the second step")
        end = threading.Event()
        filler = threading.Thread(target=fill, args=(disk, end))
        filler.start()
        job.ended("FAILED")
        job.nothing_left()
        fields, status = job.fields(), job.miles("status", str(job.run_dir))
        end.set()
        filler.join()
        (disk / "filler").unlink()
        told = {"code": fields["ExitCode"], "restarts": fields["Restarts"], "log": job.log, "status": status, "epoch": job.epoch}
        job.miles("resume", str(job.run_dir))
        job.ended(job=job.ids[-1])
        job.nothing_left()
        print(json.dumps({**told, "epochs": job.epoch}))
        shutil.copytree(job.run_dir, folder / "copy", symlinks=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
