"""Moments uniform over the wall time of an undisturbed run, and how a disturbed one comes to the same place in its work."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import shared

from miles.data.store.metrics import read_lines
from miles.data.store.run_dir import RunDir, read_provenance

Place = tuple[str, int]  # phase of trainer 0, step


@dataclass(frozen=True)
class Moment:
    """`offset` seconds after one of `after` has ended in the newest attempt; after its beginning where that is empty."""

    seconds: float  # of the undisturbed run
    after: frozenset[Place]
    offset: float


class Timeline:
    """Ends of the trainer's phases in an undisturbed run [s after its beginning]."""

    def __init__(self, run_dir: Path) -> None:
        folder = RunDir(run_dir)
        began = read_provenance(folder)["attempts"][0]["time"]
        self.ends = [((event["phase"], event["step"]), event["end"] - began) for event in read_lines(folder.event_file("trainer", 0, 1))]
        self.total = (run_dir / "hf" / "model.safetensors").stat().st_mtime - began

    def at(self, seconds: float) -> Moment:
        """The moment so many seconds into the run."""
        past = sum(end <= seconds for _, end in self.ends)
        if past == 0:
            return Moment(seconds, frozenset(), seconds)
        # A later place counts as well: a resumed run does not pass through all again.
        return Moment(seconds, frozenset(place for place, _ in self.ends[past - 1 :]), seconds - self.ends[past - 1][1])

    def moments(self, rng: random.Random, count: int) -> list[Moment]:
        """So many, uniform over the whole run: those in its work in order, those in its start-up anywhere between them."""
        drawn = [self.at(rng.uniform(0, self.total)) for _ in range(count)]
        ordered = sorted((moment for moment in drawn if moment.after), key=lambda moment: moment.seconds)
        for moment in drawn:
            if not moment.after:
                ordered.insert(rng.randint(0, len(ordered)), moment)
        return ordered


def reached(run_dir: Path, moment: Moment, last: int) -> bool:
    """Whether an attempt after attempt `last` has come to the moment's place."""
    epoch = shared.newest(run_dir)
    folder = RunDir(run_dir)
    if epoch <= last:
        return False
    if not moment.after:
        return True
    return any((event["phase"], event["step"]) in moment.after for event in read_lines(folder.event_file("trainer", 0, epoch)))


def working(run_dir: Path) -> bool:
    """Whether the newest attempt's trainer is past its start-up."""
    return RunDir(run_dir).event_file("trainer", 0, shared.newest(run_dir)).exists()
