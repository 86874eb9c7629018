"""Finished groups that a worker holds until they are sealed, and those of earlier attempts that its journals still know.

Up to BUDGET_BYTES of arrays are held in memory; what goes beyond is read back from the journal, group by group, when it is sealed.
Warm-start groups are in no journal, so all of a batch stay in memory: a demonstration each, without routes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

from miles.data.sample import Sample
from miles.data.store.epoch import Fence
from miles.data.store.journal import ARRAYS, Journal, read_group, read_journal, scan_journal
from miles.data.store.run_dir import RunDir, journal_paths
from miles.data.store.shard import Row, row_of

log = logging.getLogger(__name__)

Lineage = dict[str, Any]  # kind, step, weight_version, weight_checksum
Name = tuple[str, int, str]
Place = tuple[Path, int]  # journal, position of the record [bytes]
SHORTEN_BYTES = 256 << 20
BUDGET_BYTES = 64 << 20


def name_of(lineage: Lineage) -> Name:
    """What a group must share with a job to serve it: kind, step and the weights' checksum."""
    return str(lineage["kind"]), int(lineage["step"]), str(lineage["weight_checksum"])


def size_of(group: list[Sample]) -> int:
    """Memory of a group's arrays and texts [bytes]."""
    arrays = sum(array.nbytes for sample in group for name in ARRAYS if (array := getattr(sample, name)) is not None)
    return arrays + sum(len(text) for sample in group for text in (sample.prompt, sample.response) if text is not None)


class HeldSamples(Sequence[Sample]):
    """The samples of some groups, in order; of those in the journal one group at a time is in memory. rows: row_of() of each sample."""

    def __init__(self, groups: list[list[Sample] | Place], rows: list[Row], samples: int) -> None:
        self._groups, self.rows, self._samples = groups, rows, samples
        self._last: tuple[int, list[Sample]] = (-1, [])

    def __len__(self) -> int:
        return len(self._groups) * self._samples

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, row = divmod(index, self._samples)
        group = self._groups[number]
        if isinstance(group, list):
            return group[row]
        if self._last[0] != number:
            self._last = -1, []  # before the next is read
            self._last = number, read_group(*group)
        return self._last[1][row]


class Held:
    """Groups by job and draw. Warm-start groups are not journalled: making them again costs less than reading them."""

    def __init__(self, run_dir: RunDir, worker: int, epoch: int, samples: dict[str, int], budget: int = BUDGET_BYTES) -> None:
        """samples: of a whole group, by kind. budget: bytes of arrays held in memory, warm-start groups aside."""
        self.samples, self.budget = samples, budget
        self._run_dir, self._epoch = run_dir, epoch
        self._asked: set[tuple[Name, int]] = set()
        self._journal = Journal(run_dir.journal_file(worker, epoch), fence=Fence(run_dir, epoch))
        self._groups: dict[Name, dict[int, list[Sample] | Place]] = {}
        self._rows: dict[Name, dict[int, list[Row]]] = {}
        self._bytes: dict[Name, int] = {}
        self._done: set[Name] = set()
        self._old = [path for path in journal_paths(run_dir.journal) if int(path.name.split(".")[-2]) < epoch]
        self._names = self._scan()

    def _scan(self) -> set[Name]:
        """Jobs that the old journals have something of. One that is gone meanwhile has nothing: the first worker retires those that are done with."""
        found: set[Name] = set()
        for path in list(self._old):
            try:
                found |= {name_of(context) for context, _ in read_journal(path)}
            except FileNotFoundError:
                self._old.remove(path)
        return found

    def recall(self, lineage: Lineage) -> dict[int, Place]:
        """Where groups of this job from earlier attempts stand, by draw; each journal is read once a job that it knows."""
        name = name_of(lineage)
        if name not in self._names:
            return {}
        self._names.discard(name)
        found = self._find(name, self._old)
        if found:
            log.warning("step %d: %d %s groups of an earlier attempt are in the journal; they are not generated again", name[1], len(found), name[0])
        return found

    def recall_lost(self, lineage: Lineage, workers: Iterable[int]) -> dict[int, Place]:
        """Where groups of this job stand that workers of this attempt finished before they were lost, by draw; each journal is read once a job."""
        name = name_of(lineage)
        new = [worker for worker in workers if (name, worker) not in self._asked]
        self._asked |= {(name, worker) for worker in new}
        found = self._find(name, [self._run_dir.journal_file(worker, self._epoch) for worker in new])
        if found:
            log.warning("step %d: %d %s groups of lost workers are in their journals; they are not generated again", name[1], len(found), name[0])
        return found

    def _find(self, name: Name, paths: Iterable[Path]) -> dict[int, Place]:
        found: dict[int, Place] = {}
        for path in paths:
            with contextlib.suppress(FileNotFoundError):  # retired, or never begun
                for position, context, group in scan_journal(path):
                    # A group of another size is of another configuration: it is made again.
                    if name_of(context) == name and len(group) == self.samples[name[0]]:
                        found.setdefault(group[0].draw, (path, position))
        return found

    def add(self, lineage: Lineage, group: list[Sample], place: Place | None = None, *, hold: bool) -> None:
        """Journal a finished group, unless another journal has it at `place`, and hold it until it is sealed (a filtered one only by its place)."""
        if place is None and lineage["kind"] != "sft":
            place = self._journal.path, self._journal.append(group, lineage)
        name, size = name_of(lineage), size_of(group)
        self._rows.setdefault(name, {})[group[0].draw] = [row_of(sample) for sample in group]
        held = self._groups.setdefault(name, {})
        if place is not None and (not hold or sum(self._bytes.values()) + size > self.budget):
            held[group[0].draw] = place
        else:
            held[group[0].draw] = group
            self._bytes[name] = self._bytes.get(name, 0) + size

    def take(self, lineage: Lineage, draws: list[int]) -> HeldSamples:
        """The samples of these draws, in their order. What else is held for this job stays until the next one begins."""
        name = name_of(lineage)
        groups, rows = self._groups[name], self._rows[name]
        taken = [groups.pop(draw) for draw in draws]
        self._bytes[name] = self._bytes.get(name, 0) - sum(size_of(group) for group in taken if isinstance(group, list))
        return HeldSamples(taken, [row for draw in draws for row in rows.pop(draw)], self.samples[name[0]])

    def begin(self, lineage: Lineage) -> None:
        """A job begins: those of its kind before it are in manifests. What is left of them is let go, and a long journal is shortened by them.

        Not earlier: a shard without its manifest counts for nothing, and after a death in between the journal has all that is left.
        """
        for name in [name for name in self._groups if name[0] == lineage["kind"] and name[1] < lineage["step"]]:
            del self._groups[name], self._rows[name]
            self._bytes.pop(name, None)
            self._done.add(name)
        if not self._done or self._journal.bytes <= SHORTEN_BYTES:
            return
        done, self._done = self._done, set()
        moved = self._journal.compact(lambda context, group: name_of(context) not in done)
        for groups in self._groups.values():
            for draw, group in groups.items():
                if isinstance(group, tuple) and group[0] == self._journal.path:
                    groups[draw] = group[0], moved[group[1]]

    def close(self) -> None:
        self._journal.close()
