"""Preflight's probes of GPUs on a host that has some, without Slurm, with a table at the end: `python tests/gpu/check_preflight.py`.

Pairs of nodes are two processes, each with a GPU of its own. Exit code 1 when something fell short. `gloo` as an argument tries the script itself on
a machine without GPUs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

import torch  # noqa: E402

from miles.slurm.preflight import files, gpus, nccl  # noqa: E402
from miles.slurm.preflight.hub import Hub  # noqa: E402
from miles.slurm.preflight.infiniband import infiniband  # noqa: E402
from miles.slurm.preflight.judge import bad, judge  # noqa: E402

HOST = "127.0.0.1"
CLOSED = 9  # nobody listens there
NODE = "import json, sys; from miles.slurm.preflight.node import probe; probe(json.loads(sys.argv[1]))"
rows: list[tuple[str, bool, str]] = []


def note(what: str, good: bool, figure: str) -> None:
    rows.append((what, good, figure))
    print(f"{'ok  ' if good else 'FAIL'} {what}: {figure}", flush=True)


def here(port: int | None) -> tuple[str, int]:
    """All ranks are on this node."""
    return HOST, port or CLOSED


def timed(*arguments: Any, **more: Any) -> tuple[float | None, str, float]:
    """nccl.measured's answer, and its seconds."""
    began = time.monotonic()
    rate, why = nccl.measured(*arguments, **more)
    return rate, why, time.monotonic() - began


def pair(backend: str, first: int, second: int) -> tuple[float | None, str, float]:
    """Two nodes that measure together: a call each, as on two hosts; the worse answer."""
    port: Queue[int] = Queue()

    def meet(own: int | None) -> tuple[str, int]:
        port.put(own) if own else None
        there = port.get(timeout=60)
        port.put(there)
        return HOST, there

    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(timed, 2, HOST, {rank: gpu}, meet, backend) for rank, gpu in enumerate((first, second))]
        return min((call.result() for call in calls), key=lambda answer: answer[0] or 0.0)


def probes(number: int) -> None:
    """Each probe that asks the driver or the kernel."""
    found = {"gpu health": gpus.health("cuda", number), "fabric": gpus.fabric("cuda"), "imex": gpus.imex(False), "infiniband": infiniband()}
    for name, said in found.items():
        note(name, said["status"] in ("ok", "not checked"), f"{said['status']}: {said['detail']}")
    more = gpus.health("cuda", number + 1)
    note("one GPU too few is seen", more["status"] == "broken", more["detail"])


def bandwidths(number: int, backend: str) -> None:
    """Inside a node, and between two."""
    rate, why, spent = timed(number, HOST, {rank: rank for rank in range(number)}, here, backend)
    note(f"inside: {number} GPUs", rate is not None, f"{rate:.1f} GB/s in {spent:.1f} s" if rate is not None else why)
    for other in range(1, number):
        rate, why, spent = pair(backend, 0, other)
        note(f"GPU 0 and {other}", rate is not None, f"{rate:.1f} GB/s in {spent:.1f} s" if rate is not None else why)
    if number > 1:
        # Not over NVLink nor shared memory: the way that NCCL takes to another host.
        os.environ.update(NCCL_P2P_DISABLE="1", NCCL_SHM_DISABLE="1")
        rate, why, spent = pair(backend, 0, 1)
        note("GPU 0 and 1 over the network", rate is not None, f"{rate:.1f} GB/s in {spent:.1f} s" if rate is not None else why)
        for name in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE"):
            del os.environ[name]


def faults(backend: str) -> None:
    """What is broken ends soon, with a reason in one line."""
    rate, why, spent = timed(2, HOST, {1: 0}, lambda _: (HOST, CLOSED), backend, seconds=10.0)
    note("a partner that never comes", rate is None and bool(why) and spent < 75, f"after {spent:.1f} s: {why}")
    rate, why, spent = timed(2, HOST, {0: 0, 1: 99}, here, "nccl", seconds=10.0)
    note("a GPU that is not there", rate is None and bool(why) and spent < 75, f"after {spent:.1f} s: {why}")


def nodes(device: str, number: int) -> None:
    """The whole of what runs on the nodes: two processes, a GPU each, and the verdicts on them."""
    with tempfile.TemporaryDirectory() as folder, Hub(HOST, "token") as hub:
        canaries = Path(folder) / "canaries"
        canaries.mkdir()
        files.canary_write(Path(folder), files.LOGIN)
        plan = {"hub": [HOST, hub.port], "token": "token", "folder": str(canaries), "nodes": ["a", "b"], "group": "all", "mine": ["a", "b"], "device": device, "gpus": 1, "counts_gpus": True}
        plan |= {"image": None, "read": [str(Path(__file__))], "port": 0, "seconds": 30.0, "patience": 60.0, "megabytes": 64, "rounds": 8}
        began = time.monotonic()
        running = [
            subprocess.Popen([sys.executable, "-c", NODE, json.dumps(plan)], env={**os.environ, "SLURMD_NODENAME": name, "MILES_HOST": HOST, "CUDA_VISIBLE_DEVICES": str(gpu % number)})
            for gpu, name in enumerate("ab")
        ]
        while not {"sink/a", "sink/b"} <= hub.words.keys() and time.monotonic() < began + 60:
            time.sleep(0.05)
        hub.words["present"] = ["a", "b"]
        codes = [each.wait() for each in running]
        spent = time.monotonic() - began
        judged = judge(["a", "b"], {node: hub.words[f"report/{node}"] for node in "ab" if f"report/{node}" in hub.words}, {})
    for node, report in judged.items():
        for name, said in report["probes"].items():
            print(f"     {node} {name:<14} {said['status']:<12} {said['detail']}")
    wanted = {"gpu health", "nccl inside", "nccl"} if device == "cuda" else {"network"}
    ran = all({name for name, said in report["probes"].items() if said["status"] == "ok"} >= wanted for report in judged.values())
    note("two nodes of one GPU each", codes == [0, 0] and not bad(judged) and ran, f"{spent:.1f} s; bad: {bad(judged) or 'none'}")


def main() -> int:
    """Everything that the GPUs at hand allow."""
    backend = sys.argv[1] if len(sys.argv) > 1 else "nccl"
    number = torch.cuda.device_count() if backend == "nccl" else 2
    if not number:
        print("no GPU here")
        return 1
    if backend == "nccl":
        probes(number)
    bandwidths(number, backend)
    faults(backend)
    if number > 1:
        nodes("cuda" if backend == "nccl" else "cpu", number)
    else:
        print("not checked: two nodes need two GPUs")
    print(f"\n{'what':<34} {'':<5} figure")
    for what, good, figure in rows:
        print(f"{what:<34} {'ok' if good else 'FAIL':<5} {figure}")
    return 0 if all(good for _, good, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
