"""Group-relative advantages: one number a sample, from the rewards of the samples of one prompt."""

from __future__ import annotations

import torch
from torch import Tensor

STD_EPSILON = 1e-6


def grpo_advantages(reward: Tensor, group: Tensor, *, normalize: bool = True, std: bool = True) -> Tensor:
    """Advantage of every sample against the samples of its group (prompt draw).

    reward f32 [S], finite; group i64 [S], any labels. Returns f32 [S].

    normalize on: a = R - mean; and with `std`, where the group has more than one sample and its unbiased standard
    deviation is above zero, a / (std + 1e-6) (GRPO, arXiv 2402.03300; without std: Dr.GRPO, arXiv 2503.20783).
    normalize off: the reward itself. A group of one has advantage 0, as has a group whose rewards are all equal.

    Statistics are summed in float64, so that the order of the samples cannot show in the float32 result
    except where float64 sums themselves differ in the last place; callers sort by (draw, sample) to exclude even that.
    Raises ValueError on a reward that is not finite.
    """
    assert reward.shape == group.shape == (reward.numel(),), "one reward and one group label a sample"
    finite = torch.isfinite(reward)
    if not bool(finite.all()):
        raise ValueError(f"reward of sample {int((~finite).nonzero()[0])} of the batch is not finite; reward functions must return finite numbers")
    if not normalize:
        return reward.float()
    if reward.numel() == 0:
        return reward.float()
    exact = reward.double()
    _, index = torch.unique(group, return_inverse=True)
    groups = int(index.max()) + 1

    def per_group(values: Tensor) -> Tensor:
        return torch.zeros(groups, dtype=torch.float64, device=values.device).index_add_(0, index, values)

    size = per_group(torch.ones_like(exact))
    # The mean of equal rewards may miss them by a rounding error, and a tiny std would blow that up: decide "all equal" exactly.
    low = torch.full((groups,), float("inf"), dtype=torch.float64, device=exact.device).scatter_reduce_(0, index, exact, "amin")
    high = torch.full((groups,), float("-inf"), dtype=torch.float64, device=exact.device).scatter_reduce_(0, index, exact, "amax")
    equal = low == high
    mean = torch.where(equal, low, per_group(exact) / size)
    centred = exact - mean[index]
    if std:
        deviation = (per_group(centred * centred) / (size - 1).clamp_min(1)).sqrt()
        divide = (size > 1) & (deviation > 0)
        scale = torch.where(divide, deviation + STD_EPSILON, torch.ones_like(deviation))
        centred = centred / scale[index]
    return centred.float()
