"""metrics.jsonl: one JSON object a line, cut back to the checkpoint on resume, so that a step is told once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from miles.data.store.epoch import Fence
from miles.data.store.files import make_folder, plain, seal_bytes


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line and flush it to the kernel, in one write. After a torn last line it begins a new one.

    NaN and infinities become null: JSON has none. Disk full: the file stays as it was, and the OSError passes.
    """
    handle = _open(path)
    try:
        _append(handle, record)
    finally:
        os.close(handle)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines; torn ones (of a killed writer) are passed over. Null becomes NaN. No file: no lines."""
    return [record for _, record in numbered_lines(path) if record is not None]


def numbered_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(number from 1, record) of each line that isn't empty; None for one that is no JSON object. Values as read_lines() gives them."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line != b"\n":
                record = _parse(line)
                yield number, None if record is None else {key: math.nan if value is None else value for key, value in record.items()}


class Metrics:
    """metrics.jsonl in the hands of one attempt; rank 0 alone writes it.

    An attempt puts a copy of the file in its place when it begins, and holds it open. So an older one that was stopped just before
    a write goes on writing to a file that has no name any more.
    """

    def __init__(self, path: Path, fence: Fence | None = None) -> None:
        self.path, self.fence = path, fence
        self._handle: int | None = None

    def append(self, record: dict[str, Any]) -> None:
        """Append the metrics of a step: {"step": int, "kind": "sft"|"rollout"|"eval", "time": unix seconds, "<name>": number...}.

        Raises Fenced when a newer attempt exists.
        """
        assert {"step", "kind"} <= set(record), "a line of metrics has a step and a kind"
        self._check()
        if self._handle is None:
            self._take()
        assert self._handle is not None, "taken"
        _append(self._handle, record)

    def cut_back(self, step: float) -> int:
        """Drop the lines after this step (evaluations too; math.inf keeps all), torn ones and those without a step, atomically; returns how many lines went."""
        if not self.path.exists():
            return 0
        lines = [line for line in self.path.read_bytes().split(b"\n") if line]
        kept = [line for line in lines if (record := _parse(line)) is not None and _has_step(record) and record["step"] <= step]
        seal_bytes(self.path, b"".join(line + b"\n" for line in kept), self.fence)
        self.close()
        self._take()
        return len(lines) - len(kept)

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _take(self) -> None:
        if self.fence is not None and not self.path.exists():
            seal_bytes(self.path, b"", self.fence)
        self._handle = _open(self.path)
        self._check()  # what was opened is no newer attempt's: one that begins from here on replaces it

    def _check(self) -> None:
        if self.fence is not None:
            self.fence.check()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, in the order written; a line whose step is no whole number is passed over, as a torn one is."""
    return [line for line in read_lines(path) if _has_step(line)]


def _has_step(record: dict[str, Any]) -> bool:
    return isinstance(record.get("step"), int)


def _open(path: Path) -> int:
    make_folder(path.parent)
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _append(handle: int, record: dict[str, Any]) -> None:
    end = os.fstat(handle).st_size
    line = json.dumps(finite(record), ensure_ascii=False, default=plain).encode("utf-8", "replace") + b"\n"
    if end and os.pread(handle, 1, end - 1) != b"\n":
        line = b"\n" + line
    try:
        while line:
            line = line[os.write(handle, line) :]
    except OSError:
        os.ftruncate(handle, end)
        raise


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def as_float(value: float) -> float:
    """A number of a line: infinite where it is an integer that no float holds."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def finite(value: Any) -> Any:
    """The value as JSON has it: NaN and infinities are None, in objects and lists too."""
    if isinstance(value, dict):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # numpy scalars (and 0-d tensors)
    return None if isinstance(value, float) and not math.isfinite(value) else value
