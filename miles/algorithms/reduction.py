"""From a value a token to one number, with denominators of the global batch.

A denominator taken from a micro-batch would make the gradient depend on how sequences were packed. So the weight of every
token in the global mean is fixed first, and the sum of weighted values over micro-batches and ranks is the mean itself.
"""

from __future__ import annotations

import torch
from torch import Tensor


def per_sample_weight(mask: Tensor, sequence: Tensor, tokens: Tensor, samples: int) -> Tensor:
    """Weight of every token in the mean over samples of the mean over their tokens (GRPO's reduction).

    mask bool [R]; sequence i64 [R], which of the S sequences a row belongs to; tokens i64 [S], unmasked tokens of the whole
    sequence (before any rejection); samples: sequences in the global batch of this optimizer step. Returns f32 [R].
    A sample without unmasked tokens contributes 0 and still counts in `samples`.
    """
    assert mask.dtype == torch.bool, "masks are bool"
    share = 1.0 / (tokens.clamp_min(1).double() * max(samples, 1))
    return torch.where(mask, share[sequence], torch.zeros((), dtype=torch.float64, device=mask.device)).float()


def per_token_weight(mask: Tensor, tokens: int) -> Tensor:
    """Weight of every token in the mean over the tokens of the global batch (DAPO's reduction).

    mask bool [R]; tokens: unmasked tokens in the global batch of this optimizer step. Returns f32 [R]: 1/max(tokens, 1) or 0.
    """
    assert mask.dtype == torch.bool, "masks are bool"
    return mask.float() / max(tokens, 1)


def weighted_sum(value: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Σ value · weight over the rows where mask is on; f32 scalar. What lies under the mask (NaN, -inf) never enters. All [R]."""
    zero = torch.zeros((), dtype=torch.float32, device=value.device)
    return (torch.where(mask, value.float(), zero) * weight).sum()


def per_sequence_sum(value: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    """Sum of the rows of each sequence. value [R]; sequence i64 [R]; returns f64 [sequences]."""
    return torch.zeros(sequences, dtype=torch.float64, device=value.device).index_add_(0, sequence, value.double())
