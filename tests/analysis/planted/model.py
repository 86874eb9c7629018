"""A small mixture-of-experts transformer, whose weights, arithmetic and routes are arguments: one function for engine and trainer.

Every tensor has a leading dimension of blocks: rows of one block share their weights, so one pass may hold several policies.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import silu

from planted.arithmetic import FP32, rounded

VOCABULARY, HIDDEN, LAYERS, HEADS, EXPERTS, TOP_K, INNER = 512, 64, 2, 2, 8, 2, 16
SIZE = HIDDEN // HEADS
SLOPES = torch.tensor([0.03, 0.3])  # of attention over distance, a head (ALiBi)
SHARPNESS = 6.0  # standard deviation of logits: with it entropies run from 0 to 3 nats, as in trained models
Weights = dict[str, Tensor]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q, k, v [G, R, HEADS, SIZE] -> [G, R, HEADS, SIZE]
Choose = Callable[[int, Tensor], Tensor]  # layer, router's logits [G, R, EXPERTS] -> experts i64 [G, R, TOP_K]

SHAPES = {
    f"{layer}.{name}": shape
    for layer in range(LAYERS)
    for name, shape in {
        "qkv": (HIDDEN, 3 * HIDDEN), "out": (HIDDEN, HIDDEN), "router": (HIDDEN, EXPERTS),
        "up": (HIDDEN, 2 * EXPERTS * INNER), "down": (EXPERTS * INNER, HIDDEN),
    }.items()
} | {"embed": (VOCABULARY, HIDDEN), "head": (HIDDEN, VOCABULARY)}  # fmt: skip


def random_weights(seed: int) -> Weights:
    """One block of weights, f32 [1, …]."""
    random = torch.Generator().manual_seed(seed)
    scale = {"embed": 1.0, "head": SHARPNESS * HIDDEN**-0.5, "router": 2 * HIDDEN**-0.5, "down": 2 * INNER**-0.5}
    return {
        name: torch.randn(1, *shape, generator=random) * scale.get(name.split(".")[-1], shape[0] ** -0.5)
        for name, shape in SHAPES.items()
    }  # fmt: skip


def forward(weights: Weights, token: Tensor, attend: Attend, choose: Choose, bits: int = FP32) -> tuple[Tensor, Tensor]:
    """Logits f32 [G, R, VOCABULARY] of token i64 [G, R], and those of the first layer alone (a draft's).

    bits: mantissa bits of activations; what enters the head is rounded too, logits are not.
    """
    blocks, rows = token.shape
    x = weights["embed"][torch.arange(blocks)[:, None], token]
    early = x
    for layer in range(LAYERS):
        qkv = rounded(_normal(x, bits) @ weights[f"{layer}.qkv"], bits).view(blocks, rows, 3, HEADS, SIZE)
        mixed = rounded(attend(layer, *qkv.unbind(2)).reshape(blocks, rows, HIDDEN), bits)
        x = rounded(x + rounded(mixed @ weights[f"{layer}.out"], bits), bits)
        h = _normal(x, bits)
        routing = h @ weights[f"{layer}.router"]
        experts = choose(layer, routing)
        share = torch.zeros_like(routing).scatter(-1, experts, routing.gather(-1, experts).softmax(-1))
        gate, up = rounded(h @ weights[f"{layer}.up"], bits).view(blocks, rows, 2, EXPERTS, INNER).unbind(2)
        inner = rounded(silu(gate) * up, bits) * share[..., None]
        x = rounded(x + rounded(inner.view(blocks, rows, EXPERTS * INNER) @ weights[f"{layer}.down"], bits), bits)
        early = x if layer == 0 else early
    return _normal(x, bits) @ weights["head"], _normal(early, bits) @ weights["head"]


def _normal(x: Tensor, bits: int) -> Tensor:
    return rounded(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6), bits)
