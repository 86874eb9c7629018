"""What trainer ranks of slime and miles dumped of one rollout: their samples, once each, with context-parallel parts put together.

Two forms: a file a rank ({rollout_id, rank, rollout_data: name -> list}), where ranks of one tensor-parallel group repeat each other and pipeline
stages before the last have no log-probs; and one file a rollout with whole samples ({format_version: 2, samples}).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles.config.exits import UserError
from miles.data.importers.torch_dump import read_dump

# Their name -> ours; arrays over the response.
RECORD = {"log_probs": "train_logprob", "ref_log_probs": "ref_logprob", "entropy": "entropy", "advantages": "advantage"}
ARRAYS = ("rollout_log_probs", *RECORD)
Notes = Counter[str]


@dataclass
class TrainSample:
    """token i32 [T]; arrays f32 over the response; index and occurrence among those of this index; position among the rollout's samples."""

    path: Path
    rank: int
    token: NDArray[np.int32]
    response: int
    arrays: dict[str, NDArray[Any]]
    index: int | None = None
    occurrence: int = 0
    position: int | None = None
    reward: float = float("nan")
    truncated: bool = False

    def record(self, prompt: int, mask: NDArray[np.uint8]) -> dict[str, NDArray[Any]] | None:
        """Arrays [T] of a train record; None without log-probs."""
        if "log_probs" not in self.arrays:
            return None
        found: dict[str, NDArray[Any]] = {"used": mask}
        for theirs, ours in RECORD.items():
            if theirs in self.arrays:
                found[ours] = np.full(len(self.token), np.nan, np.float32)
                found[ours][prompt:] = self.arrays[theirs]
        return found


def read_train_dumps(step: int, paths: list[Path], notes: Notes) -> list[TrainSample]:
    """The samples of a rollout's dumps, by position or index, and else in the order of ranks. UserError names a file that can't be used."""
    parts: dict[Any, dict[int, TrainSample]] = {}
    sizes: dict[Any, int] = {}
    without = 0
    for path in paths:
        dump = read_dump(path)
        if dump.get("rollout_id") != step:
            raise UserError(f"{path}: holds rollout {dump.get('rollout_id')!r:.40}, and its name says {step}")
        samples, cp_rank, cp_size = (_of_samples(path, dump), 0, 1) if dump.get("format_version") == 2 else _of_rank(path, dump)
        if samples and not any("log_probs" in each.arrays for each in samples):
            without += 1  # an earlier pipeline stage
            continue
        for each in samples:
            key = ("position", each.position) if each.position is not None else ("index", each.index, each.occurrence) if each.index is not None else (str(path), len(parts))
            if cp_rank in parts.setdefault(key, {}):
                notes["samples of ranks that repeat another's"] += 1
                continue
            parts[key][cp_rank], sizes[key] = each, cp_size
    if paths and without == len(paths):
        raise UserError(f"{paths[0]}: none of the {len(paths)} train dumps of rollout {step} has log_probs; training reused the rollout's, so there is nothing to compare (--get-mismatch-metrics records them)")
    if without:
        notes["train dumps without log-probs (earlier pipeline stages)"] += without
    if len(paths) > 1 and any(len(key) == 2 and key[0] not in ("position", "index") for key in parts):
        raise UserError(f"{paths[0]}: its samples have neither sample_indices nor partition, so those of {len(paths)} ranks can't be told apart; give one rank's dump a rollout")
    found = [_whole(part, sizes[key]) for key, part in parts.items()]
    return sorted(found, key=lambda each: (each.position is None, each.position or 0, each.index is None, each.index or 0, each.occurrence))


def _of_samples(path: Path, dump: dict[str, Any]) -> list[TrainSample]:
    """Samples of a file with whole ones."""
    rows = dump.get("samples")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: samples: a list of objects expected")
    found, count = [], Counter[Any]()
    for place, row in enumerate(rows):
        columns = {name: [row[name]] for name in ("tokens", "response_lengths", "response_length", "loss_masks", "truncated", "rewards", *ARRAYS) if row.get(name) is not None}
        if "response_length" in columns:
            columns["response_lengths"] = columns["response_length"]
        (one,) = _rows(path, columns, f"sample {place}", int(row.get("data_parallel_rank") or 0))
        one.index, one.position = row.get("sample_index"), row.get("rollout_position")
        one.reward = _reward(dump.get("raw_reward"), one.position, one.reward)
        one.occurrence, count[one.index] = count[one.index], count[one.index] + 1
        found.append(one)
    return found


def _of_rank(path: Path, dump: dict[str, Any]) -> tuple[list[TrainSample], int, int]:
    """Samples of a rank's file; its context-parallel rank and how many there are."""
    data = dump.get("rollout_data")
    if not isinstance(data, dict):
        raise UserError(f"{path}: has no rollout_data; give the files of --save-debug-train-data")
    cp_rank, cp_size = int(dump.get("cp_rank") or 0), int(dump.get("cp_size") or 1)
    if cp_size > 1 and dump.get("qkv_format", "thd") != "thd":
        raise UserError(f"{path}: context-parallel parts in the layout {dump['qkv_format']!r} are not read, those of thd are")
    samples = _rows(path, data, "sample", int(dump.get("rank") or 0))
    indices, partition = data.get("sample_indices"), data.get("partition")
    count: Counter[Any] = Counter()
    for place, each in enumerate(samples):
        each.index = _item(indices, place, len(samples))
        each.position = _item(partition, place, len(samples))
        each.occurrence, count[each.index] = count[each.index], count[each.index] + 1
        each.reward = _reward(data.get("raw_reward"), each.position, each.reward)
        for name in ARRAYS:
            if name not in each.arrays:
                continue
            expected = sum(end - start for start, end in part_ranges(len(each.token), each.response, cp_rank, cp_size))
            if len(each.arrays[name]) not in ((each.response,) if cp_size == 1 else (each.response, expected)):
                mend = "" if cp_size > 1 else "; it may be a context-parallel rank's part, and the file doesn't say which: dump again with a version that writes cp_rank, or whole samples"
                raise UserError(f"{path}: sample {place}: {name} has {len(each.arrays[name])} values for {each.response} response tokens{mend}")
    return samples, cp_rank, cp_size


def _rows(path: Path, columns: dict[str, Any], word: str, rank: int) -> list[TrainSample]:
    tokens, lengths = columns.get("tokens"), columns.get("response_lengths")
    if tokens is None or lengths is None or len(tokens) != len(lengths):
        raise UserError(f"{path}: tokens and response_lengths expected, a value a sample")
    found = []
    for place, (token, response) in enumerate(zip(tokens, lengths, strict=True)):
        where = f"{path}: {word}" if word != "sample" else f"{path}: sample {place}"
        ids, size = array(where, "tokens", token).astype(np.int32), int(response)
        if not 0 <= size <= len(ids):
            raise UserError(f"{where}: response_length is {size} of {len(ids)} tokens")
        arrays = {name: array(where, name, columns[name][place]).astype(np.float32) for name in ARRAYS if columns.get(name) is not None and columns[name][place] is not None}
        if columns.get("loss_masks") is not None:
            mask = array(where, "loss_masks", columns["loss_masks"][place])
            if len(mask) != size:
                raise UserError(f"{where}: loss_masks has {len(mask)} values for {size} response tokens")
            arrays["loss_mask"] = mask
        reward = _item(columns.get("rewards"), place, len(tokens))
        found.append(TrainSample(path, rank, ids, size, arrays, reward=float("nan") if reward is None else float(reward), truncated=bool(_item(columns.get("truncated"), place, len(tokens)) or 0)))
    return found


def array(where: str, name: str, values: Any) -> NDArray[Any]:
    """A tensor, array or list of numbers as a flat array; bfloat16 is widened."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    try:
        return np.asarray(values).astype(np.float64 if name != "tokens" else np.int64).reshape(-1)
    except (TypeError, ValueError):
        raise UserError(f"{where}: {name}: numbers expected") from None


def part_ranges(total: int, response: int, cp_rank: int, cp_size: int) -> list[tuple[int, int]]:
    """Which values of the response a context-parallel rank holds, in its order: [first, last) twice.

    A sequence is cut into 2 · cp_size pieces of one size; a rank has piece cp_rank and the one as far from the end. Value i of the response is
    computed at the token before it, and belongs to whoever has that token.
    """
    if cp_size == 1:
        return [(0, response)]
    piece, before = -(-total // (2 * cp_size)), total - response - 1
    found = []
    for number in (cp_rank, 2 * cp_size - 1 - cp_rank):
        start, end = max(number * piece, before), min((number + 1) * piece, total - 1)
        found.append((start - before, max(end, start) - before))
    return found


def _whole(parts: dict[int, TrainSample], cp_size: int) -> TrainSample:
    """A sample out of the parts of all context-parallel ranks."""
    first = parts[min(parts)]
    if cp_size == 1:
        return first
    if missing := set(range(cp_size)) - set(parts):
        raise UserError(f"{first.path}: of its {cp_size} context-parallel ranks the dump of rank {min(missing)} is missing")
    for name in ARRAYS:
        if name not in first.arrays:
            continue
        whole = np.full(first.response, np.nan, np.float32)
        for rank, part in parts.items():
            values, at = part.arrays[name], 0
            if len(values) == first.response:  # whole on each rank
                whole[:] = values
                continue
            for start, end in part_ranges(len(first.token), first.response, rank, cp_size):
                whole[start:end] = values[at : at + end - start]
                at += end - start
        first.arrays[name] = whole
    return first


def _item(values: Any, place: int, count: int) -> Any:
    """A sample's value of a column, as a plain number; None where the column is missing or is not one."""
    if values is None or not hasattr(values, "__len__") or len(values) != count:
        return None
    value = values[place]
    return value.item() if hasattr(value, "item") else value


def _reward(raw: Any, position: int | None, otherwise: float) -> float:
    """A sample's reward before training compared it within its group; that list is of the whole rollout, by position."""
    if position is None or raw is None or not hasattr(raw, "__len__") or not 0 <= position < len(raw):
        return otherwise
    value = raw[position]
    return float(value.item() if hasattr(value, "item") else value)
