"""What a step's batch and train records hold, as checksums that don't depend on who sealed what: equal where two runs have the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from miles.analysis.batches import blocks_of, parts_of
from miles.analysis.columns import Sheet
from miles.analysis.source import Step, open_step

ASPECTS = {  # in the order in which one makes the next differ
    "weights": "the weights that generated", "draws": "the prompts' draws", "tokens": "token ids", "rollout_logprobs": "the rollout's log-probs", "rewards": "rewards",
    "train_logprobs": "the trainer's log-probs",
}  # fmt: skip
COLUMN = {"tokens": "token_id", "rollout_logprobs": "rollout_logprob"}


def contents(path: Path, step: int, aspects: Sequence[str]) -> dict[str, Any]:
    """A value of each aspect (of ASPECTS) of a step's batch: weights as its checksum, the others as a hash over (draw, sample) in order; None where nothing is recorded."""
    opened = open_step(path, step)
    try:
        found: dict[str, Any] = {aspect: opened.manifest.policy.weight_checksum for aspect in aspects if aspect == "weights"}
        rows = {aspect: _rows(opened, aspect) for aspect in aspects if aspect != "weights"}
        return found | {aspect: _joined(each) if each else None for aspect, each in rows.items()}
    finally:
        opened.close()


def _rows(step: Step, aspect: str) -> dict[tuple[int, int], bytes]:
    """(draw, sample) -> a hash of what it has of the aspect."""
    found: dict[tuple[int, int], bytes] = {}
    if aspect == "train_logprobs":
        for record in step.records():
            numbers = [step.part(int(shard)).numbers for shard in record.shard]
            for i, (of, row) in enumerate(zip(numbers, record.row, strict=True)):
                found[int(of["draw"][row]), int(of["sample"][row])] = _of_range(record.sheet, int(record.offset[i]), int(record.offset[i + 1]))
        return found
    for part in parts_of(step):
        keys = list(zip(part.numbers["draw"].tolist(), part.numbers["sample"].tolist(), strict=True))
        if aspect in COLUMN:
            for block in blocks_of(part, (COLUMN[aspect],)):
                values = block.columns[COLUMN[aspect]]
                for i in range(block.last - block.first):
                    found[keys[block.first + i]] = xxhash.xxh3_64_digest(values[block.start[i] : block.start[i + 1]].tobytes())
        else:
            rewards = part.numbers["reward"]
            found |= {key: b"" if aspect == "draws" else rewards[i].tobytes() for i, key in enumerate(keys)}
    return found


def _of_range(sheet: Sheet, start: int, stop: int) -> bytes:
    values = np.empty(stop - start, np.float32)
    sheet.read("tokens/train_logprob", start, values)
    values[np.isnan(values)] = np.nan  # a NaN is a NaN, whatever its bits
    return xxhash.xxh3_64_digest(values.tobytes())


def _joined(rows: dict[tuple[int, int], bytes]) -> str:
    digest = xxhash.xxh3_64()
    for key in sorted(rows):
        digest.update(repr(key).encode() + rows[key])
    return digest.hexdigest()
