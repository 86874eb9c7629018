"""The one pickled file of a distributed checkpoint, `.metadata`, read through an unpickler that refuses all but what such metadata is made of."""

from __future__ import annotations

import io
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

METADATA = ".metadata"
_DTYPES = {str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)}
_CLASSES = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "torch": {"Size"} | _DTYPES,
    "torch.serialization": {"_get_layout"},  # a look-up in a fixed table
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    # megatron-core keeps what each rank wrote beside the metadata
    "torch.distributed.checkpoint.planner": {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
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


def unpickle_metadata(folder: str | Path) -> Metadata:
    """The metadata of a distributed checkpoint. ValueError (one line) for what it may not contain, for what is no metadata, and for
    entries that lie outside the folder; OSError where the file can't be read."""
    path = Path(folder) / METADATA
    content = path.read_bytes()
    try:
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # whatever a broken pickle raises, the file is not what was written
        raise ValueError(f"{path}: refused ({type(error).__name__}: {error})") from None
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{path}: refused (a {type(metadata).__name__} in place of the metadata)")
    for info in (metadata.storage_data or {}).values():
        place = PurePosixPath(info.relative_path)
        if place.is_absolute() or ".." in place.parts:
            raise ValueError(f"{path}: refused (it points to {info.relative_path}, outside the checkpoint)")
    return metadata
