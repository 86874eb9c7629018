"""The comparison of trees that the overlapping attempts are judged by notices what an attempt must not do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from trees import snapshot, written_alone, written_beside

from miles.data.store.checkpoint import SCHEMA, STATE
from miles.data.store.epoch import Fence, new_epoch
from miles.data.store.events import Events
from miles.data.store.files import seal_bytes, seal_json, seal_listing
from miles.data.store.metrics import Metrics
from miles.data.store.run_dir import COMPLETE, RunDir, record_attempt
from miles.data.store.train_record import write_train_record

OLD, NEWER = 1, 2


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Two attempts: the older trained steps 1 and 2 and saved at 1, the newer goes on."""
    run = RunDir(tmp_path / "run")
    seal_bytes(run.run_yaml, b"")
    old = Fence(run, new_epoch(run))
    for step in (1, 2):
        write_train_record(run.train(step) / "node_0000.h5", [], fence=old)
    checkpoint(run, 1, old)
    Events(run, "trainer", 0, OLD).append("train", 1, 1.0, 2.0)
    newer = Fence(run, new_epoch(run))
    for fence in (old, newer):
        record_attempt(run, fence.epoch)
    Metrics(run.metrics).append({"step": 1, "kind": "sft"})
    Events(run, "trainer", 0, NEWER).append("train", 2, 2.0, 3.0)
    return run


def checkpoint(run: RunDir, step: int, fence: Fence) -> None:
    folder = run.checkpoint(step)
    seal_bytes(folder / "model" / "weights", bytes([fence.epoch]))
    seal_json(folder / STATE, {"schema": SCHEMA, "epoch": fence.epoch})
    seal_listing(folder / COMPLETE, {"schema": SCHEMA, "step": step, "files": []})


def lines(run: RunDir, epoch: int, count: int) -> None:
    with open(run.event_file("trainer", 0, epoch), "a") as file:
        file.write('{"phase": "train", "step": 3, "start": 1.0, "end": 2.0}\n' * count)


WRONG: dict[str, Callable[[RunDir], object]] = {
    "a line of metrics told again": lambda run: Metrics(run.metrics).append({"step": 1, "kind": "sft"}),
    "metrics.jsonl replaced": lambda run: Metrics(run.metrics).cut_back(0),
    "a train record": lambda run: write_train_record(run.train(3) / "node_0000.h5", [], {"epoch": OLD}),
    "a train record deleted": lambda run: shutil.rmtree(run.train(2)),
    "a batch's folder renamed": lambda run: run.train(2).rename(run.train(2).with_name("step_000002.aside.1")),
    "a checkpoint's file written again": lambda run: seal_bytes(run.checkpoint(1) / "model" / "weights", b"\1"),
    "run.yaml written again": lambda run: seal_bytes(run.run_yaml, b""),
    "provenance without the newer one": lambda run: run.provenance.write_text('{"schema": "miles.provenance/1", "attempts": [{"epoch": 1}]}'),
    "latest points back": lambda run: (run.latest.unlink(), run.latest.symlink_to("attempts/000001")),
    "two lines of events": lambda run: lines(run, OLD, 2),
    "events cut": lambda run: run.event_file("trainer", 0, OLD).write_bytes(b""),
    "a file of no name that we know": lambda run: (run.path / "notes").write_text(""),
    "the export while steps are left": lambda run: seal_bytes(run.hf / "model.safetensors", b""),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_the_older_does_is_noticed(run: RunDir, wrong: Callable[[RunDir], object]) -> None:
    alone, beside = snapshot(run.path, {OLD}), snapshot(run.path)
    wrong(run)
    assert written_alone(alone, snapshot(run.path, {OLD}), OLD)
    assert written_beside(beside, snapshot(run.path), OLD, NEWER)


def test_what_the_newer_does_is_its_right(run: RunDir) -> None:
    """It is noticed only where it stood still."""
    alone, beside = snapshot(run.path, {OLD}), snapshot(run.path)
    newer = Fence(run, NEWER)
    metrics = Metrics(run.metrics, newer)
    metrics.append({"step": 2, "kind": "sft"})
    metrics.close()
    lines(run, NEWER, 3)
    write_train_record(run.train(2) / "node_0000.h5", [], fence=newer)
    checkpoint(run, 2, newer)
    newer.discard(run.checkpoint(1))
    record_attempt(run, NEWER, newer, tier="exact")
    after = snapshot(run.path)
    assert not written_beside(beside, after, OLD, NEWER)
    assert len(written_alone(alone, after, OLD)) >= 8


def test_an_append_that_was_begun_may_finish(run: RunDir) -> None:
    alone, beside = snapshot(run.path, {OLD}), snapshot(run.path)
    lines(run, OLD, 1)
    assert not written_alone(alone, snapshot(run.path, {OLD}), OLD)
    assert not written_beside(beside, snapshot(run.path), OLD, NEWER)
