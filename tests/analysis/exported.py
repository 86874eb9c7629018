"""A run as JSON Lines, as another program might export it: read with h5py alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import h5py
from shard_rows import Row, rows_of

STATUS = {1: "completed", 2: "truncated"}
ARRAYS = {"train_logprob": "train_logprobs", "entropy": "entropy", "advantage": "advantages", "used": "used", "route_miss": "route_miss"}


def trained_of(run: Path) -> dict[tuple[int, int, int], dict[str, Any]]:
    """(step, shard, row) -> arrays and rank."""
    found = {}
    for path in sorted(run.glob("train/step_??????/*.h5")):
        with h5py.File(path) as file:
            offset = file["sequences/offset"][:].astype(int)
            for i, (shard, row, rank) in enumerate(zip(*(file[f"sequences/{name}"][:].tolist() for name in ("shard", "row", "rank")), strict=True)):
                here = {name: file[f"tokens/{name}"][offset[i] : offset[i + 1]] for name in file["tokens"]}
                found[int(path.parent.name[5:]), shard, row] = {**here, "rank": rank}
    return found


def places(rows: list[Row], run: Path) -> list[tuple[int, int, int]]:
    """(step, shard, row) of rows_of's rows: they come in that order."""
    found = []
    for manifest_path in sorted(run.glob("batches/step_??????/manifest.json")):
        manifest = json.loads(manifest_path.read_text())
        found += [(manifest["step"], shard, row) for shard, entry in enumerate(manifest["shards"]) for row in range(entry["sequences"])]
    assert len(found) == len(rows)
    return found


def lines_of(run: Path) -> list[dict[str, Any]]:
    """A line a sample; NaN is null, −∞ is Python's -Infinity."""
    rows, trained, found = rows_of(run), trained_of(run), []
    for row, place in zip(rows, places(rows, run), strict=True):
        prompt = row.numbers["prompt_length"]
        line = {
            "step": row.step, "group": row.numbers["draw"], "sample": row.numbers["sample"], "token_ids": row.tokens["token_id"].tolist(), "prompt_length": prompt,
            "rollout_logprobs": _plain(row.tokens["rollout_logprob"][prompt:]), "loss_mask": row.tokens["loss_mask"][prompt:].tolist(), "flags": row.tokens["flags"].tolist(),
            "reward": row.numbers["reward"], "status": STATUS[row.numbers["status"]], "engine": row.engine, "source": row.source,
            "cached_tokens": row.numbers["cached_tokens"], "weight_versions": [list(pair) for pair in row.runs], "policy_version": row.now, "mood": "fine",
        }  # fmt: skip
        if (seen := trained.get(place)) is not None:
            line |= {theirs: _plain(seen[ours]) for ours, theirs in ARRAYS.items() if ours in seen} | {"train_rank": seen["rank"]}
        found.append(line)
    return found


def _plain(values: Any) -> list[Any]:
    return [None if isinstance(value, float) and math.isnan(value) else value for value in values.tolist()]
