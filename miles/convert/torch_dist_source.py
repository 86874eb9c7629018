"""A torch_dist checkpoint, mapped into memory and read without unpickling anything but its restricted metadata.

Each tensor chunk is a torch.save archive inside a .distcp file. Its bytes lie uncompressed, so a window is copied straight out of the map
whatever the chunk's size; the archive's description of the tensor is read by an unpickler that knows plain tensors only.
"""

from __future__ import annotations

import functools
import io
import mmap
import pickle
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from miles.config.exits import UserError
from miles.convert.mapped import map_file, tensor_on
from miles.models.dcp_metadata import METADATA, unpickle_metadata

TRACKER = "latest_checkpointed_iteration.txt"
_STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor: its place and size, and the archive that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    length: int


def checkpoint_folder(folder: str | Path) -> Path:
    """The folder that holds .metadata: the one given, or the one that its tracker file names. UserError for neither."""
    folder = Path(folder)
    if (folder / METADATA).is_file():
        return folder
    tracker = folder / TRACKER
    if not tracker.is_file():
        raise UserError(f"{folder}: no torch_dist checkpoint ({METADATA} and {TRACKER} are missing); give a whole one, an unfinished conversion has neither")
    said = tracker.read_text(errors="replace").strip()
    found = folder / (said if said == "release" else f"iter_{int(said):07d}" if said.isdigit() else "")
    if found == folder or not (found / METADATA).is_file():
        raise UserError(f"{tracker}: says {said[:40]!r}, which is no checkpoint here; correct the number, or give the checkpoint's own folder")
    return found


class TorchDistSource:
    """Tensors by their Megatron names. UserError, one line, for a checkpoint that is not whole."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = checkpoint_folder(folder)
        try:
            metadata = unpickle_metadata(self.folder)
        except ValueError as error:
            raise UserError(f"{error}; restore the checkpoint from its origin") from None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.objects: list[str] = []
        self._parts: dict[str, dict[tuple[int, ...], list[Chunk]]] = {}
        self._maps: dict[str, mmap.mmap] = {}
        places = {(index.fqn, tuple(index.offset or ())): info for index, info in (metadata.storage_data or {}).items()}
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, BytesStorageMetadata):
                self.objects.append(key)
            elif isinstance(entry, TensorStorageMetadata):
                self._add(key, entry, places)
        self._check_files()

    def _add(self, key: str, entry: TensorStorageMetadata, places: dict[Any, Any]) -> None:
        self.shapes[key], self.dtypes[key] = tuple(entry.size), entry.properties.dtype
        parts = self._parts.setdefault(key, {})
        leading = max(0, len(entry.size) - 2)
        for chunk in entry.chunks:
            place = places.get((key, tuple(chunk.offsets)))
            if place is None:
                raise UserError(f"{self.folder / METADATA}: no place for a part of {key}; restore the checkpoint from its origin")
            if getattr(place, "transform_descriptors", None):
                raise UserError(f"{self.folder}: {key} is stored compressed ({place.transform_descriptors}), which is not supported; save it without")
            narrow = all(size == 1 for size in chunk.sizes[:leading])
            where = tuple(chunk.offsets[:leading]) if narrow else ()
            parts.setdefault(where, []).append(Chunk(tuple(chunk.offsets), tuple(chunk.sizes), place.relative_path, place.offset, place.length))

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for chunk in (chunk for parts in self._parts.values() for chunks in parts.values() for chunk in chunks):
            ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.offset + chunk.length)
        for name, end in sorted(ends.items()):
            file = self.folder / name
            size = file.stat().st_size if file.is_file() else -1
            if size < end:
                raise UserError(f"{file}: {'missing' if size < 0 else f'truncated ({size} of at least {end} bytes)'}; restore it from its origin")

    def __contains__(self, key: str) -> bool:
        return key in self.shapes

    def files(self) -> dict[str, int]:
        """Files with tensors in them, and how many chunks each has."""
        count: dict[str, int] = {}
        for chunk in (chunk for parts in self._parts.values() for chunks in parts.values() for chunk in chunks):
            count[chunk.file] = count.get(chunk.file, 0) + 1
        return count

    def chunks(self, key: str) -> list[Chunk]:
        """All parts of a tensor."""
        return [chunk for chunks in self._parts[key].values() for chunk in chunks]

    def copy(self, key: str, start: tuple[int, ...], out: Tensor) -> None:
        """Fill `out` (a view will do) with the window of tensor `key` at `start`; out's axes are the tensor's last ones, the leading are single."""
        shape, leading = self.shapes[key], len(start) - out.dim()
        size = (1,) * leading + tuple(out.shape)
        parts = self._parts[key]
        buckets = max(0, len(shape) - 2)
        candidates = [*parts.get(start[:buckets], []), *(parts.get((), []) if buckets else [])] if leading >= buckets else self.chunks(key)
        covered = 0
        for chunk in candidates:
            first = tuple(max(a, b) for a, b in zip(start, chunk.offsets, strict=True))
            last = tuple(min(a + n, b + m) for a, n, b, m in zip(start, size, chunk.offsets, chunk.sizes, strict=True))
            if any(a >= b for a, b in zip(first, last, strict=True)):
                continue
            source = self._view(chunk, self.dtypes[key])[tuple(slice(a - o, b - o) for a, b, o in zip(first, last, chunk.offsets, strict=True))]
            target = out[tuple(slice(a - o, b - o) for a, b, o in zip(first[leading:], last[leading:], start[leading:], strict=True))]
            target.copy_(source.reshape(target.shape))
            covered += target.numel()
        if covered != out.numel():
            raise UserError(f"{self.folder}: {key} is not whole ({covered} of {out.numel()} numbers at {list(start)}); restore the checkpoint from its origin")

    def _view(self, chunk: Chunk, dtype: torch.dtype) -> Tensor:
        return _describe(self._map(chunk.file), chunk, dtype, str(self.folder / chunk.file))

    def _map(self, name: str) -> mmap.mmap:
        if name not in self._maps:
            self._maps[name] = map_file(self.folder / name)
        return self._maps[name]


@functools.lru_cache(maxsize=1024)
def _describe(mapped: mmap.mmap, chunk: Chunk, dtype: torch.dtype, where: str) -> Tensor:
    """The chunk's tensor, on the map's own bytes."""
    refused = UserError(f"{where}: what lies at byte {chunk.offset} is no tensor as torch saves it; restore it from its origin")
    try:
        archive = zipfile.ZipFile(_Slice(mapped, chunk.offset, chunk.length))
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        described = _content(mapped, chunk, entries["data.pkl"])
        storage, offset, size, stride = _TensorUnpickler(io.BytesIO(mapped[described[0] : described[0] + described[1]])).load()
        at, length = _content(mapped, chunk, entries[f"data/{storage[1]}"])
    except (KeyError, ValueError, TypeError, IndexError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile, EOFError):
        raise refused from None
    reach = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1 if all(size) else 0
    if tuple(size) != chunk.sizes or storage[0] != dtype or offset < 0 or min(stride, default=0) < 0 or reach * dtype.itemsize > length:
        raise refused
    if not reach:
        return torch.empty(size, dtype=dtype)
    flat = tensor_on(mapped, dtype, at, length // dtype.itemsize)
    return flat.as_strided(size, stride, offset)


def _content(mapped: mmap.mmap, chunk: Chunk, info: zipfile.ZipInfo) -> tuple[int, int]:
    """(first byte in the file, bytes) of an uncompressed member."""
    header = chunk.offset + info.header_offset
    signature, name, extra = struct.unpack("<4s22x2H", mapped[header : header + 30])
    begin = header + 30 + name + extra
    if signature != b"PK\x03\x04" or info.compress_type != zipfile.ZIP_STORED or begin + info.file_size > chunk.offset + chunk.length:
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
