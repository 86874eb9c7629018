"""Run a function of this folder in real rank processes: `python run_ranks.py RANK WORLD PORT FUNCTION JSON`, results as JSON files."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from miles.slurm.meeting import hold_port

HERE = Path(__file__).parent


def run(world: int, function: str, folder: Path, **arguments: Any) -> list[Any]:
    """Results of module.function(ranks, **arguments) on every rank, each a fresh process. A failing rank fails the test with its output."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[1]}"}
    processes = []
    with hold_port("127.0.0.1", 0) as holder:  # the first rank comes to it once it has loaded torch
        for rank in range(world):
            command = [sys.executable, __file__, str(rank), str(world), str(holder.getsockname()[1]), function, json.dumps(arguments), str(folder)]
            processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return [json.loads((folder / f"result.{rank}.json").read_text()) for rank in range(world)]


def main() -> None:
    from miles.training.distributed import open_store, start_ranks, stop_ranks

    rank, world, port = (int(value) for value in sys.argv[1:4])
    name, arguments, folder = sys.argv[4], json.loads(sys.argv[5]), Path(sys.argv[6])
    module, _, attribute = name.rpartition(".")
    store = open_store("127.0.0.1", port, world, rank == 0) if world > 1 else None
    ranks = start_ranks(rank, world, ranks_per_node=world, store=store, threads=1, seed=7)
    result = getattr(importlib.import_module(module), attribute)(ranks, **arguments)
    (folder / f"result.{rank}.json").write_text(json.dumps(result))
    ranks.barrier()
    stop_ranks()


if __name__ == "__main__":
    main()
