"""From logits to a token and the log-prob that the engine reports."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from planted.arithmetic import FP32, rounded

DRAFTED = 3  # tokens that a draft proposes before the model adds one


@dataclass(frozen=True)
class Sampler:
    """How an engine samples, and what it reports. top_k 0: off. renormalised: log-probs are those after top-p and top-k."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    renormalised: bool = True
    logit_bits: int = FP32  # of the head's output
    logprob_bits: int = FP32  # of the log softmax

    def distribution(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """logits f32 [..., V] -> log-probs as reported and probabilities sampled from, f32 [..., V], and the mass that was kept f32 [...].

        A token stays while the probability of those before it, in falling order, is at most top_p, and its rank is below top_k; with the
        last one that stays, its equals do.
        """
        full = torch.log_softmax(rounded(logits, self.logit_bits) / self.temperature, -1)
        if self.top_p >= 1 and not self.top_k:
            return rounded(full, self.logprob_bits), full.exp(), torch.ones(full.shape[:-1])
        falling = torch.from_numpy(np.sort(full.numpy(), -1)[..., ::-1].copy())
        probability = falling.exp()
        count = (probability.cumsum(-1) - probability <= self.top_p).sum(-1).clamp(1, self.top_k or full.shape[-1])
        inside = torch.where(full >= falling.gather(-1, count[..., None] - 1), full, -torch.inf)
        mass = inside.logsumexp(-1)
        renormalised = inside - mass[..., None]
        return rounded(renormalised if self.renormalised else full, self.logprob_bits), renormalised.exp(), mass.exp()


def draw(weight: Tensor, uniform: Tensor) -> Tensor:
    """Index i64 [...] drawn in proportion to weight f32 [..., V], by inverse CDF of uniform f64 [...] in [0, 1). Weight 0 is never drawn."""
    total = weight.double().cumsum(-1)
    return torch.searchsorted(total, (uniform * total[..., -1])[..., None], right=True)[..., 0].clamp_max(weight.shape[-1] - 1)


class Speculation:
    """Speculative sampling (arXiv 2302.01318) of rows that have a draft: the target's distribution is kept exactly."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.proposed = rows, torch.zeros(rows.shape, dtype=torch.int64)

    def draw(self, target: Tensor, draft: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities f32 [..., V], uniform f64 [3, ...] -> token i64 [...], accepted, and bonus or resampled, bool [...]."""
        proposes = self.rows & (self.proposed < DRAFTED)
        proposal = draw(draft, uniform[0])
        p, q = (each.gather(-1, proposal[..., None])[..., 0] for each in (target, draft))
        accepted = proposes & (uniform[1] * q < p)
        rest = torch.where(proposes[..., None], (target - draft).clamp_min(0), target)
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, target)  # equal distributions: nothing can be rejected but by rounding
        token = torch.where(accepted, proposal, draw(rest, uniform[2]))
        self.proposed = torch.where(accepted, self.proposed + 1, 0)
        return token, accepted, self.rows & ~accepted
