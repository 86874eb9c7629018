"""Two ways through the model that give the same numbers up to summation order: token by token over a cache, and whole sequences packed."""

from __future__ import annotations

import torch
from torch import Tensor

from planted.arithmetic import FP32
from planted.model import EXPERTS, HEADS, LAYERS, SIZE, SLOPES, TOP_K, Choose, Weights, forward


class Stepper:
    """Decodes G blocks of B sequences, one position a call; T positions at most. The cache is kept when weights change."""

    def __init__(self, blocks: int, rows: int, positions: int, bits: int = FP32) -> None:
        self.bits, self.position = bits, 0
        self.keys = torch.zeros(LAYERS, blocks, rows, HEADS, SIZE, positions)
        self.values = torch.zeros(LAYERS, blocks, rows, HEADS, positions, SIZE)
        self.distance = -SLOPES[:, None] * torch.arange(positions - 1, -1, -1)

    def step(self, weights: Weights, token: Tensor, choose: Choose) -> tuple[Tensor, Tensor]:
        """token i64 [G, B] at the present position -> logits of the next one and the draft's, f32 [G, B, VOCABULARY]."""
        made = forward(weights, token, self._attend, choose, self.bits)
        self.position += 1
        return made

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        end = self.position + 1
        keys, values = self.keys[layer], self.values[layer]
        keys[..., self.position], values[..., self.position, :] = k, v
        scores = (q[..., None, :] @ keys[..., :end]) * SIZE**-0.5 + self.distance[:, None, -end:]
        return (scores.softmax(-1) @ values[..., :end, :])[..., 0, :]


def packed(weights: Weights, token: Tensor, lengths: Tensor, choose: Choose, bits: int = FP32) -> Tensor:
    """Logits f32 [N, VOCABULARY] of the N = sum(lengths) tokens of sequences one after another; token i64 [N], lengths i64 [S]."""
    width = int(lengths.max())
    real = torch.arange(width) < lengths[:, None]
    place = torch.arange(width)
    bias = torch.where(place[:, None] >= place, SLOPES[:, None, None] * (place - place[:, None]), -torch.inf)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        padded = [_spread(each[0], real).transpose(1, 2) for each in (q, k, v)]
        made = torch.nn.functional.scaled_dot_product_attention(*padded, attn_mask=bias)
        return made.transpose(1, 2)[real][None]

    return forward(weights, token[None], attend, choose, bits)[0][0]


def _spread(x: Tensor, real: Tensor) -> Tensor:
    padded = x.new_zeros(*real.shape, *x.shape[1:])
    padded[real] = x
    return padded


def top_experts(layer: int, routing: Tensor) -> Tensor:
    """The router's own choice, best first."""
    return routing.topk(TOP_K, -1).indices


class Recorded:
    """The router's own choice; keeps all experts of each call, best first: u8 [G, R, LAYERS, EXPERTS]."""

    def __init__(self) -> None:
        self.calls: list[list[Tensor]] = []

    def __call__(self, layer: int, routing: Tensor) -> Tensor:
        if layer == 0:
            self.calls.append([])
        order = routing.argsort(-1, descending=True)
        self.calls[-1].append(order.to(torch.uint8))
        return order[..., :TOP_K]

    def all(self) -> Tensor:
        """u8 [calls, G, R, LAYERS, EXPERTS]"""
        return torch.stack([torch.stack(layers, -2) for layers in self.calls])


class Replayed:
    """Given experts i64 [G, R, LAYERS, TOP_K]."""

    def __init__(self, experts: Tensor) -> None:
        assert experts.shape[-2:] == (LAYERS, TOP_K), f"experts of {LAYERS} layers, not {tuple(experts.shape)}"
        assert int(experts.max()) < EXPERTS, "there are so many experts"
        self.experts = experts

    def __call__(self, layer: int, routing: Tensor) -> Tensor:
        return self.experts[..., layer, :]
