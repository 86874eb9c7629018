"""Whether files are as they were sealed: every checksum that something below a path vouches for; and whether a run's draws add up."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from miles.config.exits import UserError
from miles.config.lenient import usable
from miles.data.inspect.page import ranges
from miles.data.inspect.recognise import recognise
from miles.data.store.checkpoint import read_complete
from miles.data.store.files import Damaged, Sealed, verify
from miles.data.store.hdf5 import has_own_checksum, verify_own
from miles.data.store.journal import is_journal, last_good_end, next_record
from miles.data.store.manifest import NAME, read_manifest
from miles.data.store.retention import ASIDE
from miles.data.store.run_dir import COMPLETE, RunDir, journal_paths, newest_complete_checkpoint, read_run_yaml, steps_in


@dataclass(frozen=True)
class Verdict:
    """Of one file: good, and what is wrong or worth saying. A damaged file of what was set aside harms nobody: `aside`."""

    path: Path
    good: bool
    message: str = ""
    aside: bool = False


def check(path: Path) -> Iterator[Verdict]:
    """Verdicts on everything at a path that has a checksum. UserError for a kind that has none."""
    if path.suffix == ".h5" and path.is_file() and (verdict := _vouched(path)) is not None:
        yield verdict
        return
    try:
        kind = recognise(path).kind
    except Damaged as error:
        yield Verdict(path, False, str(error))
        return
    folder = path if path.is_dir() else path.parent
    if kind == "run":
        yield from _run(RunDir(path))
    elif kind == "batch":
        yield from _batch(folder)
    elif kind == "checkpoint":
        yield from _checkpoint(folder)
    elif kind == "train":
        yield _train(path)
    elif kind in ("rollout", "routes"):
        why = "the manifest beside it doesn't name it" if (folder / NAME).is_file() else "no manifest beside it vouches for it"
        raise UserError(f"{path}: {why}, so there is nothing to compare with")
    elif kind == "journal":
        yield _journal(path)
    else:
        raise UserError(f"{path}: nothing vouches for a {kind} file; --verify checks run directories, batches, shards, train records, checkpoints and journals")


def _vouched(path: Path) -> Verdict | None:
    """Of an HDF5 file that a manifest or its own user block vouches for: judged unopened, for damage may hide even its kind."""
    if has_own_checksum(path):
        return _train(path)
    if not (path.parent / NAME).is_file():
        return None
    manifest = read_manifest(path.parent)
    entry = next((entry for entry in (*manifest.shards, *manifest.routes) if entry.name == path.name), None)
    return None if entry is None else _sealed(path.parent, Sealed(entry.name, entry.bytes, entry.xxh3))


def _run(run: RunDir) -> Iterator[Verdict]:
    for parent in (run.batches, run.evals):
        for folder in sorted(parent.glob("step_*")) if parent.is_dir() else ():
            aside = ASIDE.fullmatch(folder.name) is not None
            if (folder / NAME).is_file():
                yield from _batch(folder, aside)
            elif not aside:
                yield Verdict(folder, True, "unfinished: no manifest, so it counts for nothing")
    for step in steps_in(run.train_records):
        for record in sorted(run.train(step).glob("*.h5")):
            yield _train(record)
    for step in steps_in(run.checkpoints):
        yield from _checkpoint(run.checkpoint(step))
    for path in journal_paths(run.journal) if run.journal.is_dir() else ():
        yield _journal(path)
    yield from _accounts(run)


def _accounts(run: RunDir) -> Iterator[Verdict]:
    """No draw is lost and none is used twice: the rollouts that were trained on take up one another's draws without a gap.

    Up to the newest complete checkpoint; what lies beyond may be of an earlier attempt, and is judged when it is asked for. Of rollouts
    alone all are judged: they are the progress.
    """
    newest: float | None = newest_complete_checkpoint(run)
    try:
        if run.run_yaml.exists() and (usable(read_run_yaml(run))[0].get("debug") or {}).get("rollout_only"):
            newest = math.inf
    except Damaged as error:
        yield Verdict(run.run_yaml, False, str(error))
    unjudged = 0
    before: tuple[int, int] | None = None  # step, first draw not handed out yet
    for step in steps_in(run.batches):
        try:
            manifest = read_manifest(run.batch(step))
        except (Damaged, FileNotFoundError):
            before = None  # said already
            continue
        if manifest.kind != "rollout":
            continue
        if newest is None or step > newest:
            unjudged += 1
            continue
        taken = sorted([*manifest.draws, *(each.draw for each in manifest.dropped)])
        first = before[1] if before is not None and before[0] == step - 1 else taken[0] if taken else manifest.next_draw
        if taken != list(range(first, manifest.next_draw)):
            twice = sorted({draw for draw, count in Counter(taken).items() if count > 1} | {draw for draw in taken if draw < first})
            lost = sorted(set(range(first, manifest.next_draw)) - set(taken))
            wrong = [f"{words} {ranges(draws)}" for words, draws in (("used twice: draws", twice), ("lost: draws", lost)) if draws]
            yield Verdict(run.batch(step) / NAME, False, f"{run.batch(step) / NAME}: {'; '.join(wrong) or f'draws up to {taken[-1]}, and the next is {manifest.next_draw}'}")
        before = step, manifest.next_draw
    if newest is None and unjudged:
        yield Verdict(run.batches, True, f"draws of {unjudged} batch{'es' if unjudged > 1 else ''} not judged: no checkpoint is complete")


def _verdict(path: Path, look: Callable[[], object], aside: bool = False) -> Verdict:
    try:
        look()
    except UserError as error:
        return Verdict(path, False, str(error), aside)
    return Verdict(path, True, aside=aside)


def _sealed(folder: Path, file: Sealed, aside: bool = False) -> Verdict:
    return _verdict(folder / file.name, lambda: verify(folder / file.name, file.bytes, file.xxh3), aside)


def _batch(folder: Path, aside: bool = False) -> Iterator[Verdict]:
    """Its manifest, then every file that it names; routes may be gone."""
    read = _verdict(folder / NAME, lambda: read_manifest(folder), aside)
    yield read
    if not read.good:
        return
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        yield _sealed(folder, Sealed(shard.name, shard.bytes, shard.xxh3), aside)
    for routes in manifest.routes:
        if (folder / routes.name).exists():
            yield _sealed(folder, Sealed(routes.name, routes.bytes, routes.xxh3), aside)
        else:
            yield Verdict(folder / routes.name, True, "deleted by retention")



def _train(path: Path) -> Verdict:
    """A node's train record, by its own user block."""
    try:
        return Verdict(path, True, "" if verify_own(path) else "no checksum was recorded")
    except UserError as error:
        return Verdict(path, False, str(error))


def _checkpoint(folder: Path) -> Iterator[Verdict]:
    """COMPLETE, then every file that it names."""
    if not (folder / COMPLETE).is_file():
        yield Verdict(folder, True, f"unfinished: {COMPLETE} is missing, so no run resumes from it")
        return
    read = _verdict(folder / COMPLETE, lambda: read_complete(folder))
    yield read
    if read.good:
        for file in read_complete(folder).files:
            yield _sealed(folder, file)


def _journal(path: Path) -> Verdict:
    """A torn tail is what a killed writer leaves: no damage. A bad record with a whole one after it is."""
    size, good = path.stat().st_size, last_good_end(path)
    if is_journal(path, at=next_record(path, good)):
        return Verdict(path, False, f"{path}: the record at byte {good} doesn't have its checksum; the groups from it on are lost ({size - good} bytes)")
    return Verdict(path, True, f"{size - good} bytes after the last whole record" if good < size else "")


