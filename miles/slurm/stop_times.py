"""How long a stop took, phase by phase: what the lead (cluster.slurm.lead_seconds) or the grace of a preemption must leave room for."""

from __future__ import annotations

import time
from dataclasses import dataclass

from miles.data.store.events import read_events
from miles.data.store.files import read_json, seal_json
from miles.data.store.run_dir import RunDir

WORDS = {"tell": "to pass it on", "step": "to finish what was begun", "save": "to save", "end": "to end the job's steps", "leave": "to requeue or end"}


@dataclass(frozen=True)
class StopTimes:
    """Seconds of each phase, one after another. tell is None where the run's processes could not be told; step and save are where they came to no save of
    the stop's own (time ran out, or there was nothing to save); save is next to 0 where the checkpoint was there."""

    tell: float | None
    step: float | None
    save: float | None
    end: float
    leave: float

    @property
    def whole(self) -> float:
        """From the request until the job may go."""
        return (self.tell or 0.0) + (self.step or 0.0) + (self.save or 0.0) + self.end + self.leave

    def line(self, allowed: float) -> str:
        """For the job's output."""
        parts = [f"{seconds:.1f} s {words}" for name, words in WORDS.items() if (seconds := getattr(self, name)) is not None]
        return f"the stop took {self.whole:.1f} s of {allowed:.0f} s: {', '.join(parts)}" + ("" if self.save is not None else " (nothing was saved)")


def stop_times(run: RunDir, epoch: int, asked: float, told: float | None, ended: float, left: float) -> StopTimes:
    """asked: when the stop came; told: when the run's processes knew; ended: when the last step of the job had ended; left: when the job was requeued, or else dealt with [unix s].

    When rank 0 saved for the stop's sake is read from its events: a save that was due anyway is part of what was begun.
    """
    saves = [event for event in read_events(run) if (event["component"], event["rank"], event["epoch"], event["phase"]) == ("trainer", 0, epoch, "save")]
    save = next(((event["start"], event["end"]) for event in saves if event.get("stop") and "error" not in event), None)
    known = asked if told is None else max(told, asked)
    if save is None:
        return StopTimes(None if told is None else known - asked, None, None, ended - known, left - ended)
    began, saved = max(save[0], asked), save[1]
    known = min(known, began)  # the answer to whom we told may come late
    return StopTimes(None if told is None else known - asked, began - known, saved - began, ended - saved, left - ended)


def account(run: RunDir, epoch: int, told: float | None, ended: float, allowed: float) -> str | None:
    """Call it when the job may go: adds the seconds to the attempt's stop.json, and returns the line that says them. None without a stop.json."""
    path = run.attempt(epoch) / "stop.json"
    if not path.exists():  # the attempt ended as it was asked
        return None
    stop = read_json(path)
    times = stop_times(run, epoch, float(stop["time"]), told, ended, time.time())
    seal_json(path, {**stop, "seconds": {name: getattr(times, name) for name in WORDS}})
    return times.line(allowed)
