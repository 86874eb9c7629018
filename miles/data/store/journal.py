"""The journal: finished groups as they finish, in a growing file of which any prefix is valid.

Record: u32 length and u64 xxh3_64 of the payload, both little-endian, then the payload: msgpack of
{schema, context, group: [sample]}, arrays as [dtype, shape, raw little-endian bytes]. Nothing in it is executed on reading:
msgpack without hooks, and dtypes from a short list.
"""

from __future__ import annotations

import json
import logging
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import xxhash

from miles.data.sample import Sample, Status
from miles.data.store.files import Damaged, make_folder, metadata_text, plain, schema_kind, seal, sync_folder
from miles.data.store.msgpack_views import Piece, pack, unpack

if TYPE_CHECKING:
    from miles.data.store.epoch import Fence

log = logging.getLogger(__name__)

SCHEMA = "miles.journal/1"
HEADER = struct.Struct("<IQ")
DTYPES = {"|u1", "<u2", "<u4", "<u8", "<i4", "<f2", "<f4"}
JOIN_BYTES = 1 << 16
ARRAYS = ("token_id", "rollout_logprob", "loss_mask", "flags", "routes", "kept_mass")
Context = dict[str, Any]
Group = list[Sample]


class Journal:
    """Appends finished groups to one worker's file of one attempt. One writer a file; a torn tail is cut off on opening."""

    def __init__(self, path: Path, fsync: bool = False, fence: Fence | None = None) -> None:
        """fsync: survive a power cut, not only a kill, with every group (slower; a killed process loses nothing either way).

        With a fence, everything that writes (opening too) raises Fenced once a newer attempt exists.
        """
        self.path = path
        self.fsync = fsync
        self.fence = fence
        self._check()
        make_folder(path.parent)
        self._open()

    def _open(self) -> None:
        created = not self.path.exists()
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if created:
            sync_folder(self.path.parent)
        self._end = last_good_end(self.path)
        os.ftruncate(self._handle, self._end)

    def _check(self) -> None:
        if self.fence is not None:
            self.fence.check()

    @property
    def bytes(self) -> int:
        """Size of the good part of the file."""
        return self._end

    def append(self, group: Group, context: Context) -> int:
        """Append one finished group; returns its position for read_group(). Disk full: the file stays as it was, and the OSError passes."""
        self._check()
        pieces = encode_group(group, context)
        size = sum(map(len, pieces))
        if size >= 1 << 32:
            raise ValueError(f"{self.path}: a group of {size} bytes; a journal record holds less than 4 GiB: record fewer samples a prompt, or no routes")
        digest = xxhash.xxh3_64()
        for piece in pieces:
            digest.update(piece)
        try:
            _write_all(self._handle, [HEADER.pack(size, digest.intdigest()), *pieces], self._end)
            if self.fsync:
                os.fdatasync(self._handle)
        except OSError:
            os.ftruncate(self._handle, self._end)
            raise
        position = self._end
        self._end += HEADER.size + size
        return position

    def compact(self, keep: Callable[[Context, Group], bool]) -> dict[int, int]:
        """Rewrite the journal with the groups worth keeping (those not in a sealed batch yet), atomically.

        Without it a journal of routes grows by tens of gigabytes a step. Returns {position before: position now} of those kept.
        Damaged, and the file stays as it was, when a record no longer has its checksum: what stands after it would go with it.
        """
        moved: dict[int, int] = {}

        def write(temporary: Path) -> None:
            end = 0
            with open(temporary, "xb") as file:
                for position, payload in _payloads(self.path):
                    if keep(*decode_group(payload, self.path)):
                        moved[position] = file.tell()
                        file.write(HEADER.pack(len(payload), xxhash.xxh3_64_intdigest(payload)))
                        file.write(payload)
                    end = position + HEADER.size + len(payload)
            if end != self._end:
                raise Damaged(f"{self.path}: the record at byte {end} doesn't have its checksum; run it again: the groups from there on are made anew")

        seal(self.path, write, self.fence)
        os.close(self._handle)
        self._open()
        return moved

    def close(self) -> None:
        os.close(self._handle)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_journal(path: Path) -> Iterator[tuple[Context, Group]]:
    """The (context, group) of each record up to the last good one; one group in memory at a time. Arrays are read-only.

    Raises ValueError for a record of another schema.
    """
    for _, context, group in scan_journal(path):
        yield context, group


def scan_journal(path: Path) -> Iterator[tuple[int, Context, Group]]:
    """read_journal with the position of each record, for read_group."""
    for position, payload in _payloads(path):
        yield position, *decode_group(payload, path)


def read_group(path: Path, position: int) -> Group:
    """The group of the record at a position. Damaged when its bytes are no longer what was appended."""
    with open(path, "rb") as file:
        file.seek(position)
        payload = _next_payload(file, os.fstat(file.fileno()).st_size - position)
    if payload is None:
        raise Damaged(f"{path}: the record at byte {position} doesn't have its checksum")
    return decode_group(payload, path)[1]


def is_journal(path: Path, at: int = 0) -> bool:
    """Whether a whole record stands at the beginning of a file, or at this byte."""
    with open(path, "rb") as file:
        file.seek(at)
        return _next_payload(file, os.fstat(file.fileno()).st_size - at) is not None


def next_record(path: Path, position: int) -> int:
    """Where the record after the one at a position begins, by its length alone; the end of the file where that has no room."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(position)
        header = file.read(HEADER.size)
    return min(size, position + HEADER.size + HEADER.unpack(header)[0]) if len(header) == HEADER.size else size


def last_good_end(path: Path) -> int:
    """Where the last good record ends [bytes]."""
    end = 0
    for position, payload in _payloads(path):
        end = position + HEADER.size + len(payload)
    return end


def encode_group(group: Group, context: Context) -> list[Piece]:
    """One record's payload, in pieces; those of the arrays are the arrays' own memory. Every field of Sample is in it; metadata as JSON text."""
    return pack({"schema": SCHEMA, "context": json.loads(json.dumps(context, default=plain)), "group": [_encode(sample) for sample in group]})


def decode_group(payload: Piece, path: Path | str = "journal") -> tuple[Context, Group]:
    """Inverse of encode_group; arrays are views of the payload. `path` only names the file in errors."""
    record = unpack(payload)
    schema_kind(record.get("schema"), SCHEMA, path)
    return record["context"], [_decode(each) for each in record["group"]]


def _encode(sample: Sample) -> dict[str, Any]:
    values = dict(vars(sample))
    for name in ARRAYS:
        values[name] = _encode_array(values[name])
    values["draw"], values["sample"], values["seed"] = int(sample.draw), int(sample.sample), int(sample.seed)
    values["prompt_length"], values["cached_tokens"] = int(sample.prompt_length), int(sample.cached_tokens)
    values["status"] = int(sample.status)
    values["reward"] = float(sample.reward)
    values["reward_parts"] = {str(key): float(value) for key, value in sample.reward_parts.items()}
    values["runs"] = [(int(start), int(version)) for start, version in sample.runs]
    values["turns"] = [(int(start), int(role)) for start, role in sample.turns]
    values["metadata"] = metadata_text(sample.metadata)
    return values


def _decode(values: dict[str, Any]) -> Sample:
    known = {key: value for key, value in values.items() if key in Sample.__dataclass_fields__}
    for name in ARRAYS:
        known[name] = decode_array(known.get(name))
    known["status"] = Status(known["status"])
    known["runs"] = [(start, version) for start, version in known["runs"]]
    known["turns"] = [(start, role) for start, role in known["turns"]]
    known["metadata"] = json.loads(known["metadata"])
    return Sample(**known)


def encode_array(array: np.ndarray | None) -> list[Any] | None:
    """[dtype, shape, raw little-endian bytes], or None."""
    encoded = _encode_array(array)
    return None if encoded is None else [*encoded[:2], encoded[2].tobytes()]


def _encode_array(array: np.ndarray | None) -> list[Any] | None:
    if array is None:
        return None
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    assert little.dtype.str in DTYPES, f"arrays of {sorted(DTYPES)}, not {little.dtype.str}"
    return [little.dtype.str, list(little.shape), little]


def decode_array(encoded: list[Any] | None) -> np.ndarray | None:
    """Inverse of encode_array, read-only, without a copy. ValueError for a dtype that no journal has."""
    if encoded is None:
        return None
    dtype, shape, content = encoded
    if dtype not in DTYPES:
        raise ValueError(f"journal: an array of {dtype!r}; known are {', '.join(sorted(DTYPES))}")
    return np.frombuffer(content, dtype).reshape(shape)


def _payloads(path: Path) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        position = 0
        while position < size:
            payload = _next_payload(file, size - position)
            if payload is None:
                log.warning("%s: the last %d bytes are no complete record; the groups before them are kept", path, size - position)
                return
            yield position, payload
            position += HEADER.size + len(payload)


def _next_payload(file: BinaryIO, left: int) -> bytes | None:
    if left < HEADER.size:
        return None
    length, expected = HEADER.unpack(file.read(HEADER.size))
    # A zero-filled tail (a crash of the machine can leave one) would otherwise need the checksum of nothing to differ from 0.
    if length == 0 or length > left - HEADER.size:
        return None
    payload = file.read(length)
    return payload if len(payload) == length and xxhash.xxh3_64_intdigest(payload) == expected else None


def _write_all(handle: int, pieces: list[Piece], position: int) -> None:
    for view in _joined(pieces):
        while view:
            count = os.pwrite(handle, view, position)
            view, position = view[count:], position + count


def _joined(pieces: list[Piece]) -> Iterator[memoryview]:
    """Small neighbours as one, so that a record of many small pieces is few writes."""
    small: list[Piece] = []
    for piece in pieces:
        if len(piece) >= JOIN_BYTES:
            yield memoryview(b"".join(small))
            yield memoryview(piece)
            small = []
        else:
            small.append(piece)
    yield memoryview(b"".join(small))
