"""Attempts in a row that brought nothing, counted from a run's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from miles.data.store.run_dir import RunDir
from miles.slurm.progress import ending, fruitless, furthest


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def tell(run: RunDir, *entries: dict[str, Any], steps: int = 0) -> None:
    """Provenance of attempts 1, 2, ..., and metrics of so many steps."""
    attempts = [{"epoch": epoch, **entry} for epoch, entry in enumerate(entries, start=1)]
    run.provenance.write_text(json.dumps({"schema": "miles.provenance/1", "run_id": "x", "attempts": attempts}))
    run.metrics.write_text("".join(json.dumps({"step": step, "kind": "sft"}) + "\n" for step in range(1, steps + 1)))
    for entry in attempts:
        run.attempt(entry["epoch"]).mkdir(parents=True, exist_ok=True)


def everything(entry: dict[str, Any]) -> bool:
    return True


def test_only_attempts_since_the_last_new_step_count(run: RunDir) -> None:
    assert fruitless(run, everything) == 0
    tell(run, {"furthest": 0})
    assert fruitless(run, everything) == 1
    tell(run, {"furthest": 0}, {"furthest": 0}, steps=3)
    assert fruitless(run, everything) == 0
    # Metrics are cut back to the checkpoint by each attempt that resumes: what an earlier one had seen is in its entry.
    tell(run, {"furthest": 0}, {"furthest": 3}, {"furthest": 3}, {"furthest": 3}, steps=2)
    assert furthest(run) == 3
    assert fruitless(run, everything) == 3


def test_a_stop_is_no_failure_and_an_earlier_command_is_forgotten(run: RunDir) -> None:
    tell(run, {"job": 1, "furthest": 2}, {"job": 2, "furthest": 2}, {"job": 2, "furthest": 2}, {"job": 2, "furthest": 2})
    assert fruitless(run, everything) == 4
    assert fruitless(run, lambda entry: entry["job"] == 2) == 3
    (run.attempt(3) / "stop.json").write_text("{}")  # killed before it could say more
    assert fruitless(run, lambda entry: entry["job"] == 2) == 2
    (run.attempt(4) / "exit.json").write_text(json.dumps({"code": 75, "stopped": True}))
    assert fruitless(run, lambda entry: entry["job"] == 2) == 1


def test_an_end_that_a_full_disk_left_half_written_says_nothing(run: RunDir) -> None:
    tell(run, {"furthest": 0})
    assert ending(run, 1) == {}
    (run.attempt(1) / "exit.json").write_text('{"code"')
    assert ending(run, 1) == {}


def test_a_time_limit_that_leaves_time_for_nothing_counts(run: RunDir) -> None:
    tell(run, {"furthest": 0}, {"furthest": 0}, {"furthest": 0})
    for epoch in (1, 2, 3):
        (run.attempt(epoch) / "stop.json").write_text(json.dumps({"by": "slurm", "time": 1.0, "time_is_up": epoch > 1}))
    assert fruitless(run, everything) == 2, "the first made room for another job"
    path = run.journal_file(0, 3)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"finished groups")
    assert fruitless(run, everything) == 1, "what a long step has generated is not lost, so the next attempt comes further"
