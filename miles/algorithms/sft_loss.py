"""The loss of supervised fine-tuning, a token at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def sft_loss(logprob: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood of every token: -logprob f32 [R] where mask bool [R] is on, else 0 without gradient."""
    assert mask.dtype == torch.bool, "masks are bool"
    return -torch.where(mask, logprob.float(), torch.zeros((), dtype=torch.float32, device=logprob.device))
