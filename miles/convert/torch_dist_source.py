"""A torch_dist checkpoint: windows of any tensor, without unpickling anything but its restricted metadata.

Each tensor chunk is a torch.save archive inside a .distcp file. Its bytes lie uncompressed, so a window is read straight out of the file,
whatever the chunk's size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from miles.config.exits import UserError
from miles.convert.archive import Described, NoArchive, describe
from miles.convert.mapped import OpenFiles, ReadFile
from miles.models.dcp_metadata import METADATA, unpickle_metadata

TRACKER = "latest_checkpointed_iteration.txt"


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


def is_model(key: str) -> bool:
    """Whether a tensor is a weight of the model, not optimizer state and the like."""
    return key.split(".")[0] in ("embedding", "decoder", "output_layer", "mtp")


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
        self._files = OpenFiles()
        self._described = functools.lru_cache(maxsize=1024)(self._describe)
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
            file, dtype = self._files[self.folder / chunk.file], self.dtypes[key]
            window = tuple(slice(a - o, b - o) for a, b, o in zip(first, last, chunk.offsets, strict=True))
            target = out[tuple(slice(a - o, b - o) for a, b, o in zip(first[leading:], last[leading:], start[leading:], strict=True))]
            _copy(file, self._described(chunk, dtype), window, target, dtype)
            covered += target.numel()
        if covered != out.numel():
            raise UserError(f"{self.folder}: {key} is not whole ({covered} of {out.numel()} numbers at {list(start)}); restore the checkpoint from its origin")

    def _describe(self, chunk: Chunk, dtype: torch.dtype) -> Described:
        file = self._files[self.folder / chunk.file]
        try:
            found = describe(file.map, chunk.offset, chunk.length, dtype)
        except NoArchive:
            raise UserError(f"{file.path}: what lies at byte {chunk.offset} is no tensor as torch saves it; restore it from its origin") from None
        if found.size != chunk.sizes:
            raise UserError(f"{file.path}: the tensor at byte {chunk.offset} has the shape {list(found.size)}, not {list(chunk.sizes)}; restore it from its origin")
        return found


def _copy(file: ReadFile, found: Described, window: tuple[slice, ...], target: Tensor, dtype: torch.dtype) -> None:
    """Fill `target` with a window of a stored tensor."""
    first = sum(part.start * stride for part, stride in zip(window, found.stride, strict=True))
    size = tuple(part.stop - part.start for part in window)
    at = found.at + first * dtype.itemsize
    if target.dtype == dtype and target.is_contiguous() and _contiguous(size, found.stride):
        file.read(at, target)
    else:
        reach = sum((n - 1) * s for n, s in zip(size, found.stride, strict=True)) + 1
        target.copy_(file.view(dtype, at, reach).as_strided(size, found.stride).reshape(target.shape))


def _contiguous(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    wanted = 1
    for n, step in zip(reversed(size), reversed(stride), strict=True):
        if n > 1 and step != wanted:
            return False
        wanted *= n
    return True
