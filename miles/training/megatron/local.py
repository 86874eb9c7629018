"""Modules of our own for the layer spec without Transformer Engine: megatron-core's local norm knows no sequence parallelism, its local
attention neither latent attention nor packed sequences, and both linears are split, where the indexer's are the same on every rank.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention


class Norm:
    """RMSNorm or LayerNorm, as config.normalization says; gradients of its parameters are summed over a sequence-parallel group.

    A class whose instances are torch's modules: megatron-core builds from classes alone.
    """

    def __new__(cls, config: Any, hidden_size: int, eps: float, **_: Any) -> Any:
        kind = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
        made = kind(hidden_size, eps, dtype=config.params_dtype)
        for parameter in made.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return made


class Attention(MegatronModule):
    """Causal attention on this rank's heads. Keys may be wider than values; packed sequences don't see each other."""

    def __init__(self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        assert config.attention_dropout == 0.0, "nothing is drawn here"
        assert config.context_parallel_size == 1, "keys of other ranks are not seen here"
        self.scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, packed_seq_params: Any = None, **_: Any
    ) -> Tensor:
        """[sequence, batch, heads, width] (packed: [tokens, heads, width]) -> [sequence, batch, heads * value width] (packed: [tokens, ...])."""
        if packed_seq_params is None:
            return self._attend(query, key, value)
        ends = packed_seq_params.cu_seqlens_q.tolist()
        spans = [slice(first, last) for first, last in pairwise(ends)]
        return torch.cat([self._attend(query[s].unsqueeze(1), key[s].unsqueeze(1), value[s].unsqueeze(1)) for s in spans]).squeeze(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1])
        return out.permute(2, 0, 1, 3).flatten(2)


class WholeLinear(nn.Linear):
    """A linear that every tensor-parallel rank holds whole, in megatron-core's manner: returns (output, None)."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, init_method: Any, bias: bool, **_: Any) -> None:
        super().__init__(input_size, output_size, bias, dtype=config.params_dtype)
        init_method(self.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """x [..., input_size]."""
        return linear(x, self.weight, self.bias), None
