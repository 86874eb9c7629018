"""One launcher as a node that knows nothing of another would start it: `python attempt.py RUN_DIR`; exit code as the launcher's.

What `miles-submit run` does to resume, but for the lock that keeps two launchers of one machine apart: between two nodes it may not
hold (a requeue under a slurmd that is cut off).
"""

from __future__ import annotations

import sys
from pathlib import Path

from miles.config.exits import AGAIN
from miles.data.store.epoch import Fenced
from miles.data.store.run_dir import RunDir
from miles.run.role import load_run
from miles.slurm.launch import launch


def main(run_dir: Path) -> int:
    try:
        return launch(load_run(run_dir), RunDir(run_dir), lambda status: None, lambda line: print(line, flush=True))
    except Fenced as error:
        print(error, flush=True)
        return AGAIN


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
