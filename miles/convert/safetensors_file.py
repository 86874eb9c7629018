"""The header of a safetensors file, read and written: names, dtypes, shapes, and where the bytes lie."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from miles.config.exits import UserError

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_BYTES = 100_000_000  # safetensors' own limit
ALIGN = 64
Wanted = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: file, first byte, dtype as stored, shape."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return size_of((self.dtype, self.shape))


def size_of(tensor: Wanted) -> int:
    """Bytes of a tensor of that dtype and shape."""
    dtype, shape = tensor
    return dtype.itemsize * int(torch.Size(shape).numel())


def widest_first(tensors: Mapping[str, Wanted]) -> list[str]:
    """The order of a file's tensors in which each begins at a multiple of its numbers' size."""
    return sorted(tensors, key=lambda name: -tensors[name][0].itemsize)


def header(tensors: Mapping[str, Wanted]) -> bytes:
    """A file's first bytes, a multiple of ALIGN; the tensors follow in this order without gaps."""
    told: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        size = size_of((dtype, shape))
        told[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    return struct.pack("<Q", len(text)) + text


def index(where: Mapping[str, str], size: int) -> bytes:
    """The content of INDEX. where: the file of each tensor; size: bytes of all."""
    return json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}, indent=2).encode() + b"\n"


def read_header(file: Path) -> dict[str, Stored]:
    """Tensors of a safetensors file. UserError for a truncated one, and for one whose header does not describe the bytes."""
    wrong = UserError(f"{file}: truncated or no safetensors file; restore it from its origin")
    size = file.stat().st_size
    with file.open("rb") as opened:
        first = opened.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= length <= min(HEADER_BYTES, size - 8):
            raise wrong
        try:
            told = json.loads(opened.read(length))
        except ValueError:
            raise wrong from None
    if not isinstance(told, dict):
        raise wrong
    found = {}
    for name, about in told.items():
        if name == "__metadata__":
            continue
        try:
            stored = _stored(file, 8 + length, about)
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{file}: its header says of {name} what is no tensor; restore it from its origin") from None
        if stored.offset + stored.bytes > size:
            raise UserError(f"{file}: truncated ({name} ends at byte {stored.offset + stored.bytes}, the file at {size}); restore it from its origin")
        found[name] = stored
    return found


def _stored(file: Path, base: int, about: dict[str, Any]) -> Stored:
    begin, end = about["data_offsets"]
    stored = Stored(file, base + begin, DTYPES[about["dtype"]], tuple(about["shape"]))
    if begin < 0 or any(size < 0 for size in stored.shape) or end - begin != stored.bytes:
        raise ValueError("offsets and shape disagree")
    return stored
