"""Estimators of the KL divergence of the policy from a base, a token at a time (Schulman, "Approximating KL divergence")."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KlType = Literal["k1", "k2", "k3", "low_var_kl"]
LOG_RATIO_LIMIT = 20.0
LOW_VAR_LIMIT = 10.0


def token_kl(logprob: Tensor, base: Tensor, mask: Tensor, kind: KlType) -> Tensor:
    """KL estimate of every token; differentiable in both.

    logprob, base f32 [R] (natural log); mask bool [R]. Returns f32 [R], 0 under the mask and where the
    difference d = logprob - base is not finite.

    k1 = d; k2 = d²/2; k3 = e^-d - 1 + d; low_var_kl = k3 with -d clamped to ±20 and the result to ±10.
    k1, k2 and k3 are as written, with no clamp on d except that e^-d is taken of at most 80, where float32 still is finite.
    """
    d = masked_difference(logprob, base, mask)
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d * d
    if kind == "k3":
        return torch.expm1(torch.clamp(-d, max=80.0)) + d
    if kind == "low_var_kl":
        negative = torch.clamp(-d, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        return torch.clamp(torch.expm1(negative) - negative, -LOW_VAR_LIMIT, LOW_VAR_LIMIT)
    raise ValueError(f"algorithm.kl_loss_type: {kind!r} is not one of k1, k2, k3, low_var_kl")


def masked_difference(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """a - b in float32 where the mask is on and both are finite, else 0, with no gradient there. [R] each, mask bool.

    Masked values are replaced before the subtraction: -inf - -inf under the mask would be NaN, in the value or in the gradient.
    """
    assert mask.dtype == torch.bool, "masks are bool"
    keep = mask & torch.isfinite(a) & torch.isfinite(b)
    zero = torch.zeros((), dtype=torch.float32, device=a.device)
    return torch.where(keep, a.float(), zero) - torch.where(keep, b.float(), zero)
