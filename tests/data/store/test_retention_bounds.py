"""Retention by age, count and bytes over random histories, against what the rules say in words."""

from __future__ import annotations

import logging
import os
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from owner import owner

from miles.data.store.epoch import Fence, Fenced, new_epoch
from miles.data.store.journal import Journal
from miles.data.store.manifest import Manifest, Policy, ShardEntry, read_manifest, seal_manifest, verify_files
from miles.data.store.retention import Bounds, retire_batches, retire_journals
from miles.data.store.run_dir import RunDir, steps_in

NOW = 1_000_000_000.0
DAY = 86400


def put(folder, step, kind, size, routes, age):
    """A sealed batch of `size` bytes and `routes` bytes of routes, sealed `age` seconds ago."""
    folder.mkdir(parents=True)
    entries = []
    for name, count in (("rollout.0.h5", size), ("routes.0.h5", routes)):
        if count:
            (folder / name).write_bytes(bytes(count))
        entries.append(ShardEntry(name=name, bytes=count, xxh3="", sequences=1, tokens=1))
    made = Manifest(run_id="r", epoch=1, step=step, kind=kind, policy=Policy(weight_version=0, weight_checksum=""), shards=entries[:1], routes=entries[1:] if routes else [], draws=[step])
    seal_manifest(folder, made)
    os.utime(folder / "manifest.json", (NOW - age, NOW - age))


def total(run_dir):
    return sum(path.stat().st_size for top in (run_dir.batches, run_dir.evals, run_dir.train_records) for path in top.rglob("*") if path.is_file())


def whole(run_dir):
    """(kind, step or name) of everything that is there -> has it its routes?"""
    found = {}
    for top in (run_dir.batches, run_dir.evals):
        for folder in top.iterdir() if top.is_dir() else ():
            if folder.name.startswith("step_"):
                kind = "aside" if "aside" in folder.name else top.name
                found[kind, int(folder.name[5:11]), folder.name] = (folder / "routes.0.h5").exists()
    return found


@st.composite
def histories(draw):
    steps = draw(st.integers(1, 8))
    sizes, maybe = st.integers(1, 5000), st.integers(0, 5000)
    ages = sorted((draw(st.integers(0, 10 * DAY)) for _ in range(steps)), reverse=True)
    return {
        "batches": [(step, draw(sizes), draw(maybe), draw(maybe), ages[step - 1]) for step in range(1, steps + 1)],
        "evals": [(step, draw(sizes), draw(maybe), ages[step - 1]) for step in sorted(draw(st.sets(st.integers(1, steps))))],
        "asides": [(step, draw(sizes), draw(maybe), ages[step - 1]) for step in sorted(draw(st.sets(st.integers(1, steps))))],
        "newest": draw(st.integers(1, steps)),
    }


def make(run_dir, history):
    for step, size, routes, train, age in history["batches"]:
        put(run_dir.batch(step), step, "rollout", size, routes, age)
        run_dir.train(step).mkdir(parents=True)
        (run_dir.train(step) / "node_0000.h5").write_bytes(bytes(train))
    for step, size, routes, age in history["evals"]:
        put(run_dir.eval(step), step, "eval", size, routes, age)
    for step, size, routes, age in history["asides"]:
        put(run_dir.batches / f"step_{step:06d}.aside.1", step, "rollout", size, routes, age)


BOUNDS = st.builds(Bounds, st.none() | st.integers(1, 9), st.none() | st.integers(0, 10 * DAY), st.none() | st.integers(1, 60_000))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(history=histories(), bounds=BOUNDS)
def test_what_stays_is_what_the_rules_say(tmp_path, history, bounds):
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    run_dir = RunDir(tmp_path / "run")
    make(run_dir, history)
    before, had = whole(run_dir), total(run_dir)
    newest = history["newest"]
    deleted = retire_batches(owner(run_dir), bounds, newest, now=NOW)
    after = whole(run_dir)
    assert steps_in(run_dir.batches) == steps_in(run_dir.train_records), "a batch and its train record go together"
    assert all(not path.exists() for path in deleted)
    assert set(after) <= set(before)

    last = len(history["batches"])
    ages = {step: age for step, *_, age in history["batches"]}  # evaluations and set-aside batches were given their step's age
    needed = {key for key in before if (key[1] >= newest if key[0] == "evals" else key[1] > newest)}
    assert all(after[key] == before[key] for key in needed), "what a resume needs is whole, with its routes"
    mine = {key for key in before if key not in needed and key[:2] != ("batches", last)}  # what may go
    gone = set(before) - set(after)
    assert gone <= mine

    too_old = {key for key in mine if bounds.seconds is not None and ages[key[1]] > bounds.seconds}
    left = [step for step in range(1, last + 1) if ("batches", step, f"step_{step:06d}") not in too_old]
    kept = range(1, last + 1) if bounds.count is None else range(last - bounds.count + 1, last + 1)
    too_many = {key for key in mine if (key[0] == "batches" and key[1] not in kept) or (key[0] == "aside" and key[1] < min(kept))}
    assert left, "the newest batch is never too old"
    assert too_old | too_many <= gone

    routes = {key for key in before if key not in needed and before[key]}  # had routes that may go
    if bounds.bytes is None:
        assert gone == too_old | too_many
        assert not any(after[key] for key in set(after) & routes)
        return
    extra = gone - too_old - too_many
    size = sum(path.stat().st_size for top in (run_dir.batches, run_dir.evals, run_dir.train_records) for path in top.rglob("*") if path.is_file())
    assert size <= bounds.bytes or gone == mine, "it fits, or everything that may go is gone"
    if extra:
        assert not any(after[key] for key in set(after) & routes), "whole records go only when no routes are left to delete"
        order = sorted(mine - too_old - too_many, key=lambda key: (key[0] != "aside", key[1], key[0] != "batches"))
        assert extra == set(order[: len(extra)]), "set aside first, then oldest first"
    stripped = sorted({key for key in routes if key in after and not after[key]}, key=lambda key: (key[1], key[0] != "batches"))
    if stripped and not extra:
        candidates = sorted((key for key in routes if key not in too_old | too_many), key=lambda key: (key[1], key[0] != "batches", key[0] == "aside", key[2]))
        assert {key[1] for key in stripped} == {key[1] for key in candidates[: len(stripped)]}, "routes of the oldest go first"
    if not gone and not stripped:
        assert total(run_dir) == had
    assert retire_batches(owner(run_dir), bounds, newest, now=NOW) == [], "nothing more goes when nothing has changed"


def test_no_more_goes_than_the_bytes_ask_for(run_dir):
    """Three batches of known sizes under a checkpoint: each bound takes exactly what it must, routes first."""

    def fresh():
        shutil.rmtree(run_dir.path, ignore_errors=True)
        make(run_dir, {"batches": [(step, 1000, 4000, 500, 0) for step in (1, 2, 3)], "evals": [], "asides": [(2, 700, 0, 0)]})
        return total(run_dir)

    everything = fresh()
    manifest = (run_dir.batch(1) / "manifest.json").stat().st_size
    batch = 1500 + manifest
    steps = [
        (0, [1, 2, 3], 3, True),
        (1, [1, 2, 3], 2, True),
        (4001, [1, 2, 3], 1, True),
        (12_000, [1, 2, 3], 0, True),
        (12_001, [1, 2, 3], 0, False),  # what had been set aside
        (12_000 + 700 + (run_dir.batches / "step_000002.aside.1/manifest.json").stat().st_size + 1, [2, 3], 0, False),
        (everything - batch, [3], 0, False),
        (everything - 1, [3], 0, False),  # the newest stays, whatever the bound
    ]
    for less, left, with_routes, aside in steps:
        fresh()
        retire_batches(owner(run_dir), Bounds(bytes=everything - less), 3)
        assert (steps_in(run_dir.batches), sum(whole(run_dir).values()), (run_dir.batches / "step_000002.aside.1").exists()) == (left, with_routes, aside), less


def test_what_had_been_set_aside_is_not_deleted_silently(run_dir, caplog):
    make(run_dir, {"batches": [(1, 9, 0, 0, 0), (2, 9, 0, 0, 0)], "evals": [], "asides": [(1, 9, 0, 0)]})
    with caplog.at_level(logging.WARNING):
        retire_batches(owner(run_dir), Bounds(count=1), 2)
    assert "step_000001.aside.1, which had been set aside, is deleted by retention" in caplog.text


def test_a_bound_that_cannot_be_met_is_said(run_dir, caplog):
    make(run_dir, {"batches": [(1, 900, 0, 0, 0), (2, 900, 0, 0, 0), (3, 900, 0, 0, 0)], "evals": [], "asides": []})
    with caplog.at_level(logging.WARNING):
        retire_batches(owner(run_dir), Bounds(bytes=1000), 1)
    assert steps_in(run_dir.batches) == [2, 3]
    assert "over checkpoint.retain_batches_bytes 1000" in caplog.text
    assert "save more often, or raise the bound" in caplog.text


def test_a_batch_whose_routes_are_gone_is_whole(run_dir, make_sample):
    from miles.data.store.shard import write_routes, write_shard

    folder, samples = run_dir.batch(1), [make_sample(1, 0, routes=np.zeros((4, 1, 2), np.uint8))]
    files = [write_shard(folder / "rollout.0.h5", samples), write_routes(folder / "routes.0.h5", samples)]
    entries = [ShardEntry(name=file.name, bytes=file.bytes, xxh3=file.xxh3, sequences=1, tokens=5) for file in files]
    seal_manifest(folder, Manifest(run_id="r", epoch=1, step=1, kind="rollout", policy=Policy(weight_version=0, weight_checksum=""), shards=entries[:1], routes=entries[1:]))
    size = total(run_dir)
    assert retire_batches(owner(run_dir), Bounds(bytes=size), 1) == [], "it fits"
    assert retire_batches(owner(run_dir), Bounds(bytes=size - 1), 1) == [folder / "routes.0.h5"]
    verify_files(folder, read_manifest(folder))


def test_an_old_attempt_deletes_nothing(run_dir):
    old = Fence(run_dir, new_epoch(run_dir))
    make(run_dir, {"batches": [(1, 9, 9, 0, 0), (2, 9, 9, 0, 0)], "evals": [], "asides": []})
    new_epoch(run_dir)
    with pytest.raises(Fenced):
        retire_batches(old, Bounds(count=1, seconds=0, bytes=1), 2, NOW)
    assert total(run_dir) > 36


def test_journals_of_batches_that_retention_took_go_too(run_dir, make_sample):
    """Else a journal of an early attempt would stay for good: no manifest could say any more that its draws are done."""
    make(run_dir, {"batches": [(step, 9, 0, 0, 0) for step in (1, 2, 3, 4)], "evals": [(2, 9, 0, 0)], "asides": []})
    for worker, groups in (("past", [("rollout", 1), ("rollout", 2)]), ("evaluated", [("eval", 2)]), ("evaluating", [("eval", 3)]), ("ahead", [("rollout", 2), ("rollout", 5)])):
        with Journal(run_dir.journal_file(worker, 1)) as journal:
            for kind, step in groups:
                journal.append([make_sample(step + 100, 0)], {"kind": kind, "step": step})
    assert retire_journals(owner(run_dir, 2), 3) == [], "their draws lie in no batch, and the batches are there to say so"
    retire_batches(owner(run_dir), Bounds(bytes=1), 3)
    assert steps_in(run_dir.batches) == [4]
    assert steps_in(run_dir.evals) == []
    assert [path.name for path in retire_journals(owner(run_dir, 2), 3)] == ["evaluated.1.log", "past.1.log"]
    assert sorted(path.name for path in run_dir.journal.iterdir()) == ["ahead.1.log", "evaluating.1.log"], "evaluation 3 may be asked for again"
