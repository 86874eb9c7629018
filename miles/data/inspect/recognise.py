"""Which kind a file or folder is, by what it says of itself, and the page or rows that belong to the kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py

from miles.config.exits import UserError
from miles.data.inspect import run_files, sequences
from miles.data.inspect.page import Page, Table
from miles.data.sample import Sample
from miles.data.store import journal, manifest, routes, run_dir, shard, train_record
from miles.data.store.checkpoint import SCHEMA as CHECKPOINT
from miles.data.store.checkpoint import STATE
from miles.data.store.events import name_parts
from miles.data.store.files import Damaged, OtherSchema, read_json
from miles.data.store.hdf5 import reading
from miles.data.store.manifest import read_manifest
from miles.data.store.metrics import read_lines
from miles.data.store.run_dir import COMPLETE

Describe = Callable[[Path], Page]

HDF5: dict[str, tuple[str, Describe]] = {
    "miles.rollout": (shard.SCHEMA, sequences.shard_page),
    "miles.routes": (routes.SCHEMA, sequences.routes_page),
    "miles.train": (train_record.SCHEMA, sequences.train_page),
}
JSON: dict[str, tuple[str, Describe]] = {
    "miles.batch": (manifest.SCHEMA, run_files.batch_page),
    "miles.checkpoint": (CHECKPOINT, run_files.checkpoint_page),
    "miles.provenance": (run_dir.PROVENANCE_SCHEMA, run_files.provenance_page),
    "miles.plan": (run_dir.PLAN_SCHEMA, run_files.plan_page),
}


@dataclass(frozen=True)
class Found:
    """A kind by its short name, and what describes it."""

    kind: str
    describe: Describe


def recognise(path: Path) -> Found:
    """The kind of what lies at a path. UserError when it is not there, not of miles, or of another major version, by name."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give a run directory or anything in it")
    return _folder(path) if path.is_dir() else _file(path)


def describe(path: Path) -> Page:
    """What inspection says of it."""
    return recognise(path).describe(path)


def _folder(path: Path) -> Found:
    if (path / manifest.NAME).is_file():
        return Found("batch", run_files.batch_page)
    if (path / STATE).is_file() or (path / COMPLETE).is_file():
        return Found("checkpoint", run_files.checkpoint_page)
    if any((path / name).exists() for name in ("run.yaml", "attempts", "provenance.json")):
        return Found("run", run_files.run_page)
    inside = sorted(each.name for each in path.iterdir())[:6]
    raise UserError(f"{path}: no run directory, batch or checkpoint (it has {', '.join(inside) or 'nothing in it'}); give one of these, or a file")


def _file(path: Path) -> Found:
    if h5py.is_hdf5(path) or path.suffix == ".h5":
        return _by_schema(path, HDF5, _hdf5_schema(path))
    if path.name == "run.yaml":
        return Found("run.yaml", run_files.yaml_page)
    if path.suffix == ".jsonl":
        return Found("events", run_files.events_page) if name_parts(path) else Found("metrics", run_files.metrics_page)
    if path.suffix == ".log" and (path.parent.name == "journal" or journal.is_journal(path)):
        return Found("journal", sequences.journal_page)
    if path.suffix == ".json" or path.name == COMPLETE:
        content = read_json(path)
        return _by_schema(path, JSON, content.get("schema") if isinstance(content, dict) else None)
    logs = "; a log is read by `miles-submit logs`" if path.suffix == ".log" else ""
    raise UserError(f"{path}: not a file of a run that can be inspected{logs}")


def _hdf5_schema(path: Path) -> Any:
    with reading(path):
        try:
            file = h5py.File(path, "r", locking=False)
        except OSError as error:
            raise Damaged(f"{path}: an HDF5 file expected; {error}") from None
        with file:
            return file.attrs.get("schema")


def _by_schema(path: Path, known: dict[str, tuple[str, Describe]], schema: Any) -> Found:
    """Refuses what no reader here knows: without a schema, of another kind, of another major number."""
    if not isinstance(schema, str):
        raise OtherSchema(f"{path}: carries no schema; expected one of {', '.join(expected for expected, _ in known.values())}")
    kind = schema.split("/")[0]
    if kind not in known:
        raise OtherSchema(f"{path}: is {schema}, which this miles doesn't know; it knows {', '.join(expected for expected, _ in known.values())}")
    expected, page = known[kind]
    if schema.split("/")[1:2] != expected.split("/")[1:2] and schema.split("/")[-1].split(".")[0] != expected.split("/")[1]:
        raise OtherSchema(f"{path}: is {schema}, and this miles reads {expected}; use the miles version that wrote it")
    return Found(kind.removeprefix("miles."), page)


# Single rows.

Rows = Iterator[tuple[dict[str, Any], Sample | Table | None]]


def rows(path: Path, first: int | None, last: int | None) -> Rows:
    """(facts, sample or table of tokens) of rows first to last (exclusive; None: from the start, to the end; negative from the end).

    Rows are sequences of a batch, shard, train record or journal, lines of metrics and events. UserError for what has none, and for
    rows that are not there.
    """
    kind = recognise(path).kind
    if kind == "batch":
        folder = path if path.is_dir() else path.parent
        shards = [folder / entry.name for entry in read_manifest(folder).shards]
        low, high = _bounds(path, first, last, sequences.count_sequences(shards))
        return _samples(sequences.shard_rows(shards, low, high))
    if kind == "rollout":
        return _samples(sequences.shard_rows([path], *_bounds(path, first, last, sequences.count_sequences([path]))))
    if kind == "journal":
        return _samples(sequences.journal_rows(path, *_bounds(path, first, last, sequences.journal_count(path))))
    if kind == "train":
        return iter(sequences.train_rows(path, *_bounds(path, first, last, sequences.train_count(path))))
    if kind in ("metrics", "events"):
        lines = read_lines(path)
        low, high = _bounds(path, first, last, len(lines))
        return iter([(line, None) for line in lines[low:high]])
    raise UserError(f"{path}: --rows shows sequences of a batch, shard, train record or journal, and lines of metrics or events; this is a {kind}")


def _samples(found: Iterator[tuple[str, Sample]]) -> Rows:
    for place, sample in found:
        yield {"place": place, **sequences.sample_facts(sample)}, sample


def _bounds(path: Path, first: int | None, last: int | None, count: int) -> tuple[int, int]:
    low, high, _ = slice(first, last).indices(count)
    if low >= high:
        raise UserError(f"{path}: no rows {'' if first is None else first}:{'' if last is None else last}; it has {count}, counted from 0")
    return low, high


