"""What may be deleted, and the only code that deletes sealed files: routes first, then set-aside and old batches, never what a resume needs."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miles.config.exits import UserError
from miles.data.store.epoch import Fence
from miles.data.store.journal import Group, read_journal
from miles.data.store.manifest import NAME, read_manifest
from miles.data.store.run_dir import journal_paths, steps_in

log = logging.getLogger(__name__)

ASIDE = re.compile(r"step_(\d{6,})\.aside\..+")


@dataclass(frozen=True)
class Bounds:
    """What may stay: the newest `count` batches, what is at most `seconds` old, `bytes` in all. None is no bound."""

    count: int | None = None
    seconds: float | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        assert self.count is None or self.count >= 1, "at least the newest batch is kept"


@dataclass
class Record:
    """Folders that go together: a batch with what training saw of it, an evaluation, or one that was set aside."""

    fence: Fence
    step: int
    folders: list[Path]
    free: bool  # no resume needs it: routes may go
    last: bool = False  # the newest batch, for people to look at: it stays, but for its routes
    aside: bool = False
    batch: bool = False
    deleted: list[Path] = field(default_factory=list)

    @property
    def gone(self) -> bool:
        return not self.folders

    def sealed(self) -> float:
        """When it was written [unix s]: its manifest's time, else its folder's."""
        manifest = self.folders[0] / NAME
        return (manifest if manifest.exists() else self.folders[0]).stat().st_mtime

    def bytes(self) -> int:
        """Size of its files."""
        return sum(size_of(folder) for folder in self.folders)

    def routes(self) -> list[Path]:
        """Its route files, if it is sealed. An unfinished batch keeps its files, and so does one whose manifest can't be read."""
        folder = next((folder for folder in self.folders if (folder / NAME).exists()), None)
        if folder is None:
            return []
        try:
            return [path for entry in read_manifest(folder).routes if (path := folder / entry.name).exists()]
        except UserError as error:
            if not self.aside:  # of a damaged batch that was set aside it has been said
                log.warning("routes are kept: %s", error)
            return []

    def delete_routes(self) -> int:
        """Returns how many bytes went. The manifest goes on naming them."""
        gone = 0
        for path in self.routes():
            gone += path.stat().st_size
            self.fence.discard(path)
            self.deleted.append(path)
        return gone

    def delete(self) -> None:
        if self.aside:
            log.warning("%s, which had been set aside, is deleted by retention", self.folders[0])
        for folder in self.folders:
            self.fence.discard(folder)
            self.deleted.append(folder)
        self.folders = []


def retire_batches(fence: Fence, bounds: Bounds, newest: int, now: float | None = None) -> list[Path]:
    """Delete what a checkpoint has made superfluous; returns the paths deleted, in order.

    newest: step of the newest checkpoint that is known to be good. A later one may be COMPLETE and damaged: its mark says nothing of that.

    Never touched: batches newer than that checkpoint (a resume trains on them again), and evaluations from it on (a resume may ask
    for them). The newest batch keeps all but its routes.

    1. Routes of everything else, unless bounds.bytes gives them room.
    2. What is older than bounds.seconds; then batches beyond the newest bounds.count, with what was set aside at steps before those.
    3. Until all records together fit bounds.bytes: routes; then what was set aside; then batches and evaluations; each oldest first.

    now: unix seconds, default the present. Raises Fenced when a newer attempt exists.
    """
    fence.check()
    everything = list(_records(fence, newest))
    free = [record for record in everything if record.free]
    if bounds.bytes is None:
        for record in free:
            record.delete_routes()
    if bounds.seconds is not None:
        oldest = (time.time() if now is None else now) - bounds.seconds
        _delete(record for record in free if not record.last and record.sealed() < oldest)
    if bounds.count is not None:
        kept = {record.step for record in [record for record in everything if record.batch][-bounds.count :]}
        _delete(record for record in free if not record.gone and record.batch and record.step not in kept)
        _delete(record for record in free if not record.gone and record.aside and record.step < min(kept))
    if bounds.bytes is not None:
        _fit(everything, bounds.bytes, newest)
    return [path for record in everything for path in record.deleted]


def _records(fence: Fence, newest: int) -> Iterator[Record]:
    """Everything that retention looks at, oldest step first."""
    run_dir = fence.run_dir
    steps = sorted({*steps_in(run_dir.batches), *steps_in(run_dir.train_records)})
    found = [
        Record(fence, step, [folder for folder in (run_dir.batch(step), run_dir.train(step)) if folder.is_dir()], step <= newest, step == steps[-1], batch=True)
        for step in steps
    ]
    found += [Record(fence, step, [run_dir.eval(step)], step < newest) for step in steps_in(run_dir.evals)]
    for parent in (run_dir.batches, run_dir.evals):
        for folder in sorted(parent.iterdir()) if parent.is_dir() else ():
            if (match := ASIDE.fullmatch(folder.name)) is not None:
                found.append(Record(fence, int(match[1]), [folder], int(match[1]) <= newest, aside=True))
    return iter(sorted(found, key=lambda record: (record.step, not record.batch)))


def _delete(records: Iterator[Record]) -> None:
    for record in records:
        record.delete()


def _fit(everything: list[Record], most: int, newest: int) -> None:
    here = [record for record in everything if not record.gone]
    sizes = {id(record): record.bytes() for record in here}
    total = sum(sizes.values())
    free = [record for record in here if record.free]
    for record in free:
        if total > most:
            gone = record.delete_routes()
            sizes[id(record)] -= gone
            total -= gone
    for record in sorted(free, key=lambda record: not record.aside):  # stable: oldest first among each
        if total > most and not record.last:
            record.delete()
            total -= sizes[id(record)]
    if total > most:
        log.warning(
            "recorded batches take %d bytes, over checkpoint.retain_batches_bytes %d, and what is left is newer than the newest good checkpoint "
            "(step %d) or the newest batch: save more often, or raise the bound", total, most, newest,
        )  # fmt: skip


def retire_journals(fence: Fence, newest: int | None) -> list[Path]:
    """Delete journals of attempts before this one whose every group is done with; returns the paths deleted.

    newest: step of the checkpoint that the run goes on from; None when it begins, and nothing is deleted. A group is done with when its
    draw lies in a batch sealed up to that step, or retention took the batch of its step since. The present attempt's journals are shortened by their writers (Journal.compact).
    """
    fence.check()
    run_dir = fence.run_dir
    if newest is None:
        return []
    done: dict[str, set[int]] = {"rollout": set(), "sft": set(), "eval": set()}
    for kind in done:
        for step in steps_in(run_dir.evals if kind == "eval" else run_dir.batches):
            folder = run_dir.batch_of(kind, step)
            if step <= newest and (folder / NAME).exists():
                manifest = read_manifest(folder)  # a damaged one stops us: it may be the only record of a draw's fate
                if manifest.kind == kind:
                    done[kind] |= set(manifest.draws) | {dropped.draw for dropped in manifest.dropped}

    def is_done(context: dict[str, Any], group: Group) -> bool:
        kind, step = context.get("kind", "rollout"), context.get("step")
        if step is not None and (step < newest if kind == "eval" else step <= newest) and not (run_dir.batch_of(kind, step) / NAME).exists():
            return True
        return all(sample.draw in done.get(kind, set()) for sample in group)

    deleted = []
    for path in journal_paths(run_dir.journal):
        if int(path.name.split(".")[-2]) < fence.epoch and all(is_done(context, group) for context, group in read_journal(path)):
            fence.discard(path)
            deleted.append(path)
    return deleted


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(os.stat(os.path.join(parent, name)).st_size for parent, _, names in os.walk(folder) for name in names)
