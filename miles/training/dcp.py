"""Tensors through torch.distributed.checkpoint, read back without trusting its pickle.

Its one pickled file is read by miles.models.dcp_metadata, which refuses all but metadata. Tensors are read by
torch.load(weights_only=True); opaque byte entries, which torch would unpickle freely, are neither written nor read.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from miles.data.store.files import Damaged
from miles.models.dcp_metadata import METADATA, unpickle_metadata


def read_metadata(folder: Path) -> Metadata:
    """The metadata of a distributed checkpoint. Damaged for what it may not contain, and for what is no metadata."""
    try:
        metadata = unpickle_metadata(folder)
    except ValueError as error:
        raise Damaged(str(error)) from None
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise Damaged(f"{Path(folder) / METADATA}: refused (entry {name!r} is no tensor)")
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
