"""A Hugging Face folder of safetensors: rows of any tensor, FP8 blocks dequantised on the way."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from miles.config.exits import UserError
from miles.config.json_file import read_object
from miles.convert.mapped import OpenFiles
from miles.convert.safetensors_file import INDEX, Stored, read_header
from miles.precision.fp8_blocks import SCALE, dequantize_rows, scales_shape

WEIGHTS, FP8 = (torch.bfloat16, torch.float16, torch.float32), torch.float8_e4m3fn


class HfSource:
    """Named tensors of a folder. UserError, one line, for whatever makes the folder no whole checkpoint."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.stored: dict[str, Stored] = {}
        index = self.folder / INDEX
        listed: dict[str, str] = {}
        if index.is_file():
            listed = self._weight_map(index)
            files = sorted({self._inside(name) for name in listed.values()})
        else:
            files = sorted(set(self.folder.glob("*.safetensors")) | set(self._numbered()))
        missing = [file.name for file in files if not file.is_file()]
        if not files or missing:
            raise UserError(f"{self.folder}: no complete safetensors weights (missing: {', '.join(missing) or 'model.safetensors'}); restore them from their origin")
        for file in files:
            for name, stored in read_header(file).items():
                if name in self.stored and name not in listed:
                    raise UserError(f"{self.folder}: {name} is both in {self.stored[name].file.name} and in {file.name}; remove the one that is not the model's")
                if listed.get(name, file.name) == file.name:
                    self.stored[name] = stored
        absent = sorted(set(listed) - set(self.stored))
        if absent:
            raise UserError(f"{index}: names {absent[0]}, which {listed[absent[0]]} does not hold ({len(absent)} such); restore the folder from its origin")
        self._files = OpenFiles()

    def _numbered(self) -> Iterator[Path]:
        """The files that the names of others tell of: all N where one is called …-00001-of-0000N."""
        for file in self.folder.glob("*-of-*.safetensors"):
            if match := re.fullmatch(r"(.+)-\d{5}-of-(\d{5})", file.stem):
                yield from (self.folder / f"{match[1]}-{i + 1:05d}-of-{match[2]}.safetensors" for i in range(int(match[2])))

    def _weight_map(self, index: Path) -> dict[str, str]:
        found = read_object(index).get("weight_map")
        if not isinstance(found, dict):
            raise UserError(f"{index}: has no weight_map; restore it from the checkpoint's origin")
        return found

    def _inside(self, name: object) -> Path:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{self.folder / INDEX}: names the file {name!r}, which is not beside it; restore it from the checkpoint's origin")
        return self.folder / name

    @property
    def bytes(self) -> int:
        return sum(stored.bytes for stored in self.stored.values())

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: stored.shape for name, stored in self.stored.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        return self.stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that the tensor's values are given out in: bfloat16 for FP8 blocks."""
        return torch.bfloat16 if self.quantised(name) else self.stored[name].dtype

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows of a tensor as stored, without a copy; the storage holds these rows alone. Must not be written to."""
        stored = self.stored[name]
        count = (last - first) * _width(stored)
        if not count:
            return torch.empty((last - first, *stored.shape[1:]), dtype=stored.dtype)
        flat = self._files[stored.file].view(stored.dtype, _at(stored, first), count)
        return flat.view(last - first, *stored.shape[1:])

    def read(self, name: str, first: int, last: int, out: Tensor) -> None:
        """Fill `out`, contiguous, with rows of a tensor: dequantised, converted to its dtype."""
        stored = self.stored[name]
        same = stored.dtype == out.dtype
        raw = out if same else torch.empty((last - first, *stored.shape[1:]), dtype=stored.dtype)
        if raw.numel():
            self._files[stored.file].read(_at(stored, first), raw)
        if self.quantised(name) and not same:
            dequantize_rows(raw, self.scales(name), first, out)
        elif not same:
            out.copy_(raw)

    def read_flat(self, name: str, first: int, out: Tensor) -> None:
        """Fill `out` [n] with numbers of a tensor as stored, in their order, from number `first` on."""
        stored = self.stored[name]
        self._files[stored.file].read(stored.offset + first * stored.dtype.itemsize, out)

    def values(self, name: str, first: int, last: int) -> Tensor:
        """Rows of a tensor, dequantised where they are FP8 with block scales."""
        found = self.rows(name, first, last)
        if found.dtype != FP8:
            return found
        out = torch.empty(found.shape, dtype=torch.bfloat16)
        dequantize_rows(found, self.scales(name), first, out)
        return out

    def quantised(self, name: str) -> bool:
        """Whether a tensor is FP8, so that it has scales."""
        return self.stored[name].dtype == FP8

    def check(self, name: str) -> None:
        """UserError where a tensor holds no floating-point numbers, or is FP8 without the scales of its blocks."""
        if self.quantised(name):
            self.scales(name)
        elif self.stored[name].dtype not in WEIGHTS:
            raise UserError(f"{self.folder}: {name} is {_word(self.stored[name].dtype)}, which holds no weights that are known; known: {', '.join(map(_word, (*WEIGHTS, FP8)))}")

    def scales(self, name: str) -> Tensor:
        """Of an FP8 matrix, one for each block. UserError where they are missing, not as many, or no floating-point numbers."""
        scales, wanted = f"{name}{SCALE}", scales_shape(self.shape(name))
        if scales not in self.stored:
            raise UserError(f"{self.folder}: {name} is FP8, its scales {scales} are missing; restore the folder from its origin")
        if len(wanted) != 2 or self.shape(scales) != wanted:
            raise UserError(f"{self.folder}: {scales} has the shape {list(self.shape(scales))}, the blocks of {name} need {list(wanted)}; restore the folder from its origin")
        if self.stored[scales].dtype not in (*WEIGHTS, torch.float8_e8m0fnu):
            raise UserError(f"{self.folder}: {scales} is {_word(self.stored[scales].dtype)}, scales are float32, bfloat16 or float8_e8m0fnu; restore the folder from its origin")
        return self.rows(scales, 0, self.shape(scales)[0])


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _width(stored: Stored) -> int:
    return int(torch.Size(stored.shape[1:]).numel())


def _at(stored: Stored, row: int) -> int:
    return stored.offset + row * _width(stored) * stored.dtype.itemsize
