"""Conversions that may be killed: python killed_conversion.py, then a JSON list [way, source, target, kind, step, seconds] a line.

A step is a write, a sync, a new name or a removal. Each conversion is a process of its own, forked here so that libraries are loaded once. It
kills itself before its step number `step` (0: never) of phase `kind` ("": of any), or is killed after `seconds` (0: never). Files are small, so
that there are many. Answers with a JSON list [exit code, phases of the steps that it came to, seconds].
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import miles.convert.conversion as plan
import miles.convert.torch_dist_to_hf as export
from miles.convert.hf_to_torch_dist import hf_to_torch_dist
from miles.convert.units import Rank

WAYS: dict[str, Callable[..., Any]] = {"hf_to_torch_dist": hf_to_torch_dist, "torch_dist_to_hf": export.torch_dist_to_hf}
STEPS = ("pwrite", "fsync", "replace", "unlink")


def phase(call: str, args: tuple[Any, ...]) -> str:
    """Where in a conversion a step is."""
    if call == "replace":
        name = os.path.basename(str(args[1]))
        kind = "record" if name.endswith((".safetensors.json", ".distcp.json")) else "data" if name.endswith((".distcp", ".safetensors")) else name
        return f"naming {kind}"
    return {"pwrite": "writing", "fsync": "syncing", "unlink": "removing"}[call]


def convert(way: str, source: str, target: str, kind: str, last: int, seen: int) -> None:
    """One conversion; writes the phase of each step to the file `seen`, and is killed before step `last` of phase `kind`."""
    lock, taken, say = threading.Lock(), 0, os.write

    def counted(call: str) -> Callable[..., Any]:
        plain = getattr(os, call)

        def step(*args: Any, **more: Any) -> Any:
            nonlocal taken
            with lock:
                now = phase(call, args)
                taken += kind in ("", now)
                say(seen, f"{now}\n".encode())
                if taken == last and kind in ("", now):
                    os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args, **more)

        return step

    for call in STEPS:
        setattr(os, call, counted(call))
    WAYS[way](source, target, me=Rank(workers=2))


def one(way: str, source: str, target: str, kind: str, last: int, seconds: float) -> tuple[int, list[str], float]:
    """(exit code, phases, seconds) of one conversion in a process of its own."""
    with tempfile.TemporaryFile() as file:
        began = time.monotonic()
        child = os.fork()
        if not child:
            try:
                convert(way, source, target, kind, last, file.fileno())
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        if seconds:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)  # also one that has ended: it is waited for below
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        took = time.monotonic() - began
        file.seek(0)
        return code, file.read().decode().splitlines(), took


if __name__ == "__main__":
    plan.STRIP_BYTES, plan.CHUNK_BYTES, plan.FILE_BYTES = 4000, 16_000, 40_000
    export.SHARD_BYTES = 40_000
    for line in sys.stdin:
        print(json.dumps(one(*json.loads(line))), flush=True)
