"""What a run recorded, in chunks: each a few sequences of one train record, joined with their rows of the batch's shards.

Chunks depend on the files alone, never on how many processes share them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from miles.analysis.columns import Sheet, check_offsets
from miles.analysis.rows import NUMBERS, Part, Rows, rows_of
from miles.config.exits import UserError
from miles.data.store import shard as shard_store
from miles.data.store import train_record
from miles.data.store.files import Damaged
from miles.data.store.manifest import NAME, Manifest, read_manifest
from miles.data.store.run_dir import RunDir, step_of

CHUNK = 1 << 20  # tokens: a chunk ends with the sequence that reaches it
SHARD_COLUMNS = {"rollout_logprob": np.float32, "loss_mask": np.uint8, "flags": np.uint8, "token_id": np.int32}
OPTIONAL_COLUMNS = {"kept_mass": np.float16}  # of shards
TRAIN_COLUMNS = {"train_logprob": np.float32, "entropy": np.float32, "advantage": np.float32, "used": np.uint8, "route_miss": np.uint8}
NEEDED = ("rollout_logprob", "loss_mask", "train_logprob")


@dataclass
class Chunk:
    """Sequences first to last (exclusive) of a train record."""

    step: Step
    record: Record
    first: int
    last: int

    @property
    def tokens(self) -> int:
        return int(self.record.offset[self.last] - self.record.offset[self.first])


@dataclass
class Record:
    """A train record: which rows of which shards its sequences are."""

    sheet: Sheet
    offset: NDArray[np.int64]
    shard: NDArray[np.int64]
    row: NDArray[np.int64]
    rank: NDArray[np.int64]
    node: str
    columns: list[str]  # token arrays that it has


class Step:
    """A batch and what training saw of it; files are opened when they are asked for, and closed together."""

    def __init__(self, step: int, manifest: Manifest, folder: Path, records: list[Path]) -> None:
        self.step, self.manifest, self.folder, self.paths = step, manifest, folder, records
        self._parts: dict[int, Part] = {}
        self._rows: tuple[list[Part], Rows] | None = None
        self._open: list[Sheet] = []

    def records(self) -> Iterator[Record]:
        """Each train record of the step, checked against the batch."""
        taken: dict[Path, NDArray[np.int64]] = {}
        for path in self.paths:
            record = self._record(path)
            rows = np.unique(record.shard << 32 | record.row)
            for other, those in taken.items():
                if len(twice := np.intersect1d(rows, those, assume_unique=True)):
                    raise Damaged(f"{path}: its row {twice[0] & 0xFFFFFFFF} of shard {twice[0] >> 32} stands in {other}, too; no sequence counts twice")
            taken[path] = rows
            yield record

    def part(self, index: int) -> Part:
        """A shard of the batch, checked against the manifest."""
        if index not in self._parts:
            self._parts[index] = self._part(index)
        return self._parts[index]

    def rows(self, parts: list[Part]) -> Rows:
        """The rows of these shards as one table. The last one is kept: the next chunk is mostly of the same shards."""
        if self._rows is None or self._rows[0] != parts:
            self._rows = parts, rows_of(parts)
        return self._rows[1]

    def close(self) -> None:
        for sheet in self._open:
            sheet.close()
        self._open, self._parts = [], {}

    def _sheet(self, path: Path, schema: str) -> Sheet:
        sheet = Sheet(path, schema)
        self._open.append(sheet)
        return sheet

    def _record(self, path: Path) -> Record:
        sheet = self._sheet(path, train_record.SCHEMA)
        for name, expected in (
            ("step", self.step), ("run_id", self.manifest.run_id), ("weight_checksum", self.manifest.policy.weight_checksum),
        ):  # fmt: skip
            found = sheet.attrs.get(name)
            if found is not None and found != expected:
                raise Damaged(f"{path}: its {name} is {found!s:.60}, and that of {self.folder / NAME} is {expected!s:.60}; files of two runs are mixed")
        columns = [f"tokens/{name}" for name in TRAIN_COLUMNS if name in NEEDED or sheet.has(f"tokens/{name}")]
        offset = check_offsets(sheet, "sequences/offset", columns)
        shard, row, rank = (sheet.whole(f"sequences/{name}").astype(np.int64) for name in ("shard", "row", "rank"))
        if not len(shard) == len(row) == len(rank) == len(offset) - 1:
            raise Damaged(f"{path}: /sequences: {len(shard)}, {len(row)} and {len(rank)} values of shard, row and rank for {len(offset) - 1} sequences")
        node = sheet.attrs.get("node")
        return Record(sheet, offset, shard, row, rank, path.stem if node is None else str(node), columns)

    def _part(self, index: int) -> Part:
        entry = self.manifest.shards[index]
        path = self.folder / entry.name
        if not path.is_file():
            raise Damaged(f"{path}: missing, and {self.folder / NAME} names it")
        if (found := path.stat().st_size) != entry.bytes:
            raise Damaged(f"{path}: {entry.bytes} bytes expected by {NAME}, {found} found")
        sheet = self._sheet(path, shard_store.SCHEMA)
        columns = [f"tokens/{name}" for name in SHARD_COLUMNS] + [f"tokens/{name}" for name in OPTIONAL_COLUMNS if sheet.has(f"tokens/{name}")]
        offset = check_offsets(sheet, "sequences/offset", columns)
        if (len(offset) - 1, offset[-1]) != (entry.sequences, entry.tokens):
            raise Damaged(f"{path}: {len(offset) - 1} sequences of {offset[-1]} tokens, and {NAME} says {entry.sequences} of {entry.tokens}; files of two runs are mixed")
        numbers = {name: sheet.whole(f"sequences/{name}") for name in NUMBERS}
        sequence, start, version = (sheet.whole(f"runs/{name}").astype(np.int64) for name in ("sequence", "start", "weight_version"))
        for name, values in numbers.items():
            if len(values) != entry.sequences:
                raise Damaged(f"{path}: /sequences/{name} has {len(values)} values for {entry.sequences} sequences")
        if not len(sequence) == len(start) == len(version) or (np.diff(sequence, prepend=0, append=entry.sequences - 1) < 0).any():
            raise Damaged(f"{path}: /runs: sequence, start and weight_version are not of one length, or sequence doesn't ascend from 0 to {entry.sequences - 1}")
        return Part(sheet, offset, numbers, sheet.names("sequences/engine"), sheet.names("sequences/source"), sequence, start, version)


def steps_between(folder: Path, first: int | None = None, last: int | None = None) -> list[int]:
    """Steps that have a folder here, first to last (inclusive), ascending.

    Damaged names what is called like a step's folder and is none, as a file or a link to a disk that isn't there: its data would be left out unseen.
    """
    if not folder.is_dir():
        if os.path.lexists(folder):
            raise Damaged(f"{folder}: {_what(folder)}, and a folder of steps is expected; put it back, or move it away")
        return []
    inside = {entry: step for entry in folder.iterdir() if (step := step_of(entry.name)) is not None and (first is None or step >= first) and (last is None or step <= last)}
    for entry in sorted(inside):
        if not entry.is_dir() and os.path.lexists(entry):  # what retention has just deleted is no concern
            raise Damaged(f"{entry}: {_what(entry)}, and the folder of a step is expected; put it back, move it away, or choose other steps")
    return sorted(set(inside.values()))


def _what(path: Path) -> str:
    return f"a link to {os.readlink(path)}, which isn't there" if path.is_symlink() and not path.exists() else "no folder"


def find_steps(path: Path, first: int | None = None, last: int | None = None) -> tuple[list[int], list[int]]:
    """Steps of a run directory that were trained on, and those with a batch that wasn't; both bounds are inclusive.

    UserError for what is no run directory; Damaged for a train record whose batch is missing, and as steps_between() does.
    """
    run = RunDir(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a run directory")
    if not os.path.lexists(run.batches) and not os.path.lexists(run.train_records):
        raise UserError(f"{path}: holds neither batches nor train records; give a run directory")
    batches = {step for step in steps_between(run.batches, first, last) if (run.batch(step) / NAME).is_file()}
    trained = {step for step in steps_between(run.train_records, first, last) if any(run.train(step).glob("*.h5"))}
    if orphans := sorted(trained - batches):
        step = orphans[0]
        raise Damaged(f"{run.train(step)}: a train record without its batch: {run.batch(step) / NAME} is missing; put the batch back, or choose other steps")
    return sorted(trained), sorted(batches - trained)


def open_step(path: Path, step: int) -> Step:
    """A trained step, its manifest read."""
    run = RunDir(path)
    return Step(step, read_manifest(run.batch(step)), run.batch(step), sorted(run.train(step).glob("*.h5")))


def chunks_of(step: Step, tokens: int = CHUNK) -> Iterator[Chunk]:
    """A step's chunks, in order."""
    for record in step.records():
        first, count = 0, len(record.row)
        while first < count:
            reached = int(np.searchsorted(record.offset, record.offset[first] + tokens))
            last = min(max(reached, first + 1), count)
            yield Chunk(step, record, first, last)
            first = last
