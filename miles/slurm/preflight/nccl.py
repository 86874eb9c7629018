"""Bandwidth between GPUs through NCCL: all-reduces of ranks that are processes of their own, `python -m miles.slurm.preflight.nccl RANK WORLD HOST GPU SECONDS BACKEND`.

What NCCL does when a network or a GPU is broken (it waits, or dies) must not be the preflight's end. A rank prints JSON: {"gigabytes": GB/s}, rank 0
before {"port": where it listens}, for which the others wait at their standard input: [host, port].
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

BYTES = 256 << 20
REPEATS = 8
SECONDS = 90.0  # for ranks to meet, and for an all-reduce
START_SECONDS = 60.0  # to import torch from a cold file system
ECHO_SECONDS = 10.0  # a rank that failed: how long the others may say so, too
Meet = Callable[[int | None], tuple[str, int] | None]
CAUSE = re.compile(r"\b(\w*Error|Error|error|WARN)\b")


def missing() -> str | None:
    """Why NCCL can't be tried on this node; None when it may."""
    return None if find_spec("torch") else "this node's interpreter has no torch"


def measured(world: int, host: str, ranks: Mapping[int, int], meet: Meet, backend: str = "nccl", seconds: float = SECONDS) -> tuple[float | None, str]:
    """(bus bandwidth of an all-reduce of `world` ranks [GB/s], why there is none). host: this node; ranks: those on it, and the GPU of each.

    meet is called once, with the port where rank 0 listens if it is on this node, else None; it returns where rank 0 is, or None: nobody knows.
    """
    with tempfile.TemporaryDirectory(prefix="miles-nccl-") as folder:
        said, complaints = Path(folder) / "said", Path(folder) / "complaints"
        running = [_start(words, said, complaints) for words in ([rank, world, host, gpu, seconds, backend] for rank, gpu in ranks.items())]
        try:
            return _measured(running, ranks, meet, seconds, said, complaints)
        finally:
            for each in running:
                each.kill()
                each.wait()


def _measured(running: list[subprocess.Popen[bytes]], ranks: Mapping[int, int], meet: Meet, seconds: float, said: Path, complaints: Path) -> tuple[float | None, str]:
    until = time.monotonic() + START_SECONDS
    port = None
    while 0 in ranks and (port := _told(said, "port")) is None and time.monotonic() < until and not any(each.poll() for each in running):
        time.sleep(0.05)
    where = meet(int(port[0])) if port else None if 0 in ranks else meet(None)
    until = time.monotonic() + (START_SECONDS + seconds if where else 0.0)
    for each in running if where else ():
        assert each.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended: its complaint counts
            each.stdin.write(json.dumps(where).encode() + b"\n")
            each.stdin.flush()
    while any(each.poll() is None for each in running) and time.monotonic() < until:
        if any(each.poll() for each in running):
            until = min(until, time.monotonic() + ECHO_SECONDS)
        time.sleep(0.05)
    figures = _told(said, "gigabytes") or []
    if len(figures) == len(ranks) and all(each.poll() in (0, None) for each in running):
        return min(figures), ""
    codes = [each.returncode for each in running if each.poll()]
    plain = f"ended with exit code {codes[0]}" if codes else f"no answer within {START_SECONDS + seconds:g} s" if where else "rank 0 did not come"
    return None, cause(complaints.read_text(errors="replace")) or plain


def _start(words: Sequence[object], said: Path, complaints: Path) -> subprocess.Popen[bytes]:
    with said.open("ab") as out, complaints.open("ab") as err:
        return subprocess.Popen([sys.executable, "-m", "miles.slurm.preflight.nccl", *map(str, words)], stdin=subprocess.PIPE, stdout=out, stderr=err)


def _told(said: Path, name: str) -> list[float] | None:
    """What ranks have printed under a name, among lines of NCCL's own."""
    lines = [line for line in said.read_text(errors="replace").splitlines(keepends=True) if line.startswith(f'{{"{name}"') and line.endswith("\n")]
    return [float(json.loads(line)[name]) for line in lines] or None


def cause(complaints: str) -> str:
    """The line that says most of a failed rank's: the last with an error, which isn't one of PyTorch's warnings."""
    lines = [line.strip() for line in complaints.splitlines() if line.strip() and not re.search(r"\[W\d|Warning", line)]
    told = [line for line in lines if CAUSE.search(line)] or lines
    return re.sub(r"^\[rank\d+\]: ?", "", told[-1])[:300] if told else ""


def main(rank: int, world: int, host: str, gpu: int, seconds: float, backend: str) -> None:
    """One rank: all-reduces of BYTES, after one that is not counted; every number of the last one is looked at."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", gpu) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit = datetime.timedelta(seconds=seconds)
    if rank == 0:
        store = dist.TCPStore(host, 0, world, is_master=True, timeout=limit, wait_for_workers=False)
        print(json.dumps({"port": store.port}), flush=True)
    else:
        there, port = json.loads(sys.stdin.readline())
        store = dist.TCPStore(there, port, world, is_master=False, timeout=limit)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit, device_id=device if device.type == "cuda" else None)
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
    main(int(words[0]), int(words[1]), words[2], int(words[3]), float(words[4]), words[5])
