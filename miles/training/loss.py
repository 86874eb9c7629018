"""The loss of one micro-batch, and the sums from which the metrics of an optimizer step are made."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from miles.algorithms.corrections import truncated_importance
from miles.algorithms.kl import token_kl
from miles.algorithms.metrics import MAXIMA, SUMS, mismatch_metrics, mismatch_sums, sample_ess
from miles.algorithms.policy_loss import policy_loss
from miles.algorithms.reduction import per_sample_weight, per_token_weight, weighted_sum
from miles.algorithms.sft_loss import sft_loss
from miles.config.schema import Algorithm
from miles.training.distributed import Ranks
from miles.training.packing import PackedBatch


@dataclass(frozen=True)
class Denominators:
    """Of one optimizer step, over all ranks: its samples, and its unmasked predicted tokens."""

    samples: int
    tokens: int


@dataclass
class StepSums:
    """Sums over the micro-batches of an optimizer step; finish() adds the ranks' and gives the public metrics."""

    device: torch.device
    sums: dict[str, Tensor] = field(default_factory=dict)
    mismatch: Tensor | None = None
    maxima: Tensor | None = None

    def add(self, **values: Tensor) -> None:
        """Add scalars under metric names (without train/)."""
        for name, value in values.items():
            exact = value.detach().double()
            self.sums[name] = self.sums[name] + exact if name in self.sums else exact

    def add_mismatch(self, train_logprob: Tensor, rollout_logprob: Tensor, mask: Tensor) -> None:
        """Add the tokens of a micro-batch to the mismatch metrics."""
        sums, maxima = mismatch_sums(train_logprob, rollout_logprob, mask)
        self.mismatch = sums if self.mismatch is None else self.mismatch + sums
        self.maxima = maxima if self.maxima is None else torch.maximum(self.maxima, maxima)

    def finish(self, ranks: Ranks) -> dict[str, float]:
        """Public metrics of the whole step, equal on all ranks. Collective: names must be the same on every rank."""
        names = sorted(self.sums)
        parts = [torch.stack([self.sums[name] for name in names])]
        if self.mismatch is not None:
            parts.append(self.mismatch)
        total = ranks.all_reduce(torch.cat(parts)).tolist()
        metrics = {f"train/{name}": value for name, value in zip(names, total, strict=False)}
        if self.mismatch is not None and self.maxima is not None:
            maxima = ranks.all_reduce(self.maxima, "max").tolist()
            assert len(total) == len(names) + len(SUMS), "sums in order"
            assert len(maxima) == len(MAXIMA), "maxima in order"
            metrics |= mismatch_metrics(total[len(names) :], maxima)
        return metrics


def token_weight(batch: PackedBatch, per_token: bool, whole: Denominators) -> Tensor:
    """Weight of every predicted token [R] in the step's mean."""
    if per_token:
        return per_token_weight(batch.mask, whole.tokens)
    return per_sample_weight(batch.mask, batch.sequence, batch.tokens, whole.samples)


def supervised_loss(batch: PackedBatch, logprob: Tensor, entropy: Tensor, whole: Denominators, sums: StepSums) -> Tensor:
    """SFT: mean negative log-likelihood over the tokens of the step."""
    weight = token_weight(batch, True, whole)
    loss = weighted_sum(sft_loss(logprob, batch.mask), batch.mask, weight)
    sums.add(loss=loss, entropy_loss=weighted_sum(entropy.detach(), batch.mask, weight))
    return loss


def reinforcement_loss(
    batch: PackedBatch,
    logprob: Tensor,
    entropy: Tensor,
    old_logprob: Tensor,
    ref_logprob: Tensor | None,
    whole: Denominators,
    algorithm: Algorithm,
    sums: StepSums,
) -> tuple[Tensor, Tensor | None]:
    """Clipped policy loss, entropy bonus and KL loss of one micro-batch, as its share of the step's mean.

    logprob, entropy f32 [R] with gradient; old_logprob f32 [R], recomputed by the trainer before the first of the rollout's
    optimizer steps; ref_logprob f32 [R] or None. Returns the loss and the off-policy weight f32 [R] if one was applied.
    """
    weight = token_weight(batch, algorithm.calculate_per_token_loss, whole)
    advantage = batch.advantage[batch.sequence]
    policy = policy_loss(
        logprob, old_logprob, advantage, batch.mask,
        eps_clip=algorithm.eps_clip, eps_clip_high=algorithm.eps_clip_high, eps_clip_c=algorithm.eps_clip_c,
    )  # fmt: skip
    token_loss, correction = policy.loss, None
    if algorithm.use_tis:
        tis = truncated_importance(old_logprob, batch.rollout_logprob, batch.mask, low=algorithm.tis_clip_low, high=algorithm.tis_clip)
        token_loss, correction = token_loss * tis.weight, tis.weight
        sums.add(
            tis=weighted_sum(tis.raw, batch.mask, weight),
            tis_abs=weighted_sum((tis.raw - 1).abs(), batch.mask, weight),
            tis_clipfrac=weighted_sum(tis.clipped, batch.mask, weight),
        )
    pg_loss = weighted_sum(token_loss, batch.mask, weight)
    # Without a bonus the entropy is a metric only: no gradient is asked of it.
    mean_entropy = weighted_sum(entropy if algorithm.entropy_coef != 0 else entropy.detach(), batch.mask, weight)
    loss = pg_loss
    if algorithm.entropy_coef != 0:
        loss = loss - algorithm.entropy_coef * mean_entropy
    if ref_logprob is not None:
        kl = weighted_sum(token_kl(logprob, ref_logprob, batch.mask, algorithm.kl_loss_type), batch.mask, weight)
        if algorithm.kl_loss_coef != 0:
            loss = loss + algorithm.kl_loss_coef * kl
        sums.add(kl_loss=kl)
    ess = sample_ess(policy.ratio, batch.mask, batch.sequence, max(batch.sequences, 1))
    sums.add(
        loss=loss,
        pg_loss=pg_loss,
        entropy_loss=mean_entropy,
        pg_clipfrac=weighted_sum(policy.clipped, batch.mask, weight),
        ppo_kl=weighted_sum(policy.ppo_kl, batch.mask, weight),
        ess_ratio=ess[: batch.sequences].sum() / max(whole.samples, 1),
    )
    return loss, correction
