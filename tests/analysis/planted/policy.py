"""The policy's way through training: weights after real optimizer steps on real rewards, made once a process."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from planted.model import VOCABULARY, Weights, random_weights
from planted.passes import Stepper, packed, top_experts
from planted.pipeline import Stale
from planted.vocabulary import STOP

BEFORE = 12  # versions before the run's first, so that a stale one is there from the start
VERSIONS = 22
SEQUENCES, TOKENS = 24, 24  # of a batch that the optimizer saw
LEARNING_RATE = 1.5e-3


class Policy:
    """Weights by version; versions between two are on the line between them."""

    def __init__(self, versions: list[Weights]) -> None:
        self.versions = versions

    def of_copy(self, version: float, faults: list[Stale], seed: int) -> Weights:
        """What a copy with these faults holds where it says that it has this version; seed: of the damage."""
        made = self.weights(version - sum(fault.behind for fault in faults))
        for fault in faults:
            if fault.damage is not None:
                made = damaged(made, *fault.damage, seed)
        return made

    def weights(self, version: float) -> Weights:
        """One block of weights, f32 [1, …]; version 0 is the run's first and may be passed by BEFORE backwards."""
        place = version + BEFORE
        assert 0 <= place <= len(self.versions) - 1, f"versions run from {-BEFORE} to {len(self.versions) - 1 - BEFORE}, {version} asked for"
        low = int(place)
        part = place - low
        made = self.versions[low]
        return {name: torch.lerp(here, self.versions[low + 1][name], part) for name, here in made.items()} if part else made


def damaged(weights: Weights, name: str, size: float, seed: int) -> Weights:
    """A copy in which one tensor is off by noise of `size` times its own root mean square."""
    tensor = weights[name]
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal(tuple(tensor.shape))).float()
    return weights | {name: tensor + size * tensor.square().mean().sqrt() * noise}


def reward_of(token: np.ndarray) -> np.ndarray:
    """Share of even ids among tokens [..., T] that are no stops."""
    return ((token % 2 == 0) & (token >= STOP)).mean(-1)


@cache
def trained_policy(seed: int = 0) -> Policy:
    """VERSIONS versions, one Adam step of the policy gradient apart."""
    weights = {name: tensor.requires_grad_() for name, tensor in random_weights(seed).items()}
    optimizer = torch.optim.Adam(weights.values(), lr=LEARNING_RATE)
    random = torch.Generator().manual_seed(seed + 1)
    versions = []
    for _ in range(VERSIONS):
        versions.append({name: tensor.detach().clone() for name, tensor in weights.items()})
        token = _sampled(versions[-1], random)
        reward = torch.from_numpy(reward_of(token.numpy())).float()
        advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
        logits = packed(weights, token.reshape(-1), torch.full((SEQUENCES,), TOKENS), top_experts)
        logprob = logits.log_softmax(-1).view(SEQUENCES, TOKENS, VOCABULARY)[:, :-1].gather(-1, token[:, 1:, None])[..., 0]
        optimizer.zero_grad()
        (-(advantage[:, None] * logprob).mean()).backward()
        optimizer.step()
    return Policy(versions)


@torch.no_grad()
def _sampled(weights: Weights, random: torch.Generator) -> torch.Tensor:
    """token i64 [SEQUENCES, TOKENS], the first one uniform."""
    stepper = Stepper(1, SEQUENCES, TOKENS)
    tokens = [torch.randint(STOP, VOCABULARY, (1, SEQUENCES), generator=random)]
    for _ in range(TOKENS - 1):
        logits, _ = stepper.step(weights, tokens[-1], top_experts)
        tokens.append(torch.multinomial(logits[0].softmax(-1), 1, generator=random)[None, :, 0])
    return torch.stack(tokens, -1)[0]
