"""Shards: the sequences of a batch that one worker made (miles.rollout/1), sorted by (draw, sample), read by slices.

Token datasets are contiguous, one row a token, so a reader of sequences a..b touches exactly the bytes
offset[a]..offset[b] of the datasets it names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from miles.data.sample import Sample, Status
from miles.data.store.epoch import Fence
from miles.data.store.files import Sealed, metadata_text
from miles.data.store.hdf5 import STRING, attributes, get_strings, open_hdf5, put_blocks, put_strings, seal_hdf5, set_attribute, text

# A shard and the routes beside it are written and read together: one import for both.
from miles.data.store.routes import open_routes as open_routes
from miles.data.store.routes import row_of as routes_row_of
from miles.data.store.routes import write_routes as write_routes

SCHEMA = "miles.rollout/1"
TOKENS = {"token_id": np.int32, "rollout_logprob": np.float32, "loss_mask": np.uint8, "flags": np.uint8}
NUMBERS = {
    "prompt_length": np.uint32,
    "draw": np.uint64,
    "sample": np.uint16,
    "reward": np.float32,
    "status": np.uint8,
    "seed": np.uint64,
    "cached_tokens": np.uint32,
}
BLOCK_TOKENS = 1 << 17
Row = dict[str, Any]
TEXTS = ("prompt", "response", "label")  # bit i of /sequences/texts: text i was given


def write_shard(
    path: Path, samples: Sequence[Sample], attrs: dict[str, Any] | None = None, fence: Fence | None = None, rows: Sequence[Row] | None = None
) -> Sealed:
    """Seal a shard of these samples, in (draw, sample) order whatever order they come in.

    samples: any sequence; each is asked for and not kept, so a lazy sequence bounds memory. rows: row_of() of each sample, where the
    caller has them; without, each sample is asked for twice. attrs: attributes of the file (numbers, text, or JSON values), for instance worker, epoch, step.
    kept_mass is written when any sample carries it (NaN elsewhere). Raises OSError as it comes (disk full), leaving nothing.
    """
    given = [row_of(sample) for sample in samples] if rows is None else rows
    order = sorted(range(len(given)), key=lambda index: (given[index]["draw"], given[index]["sample"]))
    rows = [given[index] for index in order]
    assert len({(row["draw"], row["sample"]) for row in rows}) == len(rows), "a sample is in a shard once"

    def fill(file: h5py.File) -> None:
        sequences = file.create_group("sequences")
        _fill_sequences(sequences, rows)
        _fill_runs(file, rows)
        _fill_tokens(file.create_group("tokens"), sequences, rows, (samples[index] for index in order))

    return seal_hdf5(path, SCHEMA, attrs or {}, fill, fence)


class Shard:
    """A shard opened for reading. Rows are sequences; slices are [first, last)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_hdf5(path, SCHEMA)
        self._offset: NDArray[np.uint64] = self._file["sequences/offset"][:]

    def __len__(self) -> int:
        """Sequences."""
        return len(self._offset) - 1

    @property
    def attrs(self) -> dict[str, Any]:
        """Attributes of the file."""
        return attributes(self._file)

    @property
    def names(self) -> list[str]:
        """Token datasets that the file has."""
        return list(self._file["tokens"])

    @property
    def engines(self) -> list[str]:
        """Engines that /sequences/engine points into."""
        return [str(name) for name in self._file["sequences/engine"].attrs["names"]]

    @property
    def sources(self) -> list[str]:
        """Prompt sources that /sequences/source points into."""
        return [str(name) for name in self._file["sequences/source"].attrs["names"]]

    @property
    def reward_names(self) -> list[str]:
        """Names of the columns of reward_parts."""
        return [str(name) for name in self._file["sequences/reward_parts"].attrs["names"]]

    def sequences(self) -> dict[str, np.ndarray]:
        """One number a sequence, all S of them: offset u64 [S+1], prompt_length u32, draw u64, sample u16, reward f32, status u8,
        seed u64, engine u16, source u16, cached_tokens u32, trained_tokens u32 [S], reward_parts f32 [S, R]. No text, no tokens."""
        group = self._file["sequences"]
        return {name: data[:] for name, data in group.items() if h5py.check_string_dtype(data.dtype) is None}

    def tokens(self, first: int, last: int, names: Sequence[str] = tuple(TOKENS)) -> dict[str, np.ndarray]:
        """Token arrays of sequences first to last (exclusive), concatenated; only that slice of each named dataset is read."""
        assert 0 <= first <= last <= len(self), f"{self.path}: rows {first} to {last} of {len(self)}"
        start, stop = int(self._offset[first]), int(self._offset[last])
        return {name: self._file["tokens"][name][start:stop] for name in names}

    def first_of(self, name: str, first: int, last: int) -> np.ndarray:
        """A token dataset's value at the first token of each sequence first to last (exclusive); 0 for one without tokens."""
        data = self._file["tokens"][name]
        found = np.zeros(last - first, data.dtype)
        for row in np.flatnonzero(np.diff(self._offset[first : last + 1])):
            found[row] = data[int(self._offset[first + row])]
        return found

    def texts(self, name: str, first: int, last: int) -> list[str | None]:
        """prompt, response or label of sequences first to last; None where it was not given."""
        group = self._file["sequences"]
        if name not in group:
            return [None] * (last - first)
        bit = 1 << TEXTS.index(name)
        given = group["texts"][first:last] & bit
        return [value if here else None for value, here in zip(get_strings(group, name, first, last), given, strict=True)]

    def metadata(self, first: int, last: int) -> list[dict[str, Any]]:
        """Metadata of sequences first to last."""
        return [json.loads(value) for value in get_strings(self._file["sequences"], "metadata", first, last)]

    def runs(self, first: int, last: int) -> list[list[tuple[int, int]]]:
        """(start, weight_version) pairs of each of these sequences."""
        return self._pairs("runs", "weight_version", first, last)

    def turns(self, first: int, last: int) -> list[list[tuple[int, int]]]:
        """(start, role) pairs of each of these sequences."""
        return self._pairs("turns", "role", first, last)

    def samples(self, first: int = 0, last: int | None = None) -> list[Sample]:
        """Samples first to last, whole (routes lie in their own file). Rewards come back rounded to f32."""
        last = len(self) if last is None else last
        data = {name: array[first:last] for name, array in self.sequences().items() if name != "offset"}
        bounds = (self._offset[first : last + 1] - self._offset[first]).astype(np.int64)
        tokens = self.tokens(first, last, [name for name in (*TOKENS, "kept_mass") if name in self.names])
        texts = {name: self.texts(name, first, last) for name in TEXTS}
        metadata, runs, turns = self.metadata(first, last), self.runs(first, last), self.turns(first, last)
        engines, sources, parts = self.engines, self.sources, self.reward_names
        found = []
        for row in range(last - first):
            here = slice(bounds[row], bounds[row + 1])
            rewards = data["reward_parts"][row].tolist()
            found.append(
                Sample(
                    draw=int(data["draw"][row]),
                    sample=int(data["sample"][row]),
                    seed=int(data["seed"][row]),
                    prompt_length=int(data["prompt_length"][row]),
                    status=Status(int(data["status"][row])),
                    reward=float(data["reward"][row]),
                    reward_parts={name: value for name, value in zip(parts, rewards, strict=True) if not np.isnan(value)},
                    runs=runs[row],
                    turns=turns[row],
                    engine=engines[data["engine"][row]],
                    source=sources[data["source"][row]],
                    cached_tokens=int(data["cached_tokens"][row]),
                    metadata=metadata[row],
                    prompt=texts["prompt"][row],
                    response=texts["response"][row],
                    label=texts["label"][row],
                    **{name: array[here] for name, array in tokens.items()},
                )
            )
        return found

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pairs(self, group: str, value: str, first: int, last: int) -> list[list[tuple[int, int]]]:
        sequence = self._file[group]["sequence"][:]
        bounds = np.searchsorted(sequence, np.arange(first, last + 1))
        start = self._file[group]["start"][bounds[0] : bounds[-1]].tolist()
        values = self._file[group][value][bounds[0] : bounds[-1]].tolist()
        pairs = list(zip(start, values, strict=True))
        bounds = bounds - bounds[0]
        return [pairs[bounds[row] : bounds[row + 1]] for row in range(last - first)]


def open_shard(path: Path) -> Shard:
    """Open a shard. Damaged for what is no HDF5; ValueError for another kind or major number of schema, by name."""
    return Shard(path)


def row_of(sample: Sample) -> Row:
    """What sealing keeps of a sample in memory: everything but its tokens and texts, some hundred bytes."""
    row: Row = {name: getattr(sample, name) for name in NUMBERS}
    row["length"] = len(sample.token_id)
    row["trained_tokens"] = int(np.count_nonzero(sample.loss_mask))
    row["metadata"] = metadata_text(sample.metadata)
    row["has_kept_mass"] = sample.kept_mass is not None
    row["texts"] = sum(1 << bit for bit, name in enumerate(TEXTS) if getattr(sample, name) is not None)
    row["routes"] = routes_row_of(sample)["routes"]
    for name in ("engine", "source", "reward_parts", "runs", "turns"):
        row[name] = getattr(sample, name)
    return row


def _fill_sequences(group: h5py.Group, rows: list[Row]) -> None:
    offset = np.zeros(len(rows) + 1, np.uint64)
    np.cumsum([row["length"] for row in rows], out=offset[1:])
    group["offset"] = offset
    for name, dtype in NUMBERS.items():
        group[name] = np.array([row[name] for row in rows], dtype)
    group["trained_tokens"] = np.array([row["trained_tokens"] for row in rows], np.uint32)
    for name in ("engine", "source"):
        known = sorted({row[name] for row in rows})
        position = {value: index for index, value in enumerate(known)}
        group[name] = np.array([position[row[name]] for row in rows], np.uint16)
        set_attribute(group[name], "names", known)
    parts = sorted({name for row in rows for name in row["reward_parts"]})
    values = [[row["reward_parts"].get(name, np.nan) for name in parts] for row in rows]
    group["reward_parts"] = np.array(values, np.float32).reshape(len(rows), len(parts))
    set_attribute(group["reward_parts"], "names", parts)
    put_strings(group, "metadata", [row["metadata"] for row in rows])
    group["texts"] = np.array([row["texts"] for row in rows], np.uint8)
    for bit, name in enumerate(TEXTS):
        if any(row["texts"] >> bit & 1 for row in rows):
            group.create_dataset(name, (len(rows),), STRING)


def _fill_runs(file: h5py.File, rows: list[Row]) -> None:
    for name, value, dtype in (("runs", "weight_version", np.uint32), ("turns", "role", np.uint8)):
        group = file.create_group(name)
        group["sequence"] = np.repeat(np.arange(len(rows), dtype=np.uint32), [len(row[name]) for row in rows])
        pairs = [pair for row in rows for pair in row[name]]
        group["start"] = np.array([start for start, _ in pairs], np.uint32)
        group[value] = np.array([value for _, value in pairs], dtype)


def _fill_tokens(group: h5py.Group, sequences: h5py.Group, rows: list[Row], samples: Iterable[Sample]) -> None:
    """Tokens and texts, in blocks: the samples of one block are in memory."""
    total = sum(row["length"] for row in rows)
    columns = dict(TOKENS)
    if any(row["has_kept_mass"] for row in rows):
        columns["kept_mass"] = np.float16
    data = {name: group.create_dataset(name, (total,), dtype) for name, dtype in columns.items()}
    texts = [name for name in TEXTS if name in sequences]
    row, start, held, waiting = 0, 0, 0, []
    for sample in samples:
        waiting.append(sample)
        held += len(sample.token_id)
        if held >= BLOCK_TOKENS:
            _put_columns(data, waiting, start)
            _put_texts(sequences, texts, waiting, row)
            row, start, held, waiting = row + len(waiting), start + held, 0, []
    _put_columns(data, waiting, start)
    _put_texts(sequences, texts, waiting, row)


def _put_texts(group: h5py.Group, names: list[str], samples: list[Sample], row: int) -> None:
    for name in names if samples else ():
        group[name][row : row + len(samples)] = np.array([text(getattr(sample, name) or "") for sample in samples], dtype=object)


def _put_columns(data: dict[str, h5py.Dataset], samples: list[Sample], start: int) -> None:
    for name, column in data.items():
        pieces = (getattr(sample, name) for sample in samples)
        put_blocks(column, (np.full(len(sample.token_id), np.nan, np.float16) if piece is None else piece for sample, piece in zip(samples, pieces, strict=True)), start)
