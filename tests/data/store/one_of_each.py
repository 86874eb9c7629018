"""A run directory with one file of every kind, each as miles writes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from store_samples import make_sample

from miles.config.compose import dump_config, load_config
from miles.data.sample import Sample, Status
from miles.data.store.checkpoint import SCHEMA as CHECKPOINT
from miles.data.store.checkpoint import STATE
from miles.data.store.epoch import Fence, new_epoch
from miles.data.store.events import Events
from miles.data.store.files import Sealed, checksum, seal_json, seal_listing
from miles.data.store.journal import Journal
from miles.data.store.manifest import Dropped, Manifest, Policy, ShardEntry, seal_manifest
from miles.data.store.metrics import Metrics
from miles.data.store.run_dir import COMPLETE, RunDir, record_attempt, write_plan
from miles.data.store.shard import write_routes, write_shard
from miles.data.store.train_record import write_train_record
from miles.training.batch import Seen
from miles.training.record import OwnPart

SEALED = ("shard", "routes", "manifest", "train", "state", "weights", "complete")
EVERY = (*SEALED, "journal", "metrics", "events", "provenance", "plan", "run.yaml", "batch", "checkpoint", "run")


def samples() -> list[Sample]:
    """Three draws of two samples with routes; one truncated, one failed without a response."""
    made = []
    for draw in (7, 8, 9):
        for index in range(2):
            tokens = 3 + draw - 7 + index
            routes = np.arange((2 + tokens - 1) * 6, dtype=np.uint8).reshape(-1, 3, 2) % 8
            more = {"reward": draw - 7 + index / 2, "reward_parts": {"format": float(index)}, "label": f"label {draw}", "prompt": f"prompt {draw}\n", "response": f"answer \x1b[31m{draw}.{index}"}
            made.append(make_sample(draw, index, 2, tokens, routes=routes, status=Status.TRUNCATED if index else Status.COMPLETED, metadata={"place": draw}, **more))
    return made


def make(folder: Path) -> dict[str, Path]:
    """Make it; returns the place of each kind in EVERY."""
    run = RunDir(folder)
    run.path.mkdir(parents=True)
    run.run_yaml.write_text(dump_config(load_config([], ["name=one of each", "num_rollout=5"])))
    epoch = new_epoch(run)
    record_attempt(run, epoch, tier="exact", why="synchronous", threads=2, layout={"ranks": 2}, changed=[])
    write_plan(run, {"summary": {"run": "one of each"}, "guarantee": "exact"})
    batch, made = run.batch(3), samples()
    shard, routes = write_shard(batch / "rollout.0.h5", made, {"worker": 0, "epoch": epoch, "step": 3}), write_routes(batch / "routes.0.h5", made, {"worker": 0})
    assert routes is not None
    entries = [ShardEntry(name=file.name, bytes=file.bytes, xxh3=file.xxh3, sequences=6, tokens=sum(len(sample.token_id) for sample in made)) for file in (shard, routes)]
    policy = Policy(weight_version=2, weight_checksum="abc")
    seal_manifest(
        batch,
        Manifest(
            run_id="one", epoch=epoch, step=3, kind="rollout", policy=policy, parent_checkpoint="step_000002", tokenizer_hash="t0", sampling={"temperature": 1.0}, shards=entries[:1],
            routes=entries[1:], draws=[7, 8, 9], dropped=[Dropped(draw=10, why="all rewards are equal")], next_draw=11, assignment=[[[[(0, 0, 6)]]]],
        ),
    )  # fmt: skip
    lengths = [len(sample.token_id) for sample in made]
    count = sum(lengths)
    values = {name: np.linspace(-1, 1, count).astype(np.float32) for name in ("train_logprob", "entropy", "advantage")} | {"used": np.ones(count, np.uint8), "route_miss": np.zeros(count, np.uint8)}
    layers = {"routed": np.array([0, count, count], np.uint64), "route_miss": np.zeros(3, np.uint64)}
    part = OwnPart(0, [Seen(np.zeros(6, np.int64), np.arange(6), np.array(lengths), values, layers)])
    write_train_record(run.train(3) / "node_0000.h5", [part], {"backend": "fsdp", "threads": 2}, Fence(run, epoch))
    with Journal(run.journal_file(0, epoch)) as journal:
        for first in (0, 2, 4):
            journal.append(made[first : first + 2], {"kind": "rollout", "step": 3, "weight_checksum": "abc"})
    metrics = Metrics(run.metrics)
    for step in (1, 2, 3):
        metrics.append({"step": step, "kind": "rollout", "time": 1.7e9 + step, "rollout/raw_reward": step / 2})
    metrics.close()
    events = Events(run, "trainer", 0, epoch)
    events.append("wait", 3, 1.7e9, 1.7e9 + 2)
    events.append("train", 3, 1.7e9 + 2, 1.7e9 + 5, tokens=count)
    checkpoint = run.checkpoint(3)
    (checkpoint / "model").mkdir(parents=True)
    (checkpoint / "model" / "weights.safetensors").write_bytes(bytes(range(256)) * 4)
    seal_json(checkpoint / STATE, {"schema": CHECKPOINT, "step": 3, "parent": "step_000002", "progress": {"trained": 3, "next_draw": 11}})
    files = [Sealed(name, (checkpoint / name).stat().st_size, checksum(checkpoint / name)) for name in (STATE, "model/weights.safetensors")]
    seal_listing(checkpoint / COMPLETE, {"schema": CHECKPOINT, "step": 3, "files": [vars(file) for file in files]})
    return {
        "shard": batch / "rollout.0.h5", "routes": batch / "routes.0.h5", "manifest": batch / "manifest.json", "train": run.train(3) / "node_0000.h5",
        "state": checkpoint / STATE, "weights": checkpoint / "model" / "weights.safetensors", "complete": checkpoint / COMPLETE,
        "journal": run.journal_file(0, epoch), "metrics": run.metrics, "events": events.path, "provenance": run.provenance, "plan": run.plan, "run.yaml": run.run_yaml,
        "batch": batch, "checkpoint": checkpoint, "run": run.path,
    }  # fmt: skip
