"""The phases of a stop, told from the trainer's events and the moments that the job knows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miles.data.store.files import seal_json
from miles.data.store.metrics import append_line
from miles.data.store.run_dir import RunDir
from miles.slurm.stop_times import account, stop_times


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run whose second attempt was asked to stop at 100 s, finished a save that was due at 102.5 s, and saved for the stop from 103 s to 104.5 s."""
    run = RunDir(tmp_path)
    run.events.mkdir()
    for rank, epoch, start, end, more in (
        (0, 1, 101.0, 102.0, {"stop": True}), (0, 2, 80.0, 81.0, {}), (0, 2, 99.0, 102.5, {}), (1, 2, 103.0, 109.0, {"stop": True}), (0, 2, 103.0, 104.5, {"stop": True}),
    ):  # fmt: skip
        append_line(run.event_file("trainer", rank, epoch), {"phase": "save", "step": 4, "start": start, "end": end, **more})
    return run


def test_phases_of_a_stop(run: RunDir) -> None:
    times = stop_times(run, 2, asked=100.0, told=100.5, ended=106.0, left=106.5)
    assert (times.tell, times.step, times.save, times.end, times.leave) == (0.5, 2.5, 1.5, 1.5, 0.5)
    assert times.line(30.0) == "the stop took 6.5 s of 30 s: 0.5 s to pass it on, 2.5 s to finish what was begun, 1.5 s to save, 1.5 s to end the job's steps, 0.5 s to requeue or end"


def test_told_after_it_saved(run: RunDir) -> None:
    """Somebody else had told the run, and our own word was answered late."""
    times = stop_times(run, 2, asked=104.0, told=104.2, ended=105.0, left=106.0)
    assert (times.tell, times.step, times.save, times.end, times.whole) == (0.0, 0.0, 0.5, 0.5, 2.0)


@pytest.mark.parametrize("more", [{}, {"stop": True, "error": "OSError"}])
def test_nothing_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, object]) -> None:
    """A save that was due ended after the signal, or the stop's own failed: the line says that there was none, and stop.json keeps the figures."""
    run = RunDir(tmp_path)
    run.events.mkdir()
    append_line(run.event_file("trainer", 0, 2), {"phase": "save", "step": 4, "start": 199.0, "end": 202.0, **more})
    monkeypatch.setattr("time.time", lambda: 204.0)
    folder = run.attempt(2)
    folder.mkdir(parents=True)
    seal_json(folder / "stop.json", {"by": "slurm", "time": 200.0})
    line = account(run, 2, told=None, ended=203.0, allowed=30.0)
    assert line == "the stop took 4.0 s of 30 s: 3.0 s to end the job's steps, 1.0 s to requeue or end (nothing was saved)"
    kept = json.loads((folder / "stop.json").read_text())
    assert kept == {"by": "slurm", "time": 200.0, "seconds": {"tell": None, "step": None, "save": None, "end": 3.0, "leave": 1.0}}
    assert stop_times(run, 2, asked=200.0, told=201.0, ended=203.0, left=204.0).line(30.0).startswith("the stop took 4.0 s of 30 s: 1.0 s to pass it on, 2.0 s to end")
