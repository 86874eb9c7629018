"""The transport contract: how the trainer's weights reach the engines, and the one way to drive it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from miles.training.contract import Bucket, Trainer

BUCKET_BYTES = 512 << 20


class SyncError(RuntimeError):
    """An engine does not hold the trainer's weights, or could not take them. The message names the engine."""


class Transport(Protocol):
    """Rank 0 acts; engines stay paused from begin (tensor) or end (disk) until verify has found the right weights everywhere."""

    bucket_bytes: int

    def begin(self, version: int, trainer: Trainer) -> None:
        """Prepare to send the weights that will be called `version`."""
        ...

    def send(self, buckets: Iterator[Bucket]) -> None:
        """Take all buckets, each (Hugging Face name, tensor on the CPU) pairs; none is kept."""
        ...

    def end(self) -> None:
        """All engines have loaded the weights when this returns. Raises SyncError."""
        ...

    def verify(self, checksum: str) -> None:
        """Raise SyncError by name unless every engine holds weights of this checksum; then generation goes on."""
        ...


def push(transport: Transport, trainer: Trainer, version: int) -> str:
    """Send the trainer's weights to the engines and verify them; returns their checksum, on every rank. Collective."""
    buckets = trainer.export_weights(transport.bucket_bytes)
    if trainer.ranks.rank == 0:
        transport.begin(version, trainer)
        transport.send(buckets)
        transport.end()
    else:
        for _ in buckets:
            pass
    checksum = trainer.weight_checksum()
    if trainer.ranks.rank == 0:
        transport.verify(checksum)
    trainer.ranks.barrier()
    return checksum


def flatten(buckets: Iterator[Bucket]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of all buckets, one after another."""
    for bucket in buckets:
        yield from bucket
