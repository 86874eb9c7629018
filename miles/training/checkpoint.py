"""Checkpoint folders: complete or absent, verified before use, the newest ones kept.

    step_000010/model/        distributed checkpoint of the weights, Hugging Face parameter names
    step_000010/optimizer/    distributed checkpoint of AdamW's states: exp_avg.<name>, exp_avg_sq.<name>, step.<name>
    step_000010/rng/rank_00000.safetensors
    step_000010/state.json    step, phase, schedule, progress of the run, lineage
    step_000010/COMPLETE      JSON: name, bytes and xxh3 of every other file; written last

A checkpoint grows under a temporary name and is renamed when COMPLETE is in it, so that a folder called step_NNNNNN is a finished
one. One without COMPLETE, or whose files differ from it, is passed over.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from miles.data.store.checkpoint import SCHEMA, STATE, verify_checkpoint
from miles.data.store.epoch import Fence
from miles.data.store.files import Damaged, checksum, make_folder, seal_json, seal_listing, sync_folder
from miles.data.store.run_dir import COMPLETE, step_name, steps_in
from miles.training.distributed import Ranks


def write_checkpoint(
    checkpoints: Path, step: int, ranks: Ranks, write: Callable[[Path], None], state: dict[str, Any], fence: Fence | None = None
) -> Path:
    """Write one checkpoint; returns its folder. Collective.

    write(folder): every rank writes its files there, in any subfolders, and has synced them. state: content of state.json.
    An older folder of the same step is replaced at the end.
    """
    target = checkpoints / step_name(step)
    if fence is not None:
        fence.check()
    draft = (checkpoints if fence is None else fence.staging) / f".{step_name(step)}.tmp"
    if ranks.rank == 0:
        make_folder(checkpoints)
        if draft.exists():
            shutil.rmtree(draft)
        draft.mkdir()
        seal_json(draft / STATE, {"schema": SCHEMA, **state})
    ranks.barrier()
    write(draft)
    ranks.barrier()
    # Files are divided over the ranks: no rank reads a whole checkpoint back.
    names = ranks.broadcast_json(_files(draft) if ranks.rank == 0 else None)
    own = [_entry(draft, name) for name in names[ranks.rank :: ranks.world_size]]
    entries = sorted((entry for part in ranks.gather_json(own) for entry in part), key=lambda entry: entry["name"])
    if ranks.rank == 0:
        for folder in {(draft / name).parent for name in names}:
            sync_folder(folder)
        seal_listing(draft / COMPLETE, {"schema": SCHEMA, "step": step, "files": entries})
        if fence is not None:
            fence.replace_folder(draft, target)
        else:
            if target.exists():
                shutil.rmtree(target)
            os.rename(draft, target)
            sync_folder(checkpoints)
    ranks.barrier()
    return target


def newest_good(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every file is as it was sealed, and one line about each newer one that was passed over.

    Called by one rank. A checkpoint of another major version of the format is not passed over: ValueError names it.
    """
    said: list[str] = []
    for step in reversed(steps_in(checkpoints)):
        folder = checkpoints / step_name(step)
        try:
            verify_checkpoint(folder)
            return folder, said
        except Damaged as error:
            said.append(f"checkpoint passed over: {error}")
    return None, said


def retain(checkpoints: Path, keep: int, written: Path | None = None, fence: Fence | None = None) -> list[Path]:
    """Delete complete checkpoints but the newest `keep`; returns what was deleted. Called by one rank.

    Nothing is deleted unless a good one stays: the newest is verified first, and while it is damaged all others are kept. written: one
    that this process has just sealed; it is not read again.
    Unfinished and set-aside folders are not touched.
    """
    assert keep >= 1, "at least one checkpoint is kept"
    complete = [step for step in steps_in(checkpoints) if (checkpoints / step_name(step) / COMPLETE).is_file()]
    old = complete[:-keep]
    if not old:
        return []
    newest = checkpoints / step_name(complete[-1])
    try:
        if newest != written:
            verify_checkpoint(newest)
    except Damaged:
        return []
    deleted = []
    for step in old:
        folder = checkpoints / step_name(step)
        if fence is not None:
            fence.discard(folder)
        else:
            # COMPLETE goes first: a crash in the middle leaves a folder that says of itself that it is unfinished.
            (folder / COMPLETE).unlink()
            sync_folder(folder)
            shutil.rmtree(folder)
        deleted.append(folder)
    return deleted


def _files(folder: Path) -> list[str]:
    """Files below a folder, as relative names with slashes."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _entry(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    return {"name": name, "bytes": path.stat().st_size, "xxh3": checksum(path)}
