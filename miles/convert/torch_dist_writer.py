"""What makes a folder of .distcp files a checkpoint that megatron-core loads, without a model: archives, metadata, tracker."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from miles.convert.archive import ALIGN, frame
from miles.convert.durable import write_durable
from miles.convert.output import Output
from miles.convert.torch_dist_source import TRACKER
from miles.models.dcp_metadata import METADATA

COMMON = "common_state/shard_0_1"
COMMON_STATE = {"checkpoint_version": 3.0, "iteration": 0}


def begin_tensor(file: Output, dtype: torch.dtype, size: tuple[int, ...]) -> tuple[int, bytes]:
    """What comes before a tensor's bytes, so that the caller appends them and then the tail; (the archive's first byte, tail)."""
    head, tail = frame(dtype, size)
    file.align(ALIGN)
    begin = file.tell()
    file.write(head)
    return begin, tail


def write_object(file: Output, item: Any) -> tuple[int, int]:
    """Append an object as megatron-core wants it: a list of one. (first byte, bytes)."""
    buffer = io.BytesIO()
    torch.save([item], buffer)
    begin = file.tell()
    file.write(buffer.getvalue())
    return begin, file.tell() - begin


def write_metadata(folder: Path, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype], chunks: list[Any], objects: list[Any]) -> None:
    """The checkpoint's metadata. chunks: [key, offsets, sizes, file, offset, bytes]; objects: [key, file, offset, bytes]."""
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    parts: dict[str, list[ChunkStorageMetadata]] = {}
    for key, offsets, sizes, file, at, length in chunks:
        place = torch.Size(offsets)
        places[MetadataIndex(key, place, len(parts.setdefault(key, [])))] = _StorageInfo(file, at, length)
        parts[key].append(ChunkStorageMetadata(place, torch.Size(sizes)))
    for key, shape in shapes.items():
        entries[key] = TensorStorageMetadata(TensorProperties(dtype=dtypes[key]), torch.Size(shape), parts[key])
    for key, file, at, length in objects:
        entries[key] = BytesStorageMetadata()
        places[MetadataIndex(key)] = _StorageInfo(file, at, length)
    write_durable(folder / METADATA, pickle.dumps(Metadata(entries, planner_data={}, storage_data=places)))
    write_durable(folder / "metadata.json", json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}).encode())


def write_tracker(root: Path) -> None:
    """Last of all: from now on the folder is a checkpoint."""
    write_durable(root / TRACKER, b"release\n")
