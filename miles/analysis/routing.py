"""Experts: how the load is spread over them, how alike siblings' prompts were routed, and how often training routed otherwise than rollout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles.analysis.batches import batches, parts_of, versions_of
from miles.analysis.load import Buffers, load
from miles.analysis.rows import Part
from miles.analysis.source import Record, Step, chunks_of, find_steps, open_step
from miles.config.exits import UserError
from miles.data.store.files import Damaged
from miles.data.store.hdf5 import reading
from miles.data.store.manifest import ShardEntry
from miles.data.store.routes import Routes, open_routes
from miles.data.store.train_record import LAYERS

SCHEMA = "miles.routing/1"
BLOCK = 1 << 24  # expert numbers read at a time


class Load:
    """Tokens by layer and expert, i64 [layers, experts]; grows with the greatest expert met."""

    def __init__(self, layers: int) -> None:
        self.counts = np.zeros((layers, 0), np.int64)

    def add(self, experts: NDArray[np.integer[Any]]) -> None:
        """experts [tokens, layers, top_k]."""
        layers = self.counts.shape[0]
        for layer in range(layers):
            found = np.bincount(experts[:, layer].ravel())
            if len(found) > self.counts.shape[1]:
                self.counts = np.pad(self.counts, ((0, 0), (0, len(found) - self.counts.shape[1])))
            self.counts[layer, : len(found)] += found


def routing(path: Path, first: int | None = None, last: int | None = None, experts: int | None = None) -> dict[str, Any]:
    """Routes of rollout batches first to last (inclusive), and route_miss of what was trained on. UserError where neither is recorded.

    experts: of a layer; without it as many as the greatest number met plus 1, so that one never used at the end is not seen.
    """
    total: Load | None = None
    steps: list[tuple[int, Load, int]] = []
    siblings, gone, shape = np.zeros((0, 2), np.int64), 0, (0, 0)
    for step in batches(path, first, last):
        of_step: Load | None = None
        tokens = 0
        for part, entry in _pairs(step):
            file = step.folder / entry.name
            if not file.is_file():
                gone += 1
                continue
            with reading(file), open_routes(file) as routes:
                if total is None:
                    total, shape, siblings = Load(routes.shape[0]), routes.shape, np.zeros((routes.shape[0], 2), np.int64)
                if routes.shape != shape:
                    raise UserError(f"{file}: has {routes.shape[0]} layers with {routes.shape[1]} experts a token, and earlier files {shape[0]} with {shape[1]}; files of two runs are mixed")
                of_step = of_step or Load(shape[0])
                alike = Siblings(part, shape[0])
                for low, high in _row_ranges(routes):
                    for row, each in routes.experts(low, high).items():
                        of_step.add(each)
                        alike.add(row, each)
                        tokens += len(each)
                siblings += alike.found
        if tokens and of_step is not None and total is not None:
            steps.append((step.step, of_step, tokens))
            _grow(total, of_step)
    total = total if steps else None
    misses = _misses(path, first, last)
    if total is None and not misses["steps"]:
        why = f"{gone} route files are named, and gone (routes are the first that retention deletes)" if gone else "no batch has routes (rollout.return_routed_experts), and no train record has route_miss"
        raise UserError(f"{path}: nothing to analyse: {why}")
    found: dict[str, Any] = {"schema": SCHEMA, "run": str(path), "route_files_gone": gone, "layers": shape[0] or None, "top_k": shape[1] or None}
    if total is not None:
        count = experts or total.counts.shape[1]
        if count < total.counts.shape[1]:
            raise UserError(f"{path}: expert {total.counts.shape[1] - 1} was routed to, and --experts says {count} a layer")
        rows = [_balance(row, count) for row in total.counts]
        found |= {
            "experts": count,
            "tokens": sum(tokens for _, _, tokens in steps),
            "by_layer": [{"layer": layer, **row, "siblings_differ": _share(siblings[layer])} for layer, row in enumerate(rows)],
            "by_step": [{"step": step, "tokens": tokens, **_over_layers(of_step.counts, count)} for step, of_step, tokens in steps],
            "load": np.pad(total.counts, ((0, 0), (0, count - total.counts.shape[1]))).tolist(),
            "sibling_tokens": int(siblings[0, 1]),
        }
    return {**found, "training": misses}


def _balance(counts: NDArray[np.int64], experts: int) -> dict[str, Any]:
    """How even one layer's load is over this number of experts: 1 is even in max_over_mean and entropy, 0 in deviation."""
    load = np.concatenate([counts, np.zeros(experts - len(counts), np.int64)]).astype(np.float64)
    mean, share = load.mean(), load[load > 0] / load.sum()
    return {
        "max_over_mean": float(load.max() / mean),
        "min_over_mean": float(load.min() / mean),
        "deviation": float(load.std() / mean),
        "entropy": float(-(share * np.log(share)).sum() / np.log(experts)) if experts > 1 else 1.0,
        "unused": int((load == 0).sum()),
        "busiest": int(load.argmax()),
    }


def _over_layers(counts: NDArray[np.int64], experts: int) -> dict[str, float]:
    rows = [_balance(row, experts) for row in counts]
    return {
        "max_over_mean": float(np.mean([row["max_over_mean"] for row in rows])),
        "worst_max_over_mean": float(np.max([row["max_over_mean"] for row in rows])),
        "deviation": float(np.mean([row["deviation"] for row in rows])),
        "entropy": float(np.mean([row["entropy"] for row in rows])),
    }


def _pairs(step: Step) -> Iterator[tuple[Part, ShardEntry]]:
    """Shards with the route files that the manifest names beside them: they share the part of their names after the first dot."""
    beside = {entry.name.partition(".")[2]: entry for entry in step.manifest.routes}
    for part in parts_of(step):
        if (entry := beside.get(part.sheet.path.name.partition(".")[2])) is not None:
            yield part, entry


def _row_ranges(routes: Routes) -> Iterator[tuple[int, int]]:
    """Ranges of shard rows whose routes are read together."""
    rows, offset = routes.sequence.astype(np.int64), routes.offset.astype(np.int64) * routes.shape[0] * routes.shape[1]
    first = 0
    while first < len(rows):
        last = max(first + 1, int(np.searchsorted(offset, offset[first] + BLOCK, side="right")) - 1)
        yield int(rows[first]), int(rows[last - 1]) + 1
        first = last


class Siblings:
    """By layer (tokens routed to another set of experts than in the group's first sequence, tokens compared), i64 [layers, 2], in `found`.

    Compared are the tokens of a prompt that siblings of one shard share, where both began with the same weights: apart from noise they are the same.
    """

    def __init__(self, part: Part, layers: int) -> None:
        self.found = np.zeros((layers, 2), np.int64)
        self._draw, self._prompt = part.numbers["draw"], part.numbers["prompt_length"].astype(np.int64)
        row, _, version = versions_of(part)
        self._began = np.full(len(self._draw), -1, np.int64)
        self._began[row[::-1]] = version[::-1]  # the first run of each
        self._of_draw = -1
        self._first: dict[tuple[int, int], NDArray[Any]] = {}

    def add(self, row: int, experts: NDArray[np.integer[Any]]) -> None:
        """Routes [tokens, layers, top_k] of a shard's row; rows come in order, so that groups do."""
        if self._draw[row] != self._of_draw:
            self._of_draw, self._first = int(self._draw[row]), {}
        mine = np.sort(experts[: self._prompt[row]], -1)
        reference = self._first.setdefault((int(self._prompt[row]), int(self._began[row])), mine)
        common = min(len(mine), len(reference))
        if reference is not mine and common:
            self.found[:, 0] += (mine[:common] != reference[:common]).any(-1).sum(0)
            self.found[:, 1] += common


def _misses(path: Path, first: int | None, last: int | None) -> dict[str, Any]:
    """Of tokens under the loss mask, in how many layers training routed them otherwise: by step, as a histogram over the number of layers, and where it is recorded by layer."""
    histogram, steps, buffers = np.zeros(256, np.int64), [], Buffers()
    by_layer = np.zeros((2, 0), np.int64)
    for number in find_steps(path, first, last)[0]:
        step, here = open_step(path, number), np.zeros(256, np.int64)
        try:
            for chunk in chunks_of(step) if step.manifest.kind == "rollout" else ():
                if "tokens/route_miss" not in chunk.record.columns:
                    continue
                if chunk.first == 0:
                    by_layer = _more(by_layer, chunk.record)
                loaded = load(chunk, buffers)
                mask, miss = loaded.columns["loss_mask"], loaded.columns["route_miss"]
                within = np.arange(int(loaded.length.sum())) - np.repeat(np.cumsum(loaded.length) - loaded.length, loaded.length)
                trained = mask[np.repeat(loaded.shard_start, loaded.length) + within] != 0
                here += np.bincount(miss[np.repeat(loaded.train_start, loaded.length) + within][trained], minlength=256)
        finally:
            step.close()
        if tokens := int(here.sum()):
            steps.append({"step": number, "tokens": tokens, "differ": int(here[1:].sum()) / tokens, "layers_mean": float((here * np.arange(256)).sum() / tokens)})
            histogram += here
    tokens = int(histogram.sum())
    layers = [{"layers": count, "tokens": int(histogram[count]), "share": int(histogram[count]) / tokens} for count in np.flatnonzero(histogram).tolist()]
    total = {"tokens": tokens, "differ": int(histogram[1:].sum()) / tokens, "layers_mean": float((histogram * np.arange(256)).sum() / tokens)} if tokens else None
    each = [{"layer": layer, "tokens": compared, "differ": differ / compared} for layer, (compared, differ) in enumerate(by_layer.T.tolist()) if compared]
    return {"total": total, "steps": steps, "layers_routed_differently": layers, "by_layer": each}


def _more(found: NDArray[np.int64], record: Record) -> NDArray[np.int64]:
    """i64 [2, layers], tokens compared and those that differed, with a train record's; files of early versions have none."""
    if not record.sheet.has("layers/routed"):
        return found
    columns = [record.sheet.whole(f"layers/{name}").astype(np.int64) for name in LAYERS]
    if len({len(column) for column in columns}) > 1:
        raise Damaged(f"{record.sheet.path}: /layers: {' and '.join(str(len(column)) for column in columns)} values of {' and '.join(LAYERS)}")
    mine = np.stack(columns)
    if found.shape[1] and found.shape != mine.shape:
        raise UserError(f"{record.sheet.path}: has {mine.shape[1]} layers, and earlier files {found.shape[1]}; files of two runs are mixed")
    return mine + found if found.shape[1] else mine


def _grow(total: Load, more: Load) -> None:
    width = max(total.counts.shape[1], more.counts.shape[1])
    total.counts = np.pad(total.counts, ((0, 0), (0, width - total.counts.shape[1])))
    total.counts[:, : more.counts.shape[1]] += more.counts


def _share(row: NDArray[np.int64]) -> float | None:
    return int(row[0]) / int(row[1]) if row[1] else None
