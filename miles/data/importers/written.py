"""A run directory out of samples that another program recorded: batches and train records, which the tools of tools/analyze read.

It is made in a hidden folder beside its place and gets its name when all of it is written: an import that was cut off leaves nothing that
looks whole. In memory are the samples of one shard.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles.config.exits import UserError
from miles.data.sample import Sample
from miles.data.store.files import Sealed, make_folder, seal_json, sync_folder
from miles.data.store.manifest import Manifest, Policy, ShardEntry, seal_manifest
from miles.data.store.run_dir import PROVENANCE_SCHEMA, RunDir
from miles.data.store.shard import write_routes, write_shard
from miles.data.store.train_record import TOKENS, write_train_record

SHARD_TOKENS = 1 << 24  # a shard ends with the sample that reaches it
Arrays = dict[str, NDArray[Any]]


@dataclass
class Imported:
    """A sample and what training saw of it: arrays [T] by the names of a train record, None where it was not trained on."""

    sample: Sample
    train: Arrays | None = None
    rank: int = 0


@dataclass
class Counts:
    """What was written."""

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    trained: int = 0  # samples in a train record


def check_target(target: Path) -> None:
    """UserError unless nothing is there, or an empty folder."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"{target}: is there already, and is no folder; give the name of a new run directory")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target}: is not empty, and an import writes over nothing; give the name of a new run directory")


class RunWriter:
    """Writes a run directory at `target`, which must not exist or be an empty folder: UserError else, and nothing is touched.

    add() samples step by step, then finish(). Left in another way, `with` removes what was begun.
    """

    def __init__(self, target: Path, facts: dict[str, Any], shard_tokens: int = SHARD_TOKENS) -> None:
        self.target, self.facts, self.counts = target.absolute(), facts, Counts()
        check_target(target)
        make_folder(self.target.parent)
        self._run = RunDir(self.target.parent / f".{self.target.name}.{os.getpid()}.{secrets.token_hex(4)}.import")
        self._shard_tokens = shard_tokens
        self._steps: set[int] = set()
        self._draws_before: set[int] = set()
        self._next_draw = 0
        self._step: int | None = None  # of which the following are
        self._told: int | None = None
        self._members: set[tuple[int, int]] = set()
        self._versions: list[int] = []
        self._entries: list[ShardEntry] = []
        self._routes: list[ShardEntry] = []
        self._held: list[Imported] = []
        self._held_tokens = 0

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._run.path, ignore_errors=True)

    def add(self, step: int, imported: Imported, policy_version: int | None = None) -> None:
        """A sample of a step. The samples of a step come one after another: UserError where an earlier step, draw or sample comes again.

        policy_version: of the weights that the step's batch was asked of; without it the newest that made any of its tokens.
        """
        if step != self._step:
            self.end_step()
            if step in self._steps:
                raise UserError(f"step {step} comes again after another one: sort by step")
            self._steps.add(step)
            self._step = step
        sample = imported.sample
        if (sample.draw, sample.sample) in self._members:
            raise UserError(f"sample {sample.sample} of group {sample.draw} comes twice in step {step}")
        if sample.draw in self._draws_before:
            raise UserError(f"group {sample.draw} was in an earlier step already: a group's number is never used again (--groups-per-step where they begin anew in each step)")
        self._members.add((sample.draw, sample.sample))
        self._versions += [version for _, version in sample.runs] + ([] if policy_version is None else [policy_version])
        self._told = policy_version if policy_version is not None else self._told
        self._held.append(imported)
        self._held_tokens += len(sample.token_id)
        if self._held_tokens >= self._shard_tokens:
            self._flush()

    @property
    def free_draw(self) -> int:
        """A number that no group of an earlier step has, nor any above it."""
        return self._next_draw

    def finish(self) -> Counts:
        """Seal the last step and give the folder its name. UserError where nothing came."""
        self.end_step()
        if not self.counts.samples:
            raise UserError(f"nothing to import: no sample was found, and {self.target} was not made")
        seal_json(self._run.provenance, {"schema": PROVENANCE_SCHEMA, "run_id": self.target.name, "attempts": [], "imported": {"time": time.time(), **self.facts}})
        if self.target.is_dir():
            self.target.rmdir()  # fails where something came in meanwhile
        os.rename(self._run.path, self.target)
        sync_folder(self.target.parent)
        return self.counts

    def end_step(self) -> None:
        """Seal the step that is being written, if any."""
        if self._step is None:
            return
        self._flush()
        draws = sorted({draw for draw, _ in self._members})
        self._next_draw = max(self._next_draw, draws[-1] + 1)
        policy = Policy(weight_version=max(self._told if self._told is not None else max(self._versions, default=0), 0), weight_checksum="")
        manifest = Manifest(
            run_id=self.target.name, epoch=0, step=self._step, kind="rollout", policy=policy, shards=self._entries, routes=self._routes, draws=draws, next_draw=self._next_draw,
        )  # fmt: skip
        seal_manifest(self._run.batch(self._step), manifest)
        self._draws_before.update(draws)
        self.counts.steps += 1
        self._step, self._told = None, None
        self._members, self._versions, self._entries, self._routes = set(), [], [], []

    def _flush(self) -> None:
        """Write what is held as a shard, and what was trained on of it as a train record."""
        if not self._held:
            return
        assert self._step is not None, "samples are of a step"
        number, held = len(self._entries), sorted(self._held, key=lambda each: (each.sample.draw, each.sample.sample))
        samples = [each.sample for each in held]
        folder = self._run.batch(self._step)
        self._entries.append(_entry(write_shard(folder / f"rollout.{number}.h5", samples, {"step": self._step, "imported": True}), samples))
        if (routes := write_routes(folder / f"routes.{number}.h5", samples, {"step": self._step})) is not None:
            self._routes.append(_entry(routes, [each for each in samples if each.routes is not None]))
        trained = [(row, each) for row, each in enumerate(held) if each.train is not None]
        if trained:
            parts = [_Part(rank, number, [pair for pair in trained if pair[1].rank == rank]) for rank in sorted({each.rank for _, each in trained})]
            write_train_record(self._run.train(self._step) / f"node_{number:04d}.h5", parts, {"step": self._step, "kind": "rollout", "imported": True})
        self.counts.samples += len(held)
        self.counts.tokens += self._held_tokens
        self.counts.trained += len(trained)
        self._held, self._held_tokens = [], 0


class _Part:
    """A rank's part of a train record (store.train_record.RecordPart)."""

    def __init__(self, rank: int, shard: int, rows: list[tuple[int, Imported]]) -> None:
        self.rank, self._rows = rank, rows
        self.layers: dict[str, np.ndarray] = {}
        self.shard = np.full(len(rows), shard, np.uint16)
        self.row = np.array([row for row, _ in rows], np.uint32)
        self.offset = np.cumsum([0, *(len(each.sample.token_id) for _, each in rows)]).astype(np.uint64)

    @property
    def names(self) -> list[str]:
        present = {name for _, each in self._rows for name in each.train or ()}
        return [name for name in TOKENS if name in present]

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        for _, each in self._rows:
            found = (each.train or {}).get(name)
            dtype = TOKENS[name]
            yield np.full(len(each.sample.token_id), np.nan if dtype is np.float32 else 0, dtype) if found is None else found.astype(dtype)


def _entry(file: Sealed, samples: list[Sample]) -> ShardEntry:
    return ShardEntry(name=file.name, bytes=file.bytes, xxh3=file.xxh3, sequences=len(samples), tokens=sum(len(each.token_id) for each in samples))
