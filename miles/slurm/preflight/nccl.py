"""Bandwidth between GPUs through NCCL: all-reduces of ranks that are processes of their own, `python -m miles.slurm.preflight.nccl RANK WORLD HOST PORT GPU`.

What NCCL does when a network or a GPU is broken (it waits, or dies) must not be the preflight's end. A rank prints {"gigabytes": GB/s} as JSON.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.util import find_spec

BYTES = 256 << 20
REPEATS = 8
SECONDS = 90.0  # for ranks to meet, and for an all-reduce
START_SECONDS = 60.0  # to import torch from a cold file system
ECHO_SECONDS = 10.0  # a rank that failed: how long the others may say so, too
CAUSE = re.compile(r"\b(\w*Error|Error|error|WARN)\b")


def missing() -> str | None:
    """Why NCCL can't be tried on this node; None when it may."""
    return None if find_spec("torch") else "this node's interpreter has no torch"


def measured(world: int, host: str, port: int, ranks: Mapping[int, int], backend: str = "nccl", seconds: float = SECONDS) -> tuple[float | None, str]:
    """(bus bandwidth of an all-reduce of `world` ranks [GB/s], why there is none). ranks: those of this node, and the GPU of each; rank 0 listens."""
    with tempfile.TemporaryFile("w+", errors="replace") as said, tempfile.TemporaryFile("w+", errors="replace") as complaints:
        module = [sys.executable, "-m", "miles.slurm.preflight.nccl"]
        running = [subprocess.Popen([*module, *map(str, (rank, world, host, port, gpu, seconds)), backend], stdout=said, stderr=complaints) for rank, gpu in ranks.items()]
        until = time.monotonic() + START_SECONDS + seconds
        while (alive := [each for each in running if each.poll() is None]) and time.monotonic() < until:
            if any(each.poll() for each in running):
                until = min(until, time.monotonic() + ECHO_SECONDS)
            time.sleep(0.05)
        for each in alive:
            each.kill()
            each.wait()
        said.seek(0)
        complaints.seek(0)
        figures = [float(json.loads(line)["gigabytes"]) for line in said if line.startswith('{"gigabytes"')]
        if len(figures) == len(ranks):
            return min(figures), ""
        codes = sorted({each.returncode for each in running if each not in alive and each.returncode})
        late = f"no answer within {START_SECONDS + seconds:g} s" if not codes else f"ended with exit code {codes[0]}"
        return None, cause(complaints.read()) or late


def cause(complaints: str) -> str:
    """The line that says most of a failed rank's: the last with an error, which isn't one of PyTorch's warnings."""
    lines = [line.strip() for line in complaints.splitlines() if line.strip() and not re.search(r"\[W\d|Warning", line)]
    told = [line for line in lines if CAUSE.search(line)] or lines
    return re.sub(r"^\[rank\d+\]: ?", "", told[-1])[:300] if told else ""


def main(rank: int, world: int, host: str, port: int, gpu: int, seconds: float, backend: str) -> None:
    """One rank: all-reduces of BYTES, after one that is not counted; every number of the last one is looked at."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", gpu) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit, way = datetime.timedelta(seconds=seconds), f"tcp://{f'[{host}]' if ':' in host else host}:{port}"
    dist.init_process_group(backend, init_method=way, rank=rank, world_size=world, timeout=limit, device_id=device if device.type == "cuda" else None)
    values = torch.zeros(BYTES // 4, device=device)
    dist.all_reduce(values)
    _finish(device)
    began = time.monotonic()
    for _ in range(REPEATS):
        dist.all_reduce(values)
    _finish(device)
    spent = time.monotonic() - began
    values.fill_(rank + 1)
    dist.all_reduce(values)
    if not bool((values == world * (world + 1) // 2).all()):
        raise ArithmeticError("an all-reduce gave a wrong sum")
    # As nccl-tests count: every rank sends and receives 2 (n - 1) / n of the bytes.
    print(json.dumps({"gigabytes": BYTES * REPEATS / spent / 1e9 * 2 * (world - 1) / world}), flush=True)
    dist.destroy_process_group()


def _finish(device: object) -> None:
    import torch

    if getattr(device, "type", "") == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    words = sys.argv[1:]
    main(int(words[0]), int(words[1]), words[2], int(words[3]), int(words[4]), float(words[5]), words[6])
