"""One tensor as torch.save writes it: the archives that .distcp files are made of, written around bytes and read without unpickling them.

Such an archive is a zip file of uncompressed members: data.pkl describes the tensor, data/0 holds its bytes, the directory comes last.
"""

from __future__ import annotations

import io
import mmap
import pickle
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2

ALIGN = 64  # where torch puts a storage in its archive
_STORAGES: dict[str, torch.dtype] = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _STORAGES.items()}
_LOCAL, _CENTRAL, _END = struct.Struct("<4s5H3L2H"), struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s4H2LH")
_LARGEST = 1 << 31  # a longer archive would need zip64's headers


@dataclass(frozen=True)
class Described:
    """A tensor of an archive: its first number lies at byte `at` of the file."""

    at: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class NoArchive(ValueError):
    """Not as torch saves a tensor."""


def frame(dtype: torch.dtype, size: tuple[int, ...]) -> tuple[bytes, bytes]:
    """What comes before and after the bytes of a contiguous tensor; the first part's length is a multiple of ALIGN.

    Checksums of the members are left out, as torch.serialization.set_crc32_options(False) leaves them out: torch does not read them.
    """
    count = int(torch.Size(size).numel())
    length = count * dtype.itemsize
    assert length < _LARGEST, "chunks are much shorter"
    head, listed = b"", []
    for name, content, amount in (("data.pkl", _description(dtype, size, count), 0), ("byteorder", b"little", 0), ("version", b"3\n", 0), ("data/0", b"", length)):
        path = f"archive/{name}".encode()
        amount, offset = amount or len(content), len(head)
        pad = -(offset + _LOCAL.size + len(path) + 4) % ALIGN if name == "data/0" else -4
        extra = b"FB" + struct.pack("<H", pad) + b"Z" * pad if pad >= 0 else b""
        head += _LOCAL.pack(b"PK\3\4", 0, 0, 0, 0, 0, 0, amount, amount, len(path), len(extra)) + path + extra + content
        listed.append(_CENTRAL.pack(b"PK\1\2", 0, 0, 0, 0, 0, 0, 0, amount, amount, len(path), 0, 0, 0, 0, 0, offset) + path)
    return head, b"".join(listed) + _END.pack(b"PK\5\6", 0, 0, len(listed), len(listed), sum(map(len, listed)), len(head) + length, 0)


def describe(mapped: mmap.mmap, offset: int, length: int, dtype: torch.dtype) -> Described:
    """The tensor in the `length` bytes from `offset` on. NoArchive for anything but a plain tensor of this dtype whose bytes are all there."""
    try:
        archive = zipfile.ZipFile(_Slice(mapped, offset, length))
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        begin, count = _member(mapped, offset, length, members["data.pkl"])
        (stored, name), first, size, stride = _TensorUnpickler(io.BytesIO(mapped[begin : begin + count])).load()
        at, count = _member(mapped, offset, length, members[f"data/{name}"])
        reach = first + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1 if all(size) else 0
    except (KeyError, ValueError, TypeError, IndexError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile, EOFError) as error:
        raise NoArchive(str(error)) from None
    if stored != dtype or first < 0 or min(stride, default=0) < 0 or reach * dtype.itemsize > count:
        raise NoArchive(f"{stored} {size}")
    return Described(at + first * dtype.itemsize, size, stride)


class _Storage:
    """Stands for a tensor's bytes while the tensor is described."""


class _Tensor:
    def __init__(self, size: tuple[int, ...]) -> None:
        self.size = size

    def __reduce__(self) -> Any:
        stride = tuple(int(torch.Size(self.size[i + 1 :]).numel()) for i in range(len(self.size)))
        return _rebuild_tensor_v2, (_Storage(), 0, self.size, stride, False, OrderedDict())


class _TensorPickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, dtype: torch.dtype, count: int) -> None:
        super().__init__(file, protocol=2)
        self._told = ("storage", getattr(torch, _NAMES[dtype]), "0", "cpu", count)

    def persistent_id(self, found: Any) -> Any:
        return self._told if isinstance(found, _Storage) else None


def _description(dtype: torch.dtype, size: tuple[int, ...], count: int) -> bytes:
    file = io.BytesIO()
    _TensorPickler(file, dtype, count).dump(_Tensor(size))
    return file.getvalue()


def _member(mapped: mmap.mmap, offset: int, length: int, info: zipfile.ZipInfo) -> tuple[int, int]:
    """(first byte in the file, bytes) of an uncompressed member."""
    header = offset + info.header_offset
    signature, name, extra = struct.unpack("<4s22x2H", mapped[header : header + 30])
    begin = header + 30 + name + extra
    if signature != b"PK\x03\x04" or info.compress_type != zipfile.ZIP_STORED or begin + info.file_size > offset + length:
        raise zipfile.BadZipFile
    return begin, info.file_size


class _Slice(io.RawIOBase):
    """A part of a map as a file."""

    def __init__(self, mapped: mmap.mmap, offset: int, length: int) -> None:
        self.mapped, self.offset, self.length, self.at = mapped, offset, length, 0

    def seekable(self) -> bool:
        return True

    def seek(self, to: int, whence: int = 0) -> int:
        self.at = max(0, to + (0, self.at, self.length)[whence])
        return self.at

    def tell(self) -> int:
        return self.at

    def read(self, count: int = -1) -> bytes:
        end = self.length if count is None or count < 0 else min(self.length, self.at + count)
        found = self.mapped[self.offset + self.at : self.offset + end] if end > self.at else b""
        self.at += len(found)
        return found


class _TensorUnpickler(pickle.Unpickler):
    """Of one plain tensor's description: gives (dtype, storage name), offset, size, stride and touches nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *rest: (storage, offset, tuple(size), tuple(stride))
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a tensor's description")

    def persistent_load(self, found: Any) -> Any:
        kind, dtype, name, _device, _count = found
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("no storage")
        return dtype, str(name)
