"""The batches of a run, whether trained on or not: shards checked against their manifest, token arrays in blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles.analysis.rows import Part
from miles.analysis.source import CHUNK, SHARD_COLUMNS, Step, steps_between
from miles.config.exits import UserError
from miles.data.store.manifest import NAME, Kind, read_manifest
from miles.data.store.run_dir import RunDir


@dataclass
class Block:
    """Rows first to last (exclusive) of a shard and their token arrays; sequence i has tokens start[i] to start[i + 1] of them."""

    part: Part
    first: int
    last: int
    start: NDArray[np.int64]
    columns: dict[str, NDArray[Any]]


def batches(path: Path, first: int | None = None, last: int | None = None, kind: Kind = "rollout") -> Iterator[Step]:
    """Sealed batches of a kind by step, first to last (both inclusive), each open until the next is asked for.

    UserError for what is no run directory, and where there is none: nothing to analyse is no result. Damaged names a manifest that can't be read, and as steps_between() does.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a run directory")
    run, found = RunDir(path), False
    for number in steps_between(run.evals if kind == "eval" else run.batches, first, last):
        folder = run.batch_of(kind, number)
        if not (folder / NAME).is_file():
            continue
        manifest = read_manifest(folder)
        if manifest.kind != kind:
            continue
        step, found = Step(number, manifest, folder, []), True
        try:
            yield step
        finally:
            step.close()
    if not found:
        between = "" if first is None and last is None else " between those steps"
        raise UserError(f"{path}: nothing to analyse: it holds no {kind} batch{between}")


def parts_of(step: Step) -> Iterator[Part]:
    """Shards of a batch with at least one sequence."""
    for index, entry in enumerate(step.manifest.shards):
        if entry.sequences:
            yield step.part(index)


def blocks_of(part: Part, names: Sequence[str], tokens: int = CHUNK) -> Iterator[Block]:
    """Whole sequences of a shard, about so many tokens at a time, with these token arrays."""
    first, count = 0, len(part.offset) - 1
    while first < count:
        reached = int(np.searchsorted(part.offset, part.offset[first] + tokens))
        last = min(max(reached, first + 1), count)
        begin, end = int(part.offset[first]), int(part.offset[last])
        columns = {name: np.empty(end - begin, SHARD_COLUMNS[name]) for name in names}
        for name, column in columns.items():
            part.sheet.read(f"tokens/{name}", begin, column)
        yield Block(part, first, last, part.offset[first : last + 1] - begin, columns)
        first = last


def versions_of(part: Part) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(row, token, version) i64 [V] of each run of one weight version: where it begins; sorted by row and token."""
    order = np.lexsort((part.run_start, part.run_sequence))
    return part.run_sequence[order], part.run_start[order], part.run_version[order]
