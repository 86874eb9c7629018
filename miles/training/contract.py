"""The trainer contract: what the loop asks of a training backend. Implemented by fsdp.FsdpTrainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from miles.data.store.epoch import Fence
from miles.data.store.manifest import Manifest
from miles.training.batch import Batch
from miles.training.distributed import Ranks

Phase = Literal["sft", "rollout"]
Role = Literal["actor", "reference"]
Bucket = list[tuple[str, Tensor]]


class Trainer(Protocol):
    """A model, its optimizer and its frozen reference, spread over ranks. Every method is collective: all ranks call it alike."""

    ranks: Ranks
    experts: tuple[int, int] | None
    """(layers, experts of a token) of a mixture of experts."""

    def start_phase(self, phase: Phase) -> None:
        """Begin (or stay in) a phase. A new phase has a fresh optimizer and schedule; optimizer states are not carried over."""
        ...

    def load_reference(self, folder: Path) -> None:
        """Load the frozen reference model of the KL loss from a Hugging Face folder."""
        ...

    def open_batch(self, manifest: Manifest, folder: Path) -> Batch:
        """Open a sealed batch: advantages of all samples from the small arrays; this rank's slices are read later.

        With several optimizer steps, the log-probs before the first of them are computed here (PPO's ratio is against them).
        """
        ...

    def log_probs(self, batch: Batch, step: int, role: Role) -> list[Tensor]:
        """Log-probs f32 [R] of every micro-batch of this rank in an optimizer step, under the actor or the reference."""
        ...

    def train_step(self, batch: Batch, step: int) -> dict[str, float]:
        """One optimizer step on its micro-batches; public metrics, equal on all ranks.

        Raises Diverged, weights untouched, when the gradient is not finite.
        """
        ...

    def score(self, batch: Batch, step: int) -> dict[str, float]:
        """Log-probs and entropies of an optimizer step's micro-batches, kept for the record; public metrics. Needs no phase, moves nothing."""
        ...

    def close_batch(self, batch: Batch, folder: Path, fence: Fence | None = None) -> None:
        """Write what training saw, one file a node, and close the batch."""
        ...

    def export_weights(self, bucket_bytes: int) -> Iterator[Bucket]:
        """The actor's weights with Hugging Face names in the dtype of the forward pass, in buckets, on rank 0; others get empty buckets."""
        ...

    def weight_checksum(self) -> str:
        """Checksum of the exported weights, equal on all ranks; engines that hold them have the same."""
        ...

    def export_hf(self, folder: Path, fence: Fence | None = None) -> None:
        """Write a Hugging Face folder that transformers and SGLang load. Rank 0 writes."""
        ...

    def write_hf(self, folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Write these tensors with this model's config and tokenizer as a Hugging Face folder. Called by one rank alone."""
        ...

    def save(self, checkpoints: Path, step: int, progress: dict[str, Any], fence: Fence | None = None) -> Path:
        """Save everything that a bit-exact resume needs as step_NNNNNN; complete or absent."""
        ...

    def load_weights(self, folder: Path) -> dict[str, Any]:
        """Load the weights of a checkpoint and nothing else; returns its state."""
        ...

    def load(self, folder: Path) -> dict[str, Any]:
        """Load a checkpoint; returns the progress that was saved with it."""
        ...
