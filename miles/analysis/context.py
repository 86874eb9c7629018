"""What stands around the worst tokens: ids, log-probs and masks, read again from the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from miles.analysis.rows import UNKNOWN
from miles.analysis.source import SHARD_COLUMNS, open_step
from miles.analysis.state import State

AROUND = 16  # tokens on each side


def worst_tokens(path: Path, state: State) -> list[dict[str, Any]]:
    """One entry a token, greatest |d| first: where it is, both log-probs, and the ids around it (`at` is its place among them)."""
    found = []
    for size, number, shard, row, place in state.worst.tolist():
        step = open_step(path, number)
        try:
            part = step.part(shard)
            start, stop = int(part.offset[row]), int(part.offset[row + 1])
            first, last = max(start, start + place - AROUND), min(stop, start + place + AROUND + 1)
            columns = {name: np.empty(last - first, dtype) for name, dtype in SHARD_COLUMNS.items()}
            for name, column in columns.items():
                part.sheet.read(f"tokens/{name}", first, column)
            at, train = start + place - first, np.empty(1, np.float32)
            for record in step.records():
                for i in np.flatnonzero((record.shard == shard) & (record.row == row)):
                    record.sheet.read("tokens/train_logprob", int(record.offset[i]) + place, train)
        finally:
            step.close()
        engine = int(part.numbers["engine"][row])
        found.append({
                "abs_diff": size, "step": number, "shard": step.manifest.shards[shard].name, "row": row, "position": place,
                "draw": int(part.numbers["draw"][row]), "sample": int(part.numbers["sample"][row]), "engine": part.engines[engine] if engine < len(part.engines) else UNKNOWN,
                "rollout_logprob": float(columns["rollout_logprob"][at]), "train_logprob": float(train[0]), "token_ids": columns["token_id"].tolist(), "at": at,
        })  # fmt: skip
    return found
