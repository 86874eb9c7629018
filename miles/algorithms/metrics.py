"""Metrics of the mismatch between rollout's and trainer's log-probs, as sums that add up over micro-batches and ranks.

With d = train - rollout: mean |d|, mean of -d, k3 (the estimate of KL(rollout || train)), the ratio e^d and the effective sample
size. Tokens where either log-prob is not finite are counted apart and never averaged.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from miles.algorithms.kl import LOG_RATIO_LIMIT, LOW_VAR_LIMIT
from miles.algorithms.reduction import per_sequence_sum

SUMS = ("tokens", "abs_diff", "negative_diff", "k3", "ratio", "ratio_squared", "equal_bits", "not_finite")
MAXIMA = ("max_abs_diff", "max_ratio", "max_inverse_ratio")


def mismatch_sums(train_logprob: Tensor, rollout_logprob: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sums (f64 [8], named by SUMS) and maxima (f64 [3], named by MAXIMA) over the masked tokens.

    train_logprob, rollout_logprob f32 [R], mask bool [R]. Differences and exponentials in float32, sums in float64.
    """
    finite = torch.isfinite(train_logprob) & torch.isfinite(rollout_logprob)
    keep = mask & finite
    zero = torch.zeros((), dtype=torch.float32, device=train_logprob.device)
    train = torch.where(keep, train_logprob.detach().float(), zero)
    rollout = torch.where(keep, rollout_logprob.float(), zero)
    d = train - rollout
    bounded = torch.clamp(d, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = torch.exp(bounded)
    k3 = torch.clamp(torch.expm1(bounded) - bounded, -LOW_VAR_LIMIT, LOW_VAR_LIMIT)
    active = keep.double()
    equal = keep & (train.view(torch.int32) == rollout.view(torch.int32))
    sums = torch.stack([
        active.sum(),
        d.abs().double().sum(),
        (-d).double().sum(),
        k3.double().sum(),
        (ratio.double() * active).sum(),
        (ratio.double().square() * active).sum(),
        equal.double().sum(),
        (mask & ~finite).double().sum(),
    ])
    if d.numel() == 0:
        return sums, torch.zeros(len(MAXIMA), dtype=torch.float64, device=sums.device)
    maxima = torch.stack([d.abs().max().double(), (ratio * keep).max().double(), (torch.exp(-bounded) * keep).max().double()])
    return sums, maxima


def mismatch_metrics(sums: list[float], maxima: list[float]) -> dict[str, float]:
    """Public metrics from the global sums and maxima of mismatch_sums. Without a single token: counts only, no averages."""
    s = dict(zip(SUMS, sums, strict=True))
    m = dict(zip(MAXIMA, maxima, strict=True))
    n = s["tokens"]
    result = {"train/mismatch_tokens": n, "train/mismatch_not_finite": s["not_finite"]}
    if n == 0:
        return result
    return result | {
        "train/train_rollout_logprob_abs_diff": s["abs_diff"] / n,
        "train/train_rollout_logprob_max_abs_diff": m["max_abs_diff"],
        "train/train_rollout_kl": s["k3"] / n,
        "train/train_rollout_kl_k1": s["negative_diff"] / n,
        "train/train_rollout_equal_bits": s["equal_bits"] / n,
        "train/train_rollout_ratio_mean": s["ratio"] / n,
        "train/train_rollout_ratio_std": math.sqrt(max(s["ratio_squared"] / n - (s["ratio"] / n) ** 2, 0.0)),
        "train/train_rollout_ratio_max": m["max_ratio"],
        "train/train_rollout_ratio_min": 1.0 / m["max_inverse_ratio"],
        "train/train_rollout_chi2": s["ratio_squared"] / n - 1.0,
        "train/train_rollout_ess": s["ratio"] ** 2 / (n * s["ratio_squared"]),
    }


def sample_ess(ratio: Tensor, mask: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    """Effective sample size of each sequence's ratios of new to old policy, in (0, 1]: (Σr)² / (n Σr²); 1 for a sequence without tokens.

    ratio f32 [R], mask bool [R], sequence i64 [R]. Returns f64 [sequences].
    """
    kept = torch.where(mask, ratio.detach().double(), torch.zeros((), dtype=torch.float64, device=ratio.device))
    count = per_sequence_sum(mask.double(), sequence, sequences)
    first = per_sequence_sum(kept, sequence, sequences)
    second = per_sequence_sum(kept.square(), sequence, sequences)
    empty = count == 0
    one = torch.ones((), dtype=torch.float64, device=ratio.device)
    return torch.where(empty, one, first.square() / torch.where(empty, one, count * second))
