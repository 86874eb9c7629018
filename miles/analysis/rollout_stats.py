"""What was generated: lengths, truncation, repetition, rewards, groups whose rewards are all the same, staleness; by step, source and engine."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles.analysis.batches import Block, batches, blocks_of, parts_of, versions_of
from miles.analysis.rows import Part
from miles.analysis.source import Step
from miles.config.exits import UserError
from miles.data.sample import Flag, Status
from miles.data.store.manifest import Kind

SCHEMA = "miles.rollout_stats/1"
GRAM = 4  # tokens of a piece that counts as repeated
TAIL, PERIOD = 64, 16  # a response loops if its last TAIL tokens repeat themselves after at most PERIOD of them
Columns = dict[str, NDArray[Any]]  # one value a sequence


def rollout_stats(path: Path, first: int | None = None, last: int | None = None, kind: Kind = "rollout") -> dict[str, Any]:
    """Figures of all sequences, of each step, prompt source and engine. UserError where no batch of this kind lies between those steps (inclusive)."""
    tables: list[Columns] = []
    steps: list[dict[str, Any]] = []
    labels: dict[str, list[str]] = {"source": [], "engine": []}
    dropped: Counter[str] = Counter()
    for step in batches(path, first, last, kind):
        here = _joined([_of_part(step, part, labels) for part in parts_of(step)])
        dropped.update(each.why for each in step.manifest.dropped)
        steps.append({"step": step.step, **figures(here), "dropped": len(step.manifest.dropped)})
        tables.append(here)
    whole = _joined(tables)
    if not len(whole["step"]):
        raise UserError(f"{path}: nothing to analyse: its {len(steps)} {kind} batches hold no sequence")
    found: dict[str, Any] = {"schema": SCHEMA, "run": str(path), "kind": kind, "total": figures(whole), "steps": steps, "dropped": dict(dropped)}
    for name, known in labels.items():
        rows = [(label, whole[name] == index) for index, label in enumerate(known)]
        found[f"{name}s"] = [{name: label, **figures({key: column[mine] for key, column in whole.items()})} for label, mine in sorted(rows, key=lambda row: row[0])]
    return found


def figures(of: Columns) -> dict[str, Any]:
    """Plain numbers of a set of sequences; None where there is nothing to say."""
    count = len(of["response"])
    found: dict[str, Any] = {"samples": count}
    if not count:
        return found
    response, reward = of["response"].astype(np.float64), of["reward"][np.isfinite(of["reward"])].astype(np.float64)
    groups, same = _groups(of)
    found |= {
        "groups": groups,
        "prompt_tokens": int(of["prompt"].sum()),
        "response_tokens": int(of["response"].sum()),
        "prompt_mean": float(of["prompt"].mean()),
        "response_mean": float(response.mean()),
        "response_min": int(response.min()),
        **{f"response_p{100 * q:g}": float(np.quantile(response, q)) for q in (0.1, 0.5, 0.9, 0.99)},
        "response_max": int(response.max()),
        "truncated": float((of["status"] == Status.TRUNCATED).mean()),
        "status": {Status(value).name.lower() if value < len(Status) else str(value): int(number) for value, number in zip(*np.unique(of["status"], return_counts=True), strict=True)},
        "reward_mean": float(reward.mean()) if len(reward) else None,
        "reward_std": float(reward.std()) if len(reward) else None,
        "reward_min": float(reward.min()) if len(reward) else None,
        "reward_max": float(reward.max()) if len(reward) else None,
        "without_reward": count - len(reward),
        "same_reward_groups": same,
        "repeated": _mean(of["repeated"]),
        "looping": float(of["looping"].mean()),
        "cached": float(of["cached"].sum() / of["prompt"].sum()) if of["prompt"].any() else None,
        "lag_mean": float(of["lag_sum"].sum() / of["versioned"].sum()) if of["versioned"].any() else None,
        "lag_max": int(of["lag_max"][of["versioned"] > 0].max()) if of["versioned"].any() else None,
        "several_versions": float((of["versions"] > 1).mean()),
    }
    return found


def _groups(of: Columns) -> tuple[int, float | None]:
    """Number of groups (step, draw); of those with two rewards or more, the share whose rewards are all the same (no gradient in GRPO)."""
    order = np.lexsort((of["draw"], of["step"]))
    step, draw, reward = of["step"][order], of["draw"][order], of["reward"][order]
    begins = np.flatnonzero(np.concatenate([[True], (np.diff(step) != 0) | (draw[1:] != draw[:-1])]))
    low, high = np.minimum.reduceat(reward, begins), np.maximum.reduceat(reward, begins)
    several = (np.diff(np.append(begins, len(step))) > 1) & np.isfinite(low)
    return len(begins), float((low == high)[several].mean()) if several.any() else None


def _of_part(step: Step, part: Part, labels: dict[str, list[str]]) -> Columns:
    numbers, count = part.numbers, len(part.offset) - 1
    prompt = numbers["prompt_length"].astype(np.int32)
    found: Columns = {
        "step": np.full(count, step.step, np.int32),
        "draw": numbers["draw"],
        "prompt": prompt,
        "response": (np.diff(part.offset) - prompt).astype(np.int32),
        "reward": numbers["reward"],
        "status": numbers["status"],
        "cached": numbers["cached_tokens"].astype(np.int32),
    }
    for name, given in (("source", part.sources), ("engine", part.engines)):
        known = labels[name]
        known += [each for each in [*given, "unknown"] if each not in known and (each != "unknown" or numbers[name].max() >= len(given))]
        place = np.array([known.index(each) for each in given] + ([known.index("unknown")] if "unknown" in known else []), np.int32)
        found[name] = place[np.minimum(numbers[name], len(place) - 1)]
    pieces = [_repetition(block, prompt) for block in blocks_of(part, ("token_id", "flags"))]
    found["repeated"], found["looping"] = (np.concatenate([piece[index] for piece in pieces]) for index in (0, 1))
    return found | _staleness(step, part)


def _staleness(step: Step, part: Part) -> Columns:
    """Of each sequence: versions in it; over tokens with a known one, their number, and the sum and the greatest of versions behind the batch's policy."""
    count, now = len(part.offset) - 1, step.manifest.policy.weight_version
    row, start, version = versions_of(part)
    inside = row < count
    row, start, lag = row[inside], start[inside], now - version[inside]
    length = np.diff(part.offset)[row]
    last = np.append(row[1:] != row[:-1], True)[: len(row)]
    end = np.where(last, length, np.append(start[1:], 0)[: len(row)])
    size = np.maximum(end - start, 0)
    found = {"versions": np.bincount(row, minlength=count).astype(np.int32), "lag_max": np.full(count, np.iinfo(np.int32).min, np.int32)}
    found["versioned"] = np.bincount(row, size, count).astype(np.int64)
    found["lag_sum"] = np.bincount(row, size * lag, count).astype(np.int64)
    np.maximum.at(found["lag_max"], row[size > 0], lag[size > 0].astype(np.int32))
    return found


def _repetition(block: Block, prompt_length: NDArray[np.int32]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Of each sequence's generated tokens: share of 4-grams that occurred before (NaN below 4 tokens), and whether its end loops."""
    repeated, looping = np.full(block.last - block.first, np.nan, np.float32), np.zeros(block.last - block.first, bool)
    token, generated = block.columns["token_id"], (block.columns["flags"] & Flag.GENERATED) != 0
    for i in range(block.last - block.first):
        here = slice(block.start[i] + int(prompt_length[block.first + i]), block.start[i + 1])
        response = token[here][generated[here]]
        repeated[i], looping[i] = repeated_share(response), loops(response)
    return repeated, looping


def repeated_share(token: NDArray[np.int32]) -> float:
    """Share of a response's pieces of 4 tokens that occurred in it before; NaN below 4 tokens."""
    if len(token) < GRAM:
        return float("nan")
    wide = token.astype(np.uint64)
    pair = wide[:-1] << np.uint64(32) | wide[1:]
    key = pair[:-2] * np.uint64(0x9E3779B97F4A7C15) ^ pair[2:]  # wraps: a hash of the first two, beside the other two as they are
    key.sort()
    return float(1 - (1 + np.count_nonzero(key[1:] != key[:-1])) / len(key))


def loops(token: NDArray[np.int32]) -> bool:
    """Whether a response ends in one piece of at most 16 tokens again and again, for 64 tokens."""
    tail = token[-TAIL:]
    return len(tail) == TAIL and any(bool((tail[period:] == tail[:-period]).all()) for period in range(1, PERIOD + 1))


def _joined(tables: list[Columns]) -> Columns:
    names = ("step", "draw", "prompt", "response", "reward", "status", "cached", "source", "engine", "repeated", "looping", "versions", "lag_max", "versioned", "lag_sum")
    return {name: np.concatenate([table[name] for table in tables]) if tables else np.zeros(0) for name in names}


def _mean(values: NDArray[Any]) -> float | None:
    known = values[np.isfinite(values)].astype(np.float64)
    return float(known.mean()) if len(known) else None
