"""The trainer's side of a rehearsal: asks for batches, reads every micro-batch, writes the record; no model.

`python -m benchmarks.rehearse_trainer`, as role `trainer` of a run. Says that it is ready; then one step number a line on stdin, one JSON object a line on stdout.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miles.data.store.epoch import Fence
from miles.data.store.manifest import read_manifest
from miles.data.store.run_dir import RunDir
from miles.run.coordinator import Coordinator
from miles.run.role import Role, load_run, main
from miles.training.batch import Seen, open_batch
from miles.training.distributed import start_ranks, stop_ranks
from miles.training.packing import unpack
from miles.training.record import write_record


def step(number: int, role: Role, service: Coordinator, ranks: Any) -> dict[str, Any]:
    """One step: what arrived, and when [Unix seconds]."""
    run_dir, config = RunDir(role.run_dir), load_run(role.run_dir)
    asked = time.time()
    job = {"kind": "rollout", "step": number, "weight_version": number - 1, "weight_checksum": f"{number:016x}"}
    path = Path(service.batch(job))
    sealed = time.time()
    manifest = read_manifest(path)
    batch = open_batch(manifest, path.parent, config.algorithm, ranks)
    first, tokens, largest = 0.0, 0, 0
    for packed in batch.packed(0):
        first = first or time.time()
        tokens += int(packed.mask.sum())
        largest = max(largest, int(packed.lengths.sum()))
        nan = torch.full((len(packed.row),), float("nan"))
        values = {name: unpack(packed, nan, float("nan")) for name in ("entropy", "advantage")}
        values["train_logprob"] = unpack(packed, packed.rollout_logprob, float("nan"))
        values["used"] = unpack(packed, packed.mask.to(torch.uint8), 0)
        batch.kept[0].append(Seen(packed.shard, packed.shard_row, packed.lengths, values))
    assert tokens == batch.whole(0).tokens, "every trained token came"
    read = time.time()
    lengths = np.bincount(np.unique(batch.small["draw"], return_inverse=True)[1], weights=batch.small["length"])
    write_record(run_dir.train(number), batch, {"step": number}, Fence(run_dir, role.epoch))
    batch.close()
    return {
        "step": number, "asked": asked, "sealed": sealed, "first": first, "read": read, "recorded": time.time(), "tokens": tokens,
        "all_tokens": manifest.tokens, "sequences": manifest.sequences, "micro_batches": batch.micro_batches(0), "largest_micro_batch": largest,
        "largest_group": int(lengths.max()),
    }  # fmt: skip


def run(role: Role) -> None:
    """Body of the role."""
    service = Coordinator(role)
    service.register()
    service.keep_alive()
    service.publish("resumed", None)
    ranks = start_ranks(0, 1, threads=1, seed=0)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(step(int(line), role, service, ranks)), flush=True)
    service.finish()
    stop_ranks()


if __name__ == "__main__":
    main("trainer", run)
