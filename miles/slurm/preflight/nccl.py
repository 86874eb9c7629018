"""Bandwidth between GPU 0 of two nodes through NCCL: `python -m miles.slurm.preflight.nccl RANK HOST PORT`, once on each. Prints GB/s as JSON.

A process of its own: what NCCL does when a network is broken (it waits, or dies) must not be the preflight's end.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import time
from importlib.util import find_spec

BYTES = 256 << 20
REPEATS = 8
SECONDS = 90.0


def missing() -> str | None:
    """Why NCCL can't be tried on this node; None when it may."""
    return None if find_spec("torch") else "this node's interpreter has no torch"


def measured(rank: int, host: str, port: int) -> tuple[float | None, str]:
    """(GB/s of an all-reduce between the two, why there is none)."""
    command = [sys.executable, "-m", "miles.slurm.preflight.nccl", str(rank), host, str(port)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS + 30, check=False)
    except subprocess.TimeoutExpired:
        return None, f"NCCL did not answer within {SECONDS + 30:g} s"
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return None, lines[-1] if lines else f"ended with exit code {done.returncode}"
    return float(json.loads(done.stdout.splitlines()[-1])["gigabytes"]), ""


def main(rank: int, host: str, port: int, backend: str = "nccl") -> None:
    """One rank of two: all-reduces of BYTES, after one that is not counted."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    limit = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group(backend, init_method=f"tcp://{f'[{host}]' if ':' in host else host}:{port}", rank=rank, world_size=2, timeout=limit)
    values = torch.ones(BYTES // 4, device=device)
    dist.all_reduce(values)
    _finish(device)
    began = time.monotonic()
    for _ in range(REPEATS):
        dist.all_reduce(values)
    _finish(device)
    spent = time.monotonic() - began
    assert float(values[0]) == 2.0 ** (REPEATS + 1), "an all-reduce gave a wrong sum"
    print(json.dumps({"gigabytes": BYTES * REPEATS / spent / 1e9}), flush=True)
    dist.destroy_process_group()


def _finish(device: object) -> None:
    import torch

    if getattr(device, "type", "") == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), *sys.argv[4:5])
