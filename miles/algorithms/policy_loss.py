"""PPO's clipped policy loss, a token at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from miles.algorithms.kl import LOG_RATIO_LIMIT, masked_difference


class PolicyLoss(NamedTuple):
    """loss f32 [R]; ratio f32 [R] (detached); clipped f32 [R], 1 where the clipped branch won; ppo_kl f32 [R] = old - new (detached)."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    ppo_kl: Tensor


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    eps_clip: float,
    eps_clip_high: float | None = None,
    eps_clip_c: float | None = None,
) -> PolicyLoss:
    """PPO's objective with its own upper bound and the dual clip (arXiv 1707.06347, 2503.14476, 1912.09729).

    logprob f32 [R], with gradient; old_logprob, advantage f32 [R], without; mask bool [R]. Bounds are offsets from 1.

    r = exp(clamp(new - old, ±20)); L = max(-r A, -clip(r, 1 - eps_clip, 1 + eps_clip_high) A); where A < 0 and eps_clip_c is
    given, min(L, -eps_clip_c A). `clipped` is 1 where the clipped branch is strictly greater, whatever the dual clip does.
    Under the mask, and where new - old is not finite, r is 1 without gradient and the token's loss is 0 under the mask.
    """
    high = eps_clip if eps_clip_high is None else eps_clip_high
    difference = masked_difference(logprob, old_logprob.detach(), mask)
    ratio = torch.exp(torch.clamp(difference, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    zero = torch.zeros((), dtype=torch.float32, device=logprob.device)
    weight = torch.where(mask, advantage.detach().float(), zero)
    plain = -ratio * weight
    bounded = -torch.clamp(ratio, 1.0 - eps_clip, 1.0 + high) * weight
    loss = torch.maximum(plain, bounded)
    clipped = (bounded > plain).float()
    if eps_clip_c is not None:
        assert eps_clip_c > 1, "the dual clip's bound is above 1"
        loss = torch.where(weight < 0, torch.minimum(loss, -eps_clip_c * weight), loss)
    return PolicyLoss(loss, ratio.detach(), clipped.detach(), (-difference).detach())
