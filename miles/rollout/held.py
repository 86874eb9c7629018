"""Finished groups that a worker holds until they are sealed, and those of earlier attempts that its journals still know."""

from __future__ import annotations

import logging
from typing import Any

from miles.data.sample import Sample
from miles.data.store.journal import Journal, journal_paths, read_journal
from miles.data.store.run_dir import RunDir

log = logging.getLogger(__name__)

Lineage = dict[str, Any]  # kind, step, weight_version, weight_checksum
Name = tuple[str, int, str]
SHORTEN_BYTES = 256 << 20


def name_of(lineage: Lineage) -> Name:
    """What a group must share with a job to serve it: kind, step and the weights' checksum."""
    return str(lineage["kind"]), int(lineage["step"]), str(lineage["weight_checksum"])


class Held:
    """Groups by job and draw. Warm-start groups are not journalled: making them again costs less than reading them."""

    def __init__(self, run_dir: RunDir, worker: int, epoch: int, samples: dict[str, int]) -> None:
        """samples: of a whole group, by kind."""
        self.samples = samples
        self._journal = Journal(run_dir.journal_file(worker, epoch))
        self._groups: dict[Name, dict[int, list[Sample]]] = {}
        self._old = [path for path in journal_paths(run_dir.journal) if int(path.name.split(".")[-2]) < epoch]
        self._names = self._scan()
        self._read: set[Name] = set()

    def _scan(self) -> set[Name]:
        """Jobs that the old journals have something of."""
        return {name_of(context) for path in self._old for context, _ in read_journal(path)}

    def recall(self, lineage: Lineage) -> dict[int, list[Sample]]:
        """Groups of this job from earlier attempts; each journal is read once a job that it knows."""
        name = name_of(lineage)
        if name not in self._names or name in self._read:
            return {}
        self._read.add(name)
        found: dict[int, list[Sample]] = {}
        for path in self._old:
            for context, group in read_journal(path):
                # A group of another size is of another configuration: it is made again.
                if name_of(context) == name and len(group) == self.samples[name[0]]:
                    found.setdefault(group[0].draw, group)
        if found:
            log.warning("step %d: %d %s groups of an earlier attempt are in the journal; they are not generated again", name[1], len(found), name[0])
        return found

    def add(self, lineage: Lineage, group: list[Sample], *, journal: bool, hold: bool) -> None:
        """Journal a finished group, and hold it until it is sealed (a filtered one is not held)."""
        if journal:
            self._journal.append(group, lineage)
        if hold:
            self._groups.setdefault(name_of(lineage), {})[group[0].draw] = group

    def take(self, lineage: Lineage, draws: list[int]) -> list[Sample]:
        """The samples of these draws; what else was held for this job is let go."""
        groups = self._groups.pop(name_of(lineage))
        return [sample for draw in draws for sample in groups[draw]]

    def sealed(self) -> None:
        """Groups were sealed: a long journal is shortened to what still is only there."""
        if self._journal.bytes > SHORTEN_BYTES:
            alive = self._groups
            self._journal.compact(lambda context, group: group[0].draw in alive.get(name_of(context), {}))

    def close(self) -> None:
        self._journal.close()
