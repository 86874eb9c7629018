"""torch_dist checkpoints into megatron-core's models. The pickled metadata is read first by an unpickler that refuses all else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from miles.config.exits import UserError
from miles.models.dcp_metadata import METADATA, unpickle_metadata
from miles.models.maps.find import Known
from miles.models.maps.pieces import pieces

# As megatron.training describes its checkpoints: uniform layers in one tensor.
DESCRIBED = {"singleton_local_shards": False}
VERSION = 3.0


def load(model: Any, known: Known, folder: str | Path) -> None:
    """Fill this rank's model from a torch_dist checkpoint (the folder of one iteration), whichever layout wrote it. Collective.

    MTP layers of the checkpoint that the model lacks are passed over, and so is the optimizer's state. UserError for a checkpoint of
    another model.
    """
    from megatron.core import dist_checkpointing

    folder = Path(folder)
    wanted = model.sharded_state_dict(metadata=dict(DESCRIBED))
    _compare(wanted, known, folder)
    loaded = dist_checkpointing.load({"model": wanted}, str(folder))
    version = loaded.get("checkpoint_version")
    if version != VERSION:
        raise UserError(f"{folder}: checkpoint_version is {version!r}, {VERSION} is needed (older ones have another order of queries, keys and values); convert it again")
    model.load_state_dict(loaded["model"])


def _compare(wanted: dict[str, Any], known: Known, folder: Path) -> None:
    if not (folder / METADATA).is_file():
        raise UserError(f"{folder}: no torch_dist checkpoint ({METADATA} is missing); give the folder of one iteration, such as release in what tools/convert/hf_to_torch_dist.py wrote")
    try:
        stored = unpickle_metadata(folder).state_dict_metadata
    except ValueError as error:
        raise UserError(f"{error}; restore the checkpoint from its origin") from None
    held = {key: tuple(entry.size) for key, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
    for key, shape in _tensors(wanted):
        if key not in held:
            raise UserError(f"{folder}: {key} is missing, so it is a checkpoint of another model than {known.config.where} describes")
        if shape is not None and shape != held[key]:
            raise UserError(f"{folder}: {key} is {held[key]}, but {shape} after {known.config.where}")
    mine = {piece.key for piece in pieces(known)}
    stray = next((key for key in held if key not in mine and not key.startswith(("optimizer.", "mtp."))), None)
    if stray is not None:
        raise UserError(f"{folder}: {stray} has no place in the model that {known.config.where} describes")


def _tensors(wanted: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...] | None]]:
    """Names that this rank asks for, with the whole tensor's shape where it must agree."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for item in wanted.values():
        if isinstance(item, ShardedTensor):
            yield item.key, None if item.allow_shape_mismatch else tuple(item.global_shape)
        elif isinstance(item, ShardedTensorFactory):
            yield item.key, None
