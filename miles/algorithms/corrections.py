"""Weights against the mismatch of engine and trainer: truncated importance sampling."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from miles.algorithms.kl import LOG_RATIO_LIMIT


class TisWeight(NamedTuple):
    """weight f32 [R], applied; raw f32 [R], before truncation; clipped f32 [R], 1 where truncation acted."""

    weight: Tensor
    raw: Tensor
    clipped: Tensor


def truncated_importance(train_logprob: Tensor, rollout_logprob: Tensor, mask: Tensor, *, low: float, high: float) -> TisWeight:
    """clamp(π_train / π_rollout, low, high) of every token, without gradient; bounds are absolute ratios, not offsets.

    train_logprob, rollout_logprob f32 [R], mask bool [R]. The log-ratio is clamped to ±20 before the exponential. Outside the
    mask, and where a log-prob is NaN, the weight is 1 and nothing counts as clipped. Source: Yao, Liu et al. 2025.
    """
    zero = torch.zeros((), dtype=torch.float32, device=train_logprob.device)
    keep = mask & ~torch.isnan(train_logprob) & ~torch.isnan(rollout_logprob)
    keep &= ~(torch.isinf(train_logprob) & torch.isinf(rollout_logprob))
    difference = torch.where(keep, train_logprob.detach().float(), zero) - torch.where(keep, rollout_logprob.float(), zero)
    raw = torch.exp(torch.clamp(difference, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    weight = torch.clamp(raw, low, high)
    one = torch.ones((), dtype=torch.float32, device=raw.device)
    return TisWeight(torch.where(keep, weight, one), raw, (keep & (weight != raw)).float())
