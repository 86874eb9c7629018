"""A Hugging Face folder of safetensors, mapped into memory: windows of tensors are copied out, FP8 blocks dequantised on the way."""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles.config.exits import UserError
from miles.convert.mapped import map_file, tensor_on
from miles.models.maps.find import read_json
from miles.precision.fp8_blocks import SCALE, dequantize_rows

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_BYTES = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: file, first byte, dtype as stored, shape."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * _numel(self.shape)


class HfSource:
    """Named tensors of a folder. UserError, one line, for whatever makes the folder no whole checkpoint."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.stored: dict[str, Stored] = {}
        index = self.folder / INDEX
        listed: dict[str, str] = {}
        if index.is_file():
            listed = read_json(index).get("weight_map", {})
            files = sorted({self._inside(name) for name in listed.values()})
        else:
            files = sorted(self.folder.glob("*.safetensors"))
        missing = [file.name for file in files if not file.is_file()]
        if not files or missing:
            raise UserError(f"{self.folder}: no complete safetensors weights (missing: {', '.join(missing) or 'model.safetensors'}); restore them from their origin")
        for file in files:
            self.stored |= read_header(file)
        absent = sorted(set(listed) - set(self.stored))
        if absent:
            raise UserError(f"{index}: names {absent[0]}, which {listed[absent[0]]} does not hold ({len(absent)} such); restore the folder from its origin")
        self._maps: dict[Path, mmap.mmap] = {}

    def _inside(self, name: object) -> Path:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{self.folder / INDEX}: names the file {name!r}, which is not beside it; restore it from the checkpoint's origin")
        return self.folder / name

    @property
    def bytes(self) -> int:
        return sum(stored.bytes for stored in self.stored.values())

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def shape(self, name: str) -> tuple[int, ...]:
        return self.stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that the tensor's values are given out in: bfloat16 for FP8 blocks."""
        found = self.stored[name].dtype
        return torch.bfloat16 if found == torch.float8_e4m3fn else found

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows of a tensor as stored, without a copy; the storage holds these rows alone. Must not be written to."""
        stored = self.stored[name]
        width = _numel(stored.shape[1:])
        count = (last - first) * width
        if not count:
            return torch.empty((last - first, *stored.shape[1:]), dtype=stored.dtype)
        flat = tensor_on(self._map(stored.file), stored.dtype, stored.offset + first * width * stored.dtype.itemsize, count)
        return flat.view(last - first, *stored.shape[1:])

    def values(self, name: str, first: int, last: int) -> Tensor:
        """Rows of a tensor, dequantised where they are FP8 with block scales."""
        found = self.rows(name, first, last)
        if found.dtype != torch.float8_e4m3fn:
            return found
        scales = f"{name}{SCALE}"
        if scales not in self.stored:
            raise UserError(f"{self.folder}: {name} is FP8, its scales {scales} are missing; restore the folder from its origin")
        return dequantize_rows(found, self.rows(scales, 0, self.shape(scales)[0]), first)

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            self._maps[file] = map_file(file)
        return self._maps[file]


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
            header = json.loads(opened.read(length))
        except ValueError:
            raise wrong from None
    found = {}
    for name, about in header.items():
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


def _numel(shape: Iterable[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
