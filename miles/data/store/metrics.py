"""metrics.jsonl: one JSON object a line, cut back to the checkpoint on resume, so that a step is told once."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from miles.data.store.epoch import Fence
from miles.data.store.files import make_folder, plain, seal_bytes


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line and flush it to the kernel, in one write. After a torn last line it begins a new one.

    NaN and infinities become null: JSON has none. Disk full: the file stays as it was, and the OSError passes.
    """
    make_folder(path.parent)
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        end = os.fstat(handle).st_size
        line = json.dumps(_finite(record), ensure_ascii=False, default=plain).encode("utf-8", "replace") + b"\n"
        if end and os.pread(handle, 1, end - 1) != b"\n":
            line = b"\n" + line
        try:
            while line:
                line = line[os.write(handle, line) :]
        except OSError:
            os.ftruncate(handle, end)
            raise
    finally:
        os.close(handle)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines; torn ones (of a killed writer) are passed over. Null becomes NaN. No file: no lines."""
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().split(b"\n"):
        record = _parse(line)
        if record is not None:
            found.append({key: math.nan if value is None else value for key, value in record.items()})
    return found


def append_metrics(path: Path, record: dict[str, Any], fence: Fence | None = None) -> None:
    """Append the metrics of a step: {"step": int, "kind": "sft"|"rollout"|"eval", "time": unix seconds, "<name>": number...}."""
    assert {"step", "kind"} <= set(record), "a line of metrics has a step and a kind"
    if fence is not None:
        fence.check()
    append_line(path, record)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, in the order written."""
    return read_lines(path)


def cut_back(path: Path, step: int, fence: Fence | None = None) -> int:
    """Drop the lines after this step (evaluations too) and torn ones, atomically; returns how many lines went."""
    if not path.exists():
        return 0
    lines = [line for line in path.read_bytes().split(b"\n") if line]
    kept = [line for line in lines if (record := _parse(line)) is not None and int(record.get("step", 0)) <= step]
    if len(kept) < len(lines):
        seal_bytes(path, b"".join(line + b"\n" for line in kept), fence)
    return len(lines) - len(kept)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # numpy scalars (and 0-d tensors)
    return None if isinstance(value, float) and not math.isfinite(value) else value
