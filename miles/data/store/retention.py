"""What may be deleted, and the only code that deletes sealed files: routes first, then old batches, never what a resume needs."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from miles.data.store.epoch import Fence
from miles.data.store.files import Damaged, make_folder
from miles.data.store.journal import journal_paths, read_journal
from miles.data.store.manifest import NAME, read_manifest
from miles.data.store.run_dir import RunDir, newest_complete_checkpoint, steps_in

log = logging.getLogger(__name__)

TRASH = ".trash"


def retire_batches(run_dir: RunDir, keep: int | None, fence: Fence | None = None) -> list[Path]:
    """Delete what the newest COMPLETE checkpoint has made superfluous; returns the paths deleted.

    Routes go first and always: those of every batch up to that checkpoint. Then, if keep is given, whole batches and their
    train records beyond the newest `keep` batches. A batch newer than that checkpoint is never touched: a resume trains on it
    again. Without a COMPLETE checkpoint nothing is deleted.
    """
    assert keep is None or keep >= 1, "at least the newest batch is kept"
    if fence is not None:
        fence.check()
    newest = newest_complete_checkpoint(run_dir)
    empty_trash(run_dir.batches)
    empty_trash(run_dir.train_records)
    if newest is None:
        return []
    steps = steps_in(run_dir.batches)
    old = [step for step in steps if step <= newest]
    deleted = [path for step in old for path in retire_routes(run_dir.batch(step))]
    for step in old:
        if keep is not None and step not in steps[-keep:]:
            for folder in (run_dir.batch(step), run_dir.train(step)):
                if folder.is_dir():
                    discard(folder)
                    deleted.append(folder)
    return deleted


def retire_routes(folder: Path) -> list[Path]:
    """Delete the route files that a sealed batch names; its manifest goes on naming them. An unfinished batch keeps its files."""
    if not (folder / NAME).exists():
        return []
    try:
        paths = [folder / routes.name for routes in read_manifest(folder).routes]
    except Damaged as error:
        log.warning("routes are kept: %s", error)
        return []
    present = [path for path in paths if path.exists()]
    for path in present:
        path.unlink()
    return present


def retire_journals(run_dir: RunDir, epoch: int, fence: Fence | None = None) -> list[Path]:
    """Delete journals of attempts before `epoch` whose every draw lies in a batch sealed up to the newest COMPLETE checkpoint.

    Returns the paths deleted. The present attempt's journals are shortened by their writers (Journal.compact).
    """
    if fence is not None:
        fence.check()
    newest = newest_complete_checkpoint(run_dir)
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
    deleted = []
    for path in journal_paths(run_dir.journal):
        if int(path.name.split(".")[-2]) < epoch and all(
            sample.draw in done.get(context.get("kind", "rollout"), set()) for context, group in read_journal(path) for sample in group
        ):
            path.unlink()
            deleted.append(path)
    return deleted


def discard(folder: Path) -> None:
    """Delete a folder so that a kill in between never leaves half of it under its name: it moves to .trash first."""
    trash = make_folder(folder.parent / TRASH)
    place, count = trash / folder.name, 0
    while place.exists():
        count += 1
        place = trash / f"{folder.name}.{count}"
    folder.rename(place)
    shutil.rmtree(place)


def empty_trash(parent: Path) -> None:
    """Finish the deletions that a killed process left."""
    trash = parent / TRASH
    if trash.is_dir():
        shutil.rmtree(trash)


