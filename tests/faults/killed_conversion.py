"""A conversion that counts its steps on the disk, and may be killed before one of them: python killed_conversion.py WAY SOURCE TARGET [STEP]

A step is a write, a sync, a new name or a removal. Files are small, so that there are many. Prints the phase of each step.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
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
        kind = "record" if name.endswith(".safetensors.json") or name.endswith(".distcp.json") else "data" if name.endswith((".distcp", ".safetensors")) else name
        return f"naming {kind}"
    return {"pwrite": "writing", "fsync": "syncing", "unlink": "removing"}[call]


def main(way: str, source: str, target: str, last: int) -> None:
    plan.STRIP_BYTES, plan.CHUNK_BYTES, plan.FILE_BYTES = 4000, 16_000, 100_000
    export.SHARD_BYTES = 100_000
    lock, taken = threading.Lock(), 0

    def counted(call: str) -> Callable[..., Any]:
        plain = getattr(os, call)

        def step(*args: Any, **more: Any) -> Any:
            nonlocal taken
            with lock:
                taken += 1
                print(phase(call, args), flush=True)
                if taken == last:
                    os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args, **more)

        return step

    for call in STEPS:
        setattr(os, call, counted(call))
    WAYS[way](source, target, me=Rank(workers=2))


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]) if len(sys.argv) > 4 else 0)
