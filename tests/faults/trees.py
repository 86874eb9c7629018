"""What an attempt wrote: a run's tree before and after, and of every difference whose it is."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import msgpack
import shared
import xxhash

from miles.data.store.files import read_json
from miles.data.store.journal import HEADER
from miles.data.store.metrics import read_lines
from miles.data.store.run_dir import COMPLETE, RunDir, read_provenance, step_of, steps_in

GROWING = re.compile(r".*\.(\d+)\.(?:jsonl|log)")  # events and journals: the epoch is in the name


@dataclass(frozen=True)
class Facts:
    """Of one file or link. Inode and time tell a file that was written again with the bytes it had."""

    inode: int
    time: int
    content: str  # size and xxh3, or the target of a link
    bytes: bytes | None = None  # of events and journals: they may grow by what was begun
    epoch: int | None = None  # attempt that wrote it, by name or content; None where neither says


Tree = dict[Path, Facts]


def snapshot(run_dir: Path, apart: set[int] | None = None) -> Tree:
    """Every file and link of a run but the report, which any launcher draws, and the folders of these attempts (None: of all)."""
    found: Tree = {}
    for top, folders, names in os.walk(run_dir):
        here = Path(top)
        if here == run_dir:
            folders[:] = [name for name in folders if name != "report" and (name != "attempts" or apart is not None)]
        elif here == run_dir / "attempts":
            folders[:] = [name for name in folders if int(name) not in (apart or ())]
        for path in (here / name for name in (*names, *(name for name in folders if (here / name).is_symlink()))):
            with contextlib.suppress(FileNotFoundError):
                found[path] = _facts(path, run_dir)
    return found


def _facts(path: Path, run_dir: Path) -> Facts:
    status = path.lstat()
    if path.is_symlink():
        target = os.readlink(path)
        return Facts(status.st_ino, 0, f"-> {target}", epoch=int(Path(target).name) if path.name == "latest" else None)
    content = path.read_bytes()
    growing = content if _growing(path) else None
    return Facts(status.st_ino, status.st_mtime_ns, f"{len(content)} bytes, xxh3 {xxhash.xxh3_64_hexdigest(content)}", growing, epoch_of(path, run_dir))


def _growing(path: Path) -> re.Match[str] | None:
    return GROWING.fullmatch(path.name) if path.parent.name in ("events", "journal") else None


def epoch_of(path: Path, run_dir: Path) -> int | None:
    """The attempt that wrote a file, by its name or content, or by the state.json of its checkpoint; None where none says."""
    if growing := _growing(path):
        return int(growing[1])
    if path.suffix == ".h5":
        with h5py.File(path, "r", locking=False) as file:
            return int(file.attrs["epoch"]) if "epoch" in file.attrs else None
    if path.name == "manifest.json":
        return int(read_json(path)["epoch"])
    if path.name == "provenance.json":
        return int(read_provenance(RunDir(run_dir))["attempts"][-1]["epoch"])
    parts = path.relative_to(run_dir).parts
    return int(read_json(run_dir / parts[0] / parts[1] / "state.json")["epoch"]) if parts[0] == "checkpoints" else None


def written_alone(before: Tree, after: Tree, old: int) -> list[str]:
    """Differences between two trees between which nobody but attempt `old` can have written: all are its own."""
    return [line for path, was, now, line in _differences(before, after) if not _finished(path, was, now, old)]


def written_beside(before: Tree, after: Tree, old: int, newer: int) -> list[str]:
    """Differences that are not of attempt `newer`, which wrote all the while."""
    return [line for path, was, now, line in _differences(before, after) if not _finished(path, was, now, old) and not _of(newer, path, was, now, after)]


def _differences(before: Tree, after: Tree) -> list[tuple[Path, Facts | None, Facts | None, str]]:
    changed = [path for path in sorted(before.keys() | after.keys()) if before.get(path) != after.get(path)]
    return [(path, before.get(path), after.get(path), f"{path}: {_shown(before.get(path))} became {_shown(after.get(path))}") for path in changed]


def _shown(facts: Facts | None) -> str:
    return "nothing" if facts is None else f"{facts.content} (inode {facts.inode}, attempt {facts.epoch})"


def _finished(path: Path, was: Facts | None, now: Facts | None, old: int) -> bool:
    """Whether a difference is one append to the attempt's own events or journal, begun before it was stopped: one line, one record."""
    growing = _growing(path)
    if growing is None or int(growing[1]) != old or now is None or now.bytes is None:
        return False
    grown_from = b"" if was is None else was.bytes
    assert grown_from is not None
    if not now.bytes.startswith(grown_from) or (was is not None and was.inode != now.inode):
        return False
    if path.suffix == ".jsonl":
        return now.bytes[len(grown_from) :].strip(b"\n").count(b"\n") == 0
    return _records(now.bytes) - _records(grown_from) <= 1


def _records(journal: bytes) -> int:
    """Whole records of a journal."""
    count = at = 0
    while at + HEADER.size <= len(journal):
        length, _ = HEADER.unpack_from(journal, at)
        at += HEADER.size + length
        if at <= len(journal):
            msgpack.unpackb(journal[at - length : at])
            count += 1
    return count


def _of(newer: int, path: Path, was: Facts | None, now: Facts | None, after: Tree) -> bool:
    """Whether an attempt that works meanwhile may have made this difference."""
    run_dir = _top(after)
    if now is None:
        return _retired(RunDir(run_dir), newer, path)
    if now.epoch is not None:
        return now.epoch == newer
    parts = path.relative_to(run_dir).parts
    if path.name == "metrics.jsonl":  # lines carry no epoch; it is the newer's file, and what it held stays
        lines = read_lines(path)
        return was is not None and was.inode == now.inode and len({(line["step"], line["kind"]) for line in lines}) == len(lines)
    return parts[0] == "hf" and _last_checkpoint(RunDir(run_dir))[0] == shared.STEPS  # made at the end


def _retired(run_dir: RunDir, newer: int, path: Path) -> bool:
    """Whether the newer attempt's retention may have deleted a file: of a step before its own newest checkpoint."""
    parts = path.relative_to(run_dir.path).parts
    step = step_of(parts[1].split(".")[0]) if len(parts) > 2 and parts[0] in ("batches", "train", "evals", "checkpoints") else None
    newest, by = _last_checkpoint(run_dir)
    return step is not None and by == newer and step < newest


def _last_checkpoint(run_dir: RunDir) -> tuple[int, Any]:
    """Step of the newest complete checkpoint, and the attempt that wrote it."""
    complete = [step for step in steps_in(run_dir.checkpoints) if (run_dir.checkpoint(step) / COMPLETE).exists()]
    return (complete[-1], read_json(run_dir.checkpoint(complete[-1]) / "state.json")["epoch"]) if complete else (-1, None)


def _top(tree: Tree) -> Path:
    return next(path for path in tree if path.name == "run.yaml").parent
