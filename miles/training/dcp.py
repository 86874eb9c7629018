"""Tensors through torch.distributed.checkpoint, read back without trusting its pickle.

A distributed checkpoint has one pickled file, `.metadata`. It is read here through an unpickler that knows the few classes such
metadata is made of and refuses everything else. Tensors are read by torch.load(weights_only=True); opaque byte entries, which torch
would unpickle freely, are neither written nor read.
"""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from miles.data.store.files import Damaged

METADATA = ".metadata"
_DTYPES = {str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)}
_CLASSES = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "torch": {"Size"} | _DTYPES,
    "torch.serialization": {"_get_layout"},  # a look-up in a fixed table
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")
        return super().find_class(module, name)


def read_metadata(folder: Path) -> Metadata:
    """The metadata of a distributed checkpoint. Damaged for what it may not contain, and for what is no metadata."""
    path = Path(folder) / METADATA
    content = path.read_bytes()
    try:
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # whatever a broken pickle raises, the file is not what was sealed
        raise Damaged(f"{path}: refused ({type(error).__name__}: {error})") from None
    if not isinstance(metadata, Metadata):
        raise Damaged(f"{path}: refused (a {type(metadata).__name__} in place of the metadata)")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise Damaged(f"{path}: refused (entry {name!r} is no tensor)")
    for info in (metadata.storage_data or {}).values():
        place = PurePosixPath(info.relative_path)
        if place.is_absolute() or ".." in place.parts:
            raise Damaged(f"{path}: refused (it points to {info.relative_path}, outside the checkpoint)")
    return metadata


class SafeReader(FileSystemReader):
    """torch's reader, with the metadata read by read_metadata."""

    def read_metadata(self) -> Metadata:  # no per-rank metadata: a missing file is an error, not a cue to try others
        metadata = read_metadata(Path(self.path))
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        assert metadata.storage_meta is not None, "just set"
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _TensorsOnly(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise Damaged(f"entry {read_item.dest_index.fqn!r} is no tensor")


def save_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors (DTensors by shards, plain ones once) under their names. Collective. Files are synced to disk."""
    assert all(isinstance(value, Tensor) for value in tensors.values()), "tensors only: anything else would be pickled"
    dcp.save(tensors, storage_writer=FileSystemWriter(folder, sync_files=True, overwrite=False))


def load_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill these tensors in place from a checkpoint that any number of ranks wrote. Every rank reads only what it holds.

    Raises Damaged naming the entry where names, shapes or dtypes differ.
    """
    metadata = read_metadata(folder)
    found = metadata.state_dict_metadata
    for name in sorted(set(tensors) | set(found)):
        if name not in found:
            raise Damaged(f"{folder}: {name} is missing; this checkpoint is of another model or optimizer")
        if name not in tensors:
            raise Damaged(f"{folder}: {name} is not part of this model or optimizer")
        entry = found[name]
        assert isinstance(entry, TensorStorageMetadata), "read_metadata lets nothing else through"
        if tuple(entry.size) != tuple(tensors[name].shape) or entry.properties.dtype != tensors[name].dtype:
            raise Damaged(
                f"{folder}: {name} is {entry.properties.dtype} {list(entry.size)}, "
                f"this model's is {tensors[name].dtype} {list(tensors[name].shape)}"
            )
    # Without collectives: torch's would exchange pickled plans, and every rank can make its own.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(dict(tensors), storage_reader=SafeReader(folder), planner=_TensorsOnly(), no_dist=True)
