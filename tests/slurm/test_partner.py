"""How long one job waits for the other: real jobs in real states, and a clock that is turned by hand."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from miles.config.compose import load_config
from miles.data.store.run_dir import RunDir
from miles.slurm import queue
from miles.slurm.minicluster import Cluster
from miles.slurm.own_jobs import entry_of
from miles.slurm.partner import CALM_SECONDS, LOOK_SECONDS, Waiting, find, job_of, state
from miles.slurm.queue import QUICK_SECONDS
from miles.slurm.records import note

WORDS = ["cluster.executor=slurm", "cluster.placement=jobs", "cluster.slurm.partner_seconds=60", "cluster.slurm.queue_seconds=100"]


@pytest.fixture
def other(slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A held job of group rollout, and a waiting one's patience with it."""
    for name, value in slurm.env().items():
        monkeypatch.setenv(name, value)
    job = int(slurm.run(["sbatch", "--parsable", "--hold", "--output=/dev/null", "--partition=cpu", "--wrap=sleep 1000"]).stdout)
    note(RunDir(tmp_path), entry := entry_of(RunDir(tmp_path), job, "x", ["rollout"], "mini"))
    monkeypatch.setattr(queue, "QUICK_SECONDS", 30.0)  # on a busy machine an answer may take longer than a run would wait for it
    clock = [0.0]
    waiting = Waiting(RunDir(tmp_path), load_config(["recipes/tiny"], WORDS), "rollout", clock=lambda: clock[0])

    def later(seconds: float) -> str | None:
        found = None
        for _ in range(int(seconds // LOOK_SECONDS)):
            clock[0] += LOOK_SECONDS
            found = found or waiting.look()
        return found

    yield slurm, entry, waiting, later
    slurm.run(["scancel", str(job)], check=False)


def until(entry: dict[str, Any], wanted: str) -> None:
    deadline = time.monotonic() + 120
    while (found := state(entry)) != wanted:
        assert time.monotonic() < deadline, found


def test_queueing_has_a_bound_of_its_own_and_time_counts_only_while_both_run(other) -> None:
    slurm, entry, waiting, later = other
    job = entry["job_id"]
    assert later(100) is None
    assert later(10) == "released"
    assert f"group rollout ({job}) has queued for" in waiting.words("released")
    waiting.met()
    slurm.run(["scontrol", "release", str(job)])
    until(entry, "running")
    assert later(60) is None
    assert later(60) == "missed"
    assert state({**entry, "output": "/another"}) == "gone"
    slurm.run(["scancel", str(job)])
    until(entry, "gone")
    assert later(CALM_SECONDS) == "gone"


def test_slurm_is_asked_no_more_than_it_must_be(other, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at all while the worker speaks, twice a minute while it is silent."""
    _, _, waiting, later = other
    asked, command = tmp_path / "asked", tmp_path / "bin" / "squeue"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\necho >> {asked}\nexec {shutil.which('squeue')} \"$@\"\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    asked.touch()
    assert later(LOOK_SECONDS) is None
    assert len(asked.read_text()) == 1
    now = [1000.0]
    waiting.clock = lambda: now[0]

    def a_minute(heard: bool) -> int:
        before = len(asked.read_text())
        for _ in range(60):
            now[0] += 1
            if heard:
                waiting.met()
            assert waiting.look() is None
        return len(asked.read_text()) - before

    assert (a_minute(heard=True), a_minute(heard=False)) == (0, 2)


def test_a_look_does_not_wait_for_a_controller_that_is_away(other, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm, _, waiting, _ = other
    monkeypatch.setattr(queue, "QUICK_SECONDS", QUICK_SECONDS)
    controller = slurm.daemons()["slurmctld"]
    controller.kill(signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert waiting.look() is None
        assert time.monotonic() - began < 7  # squeue itself gives up after 8
    finally:
        controller.kill(signal.SIGCONT)
    assert waiting.was == "unknown"


def test_nobody_is_found_where_no_service_answers(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert find(run) is None
    run.attempt(1).mkdir(parents=True)
    assert find(run) is None
    (run.attempt(1) / "service.json").write_text(json.dumps({"url": "http://127.0.0.1:9"}))
    (run.attempt(1) / "token").write_text("secret")
    assert find(run) is None


def test_a_job_that_nobody_knows_of_is_waited_for(tmp_path: Path) -> None:
    assert job_of(RunDir(tmp_path), "train") == (None, "unknown")
