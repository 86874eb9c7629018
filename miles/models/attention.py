"""The attention "miles" of transformers' AttentionInterface: packed or cached, as the `miles_context` passed to the model says.

No mask function is registered for it, which is how transformers is told to make no mask.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from miles.models.context import Context

NAME = "miles"


def miles_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    miles_context: Context | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, T, D], key and value [1, Hkv, T, D] -> ([1, T, H, D], None)."""
    assert attention_mask is None, "no mask function is registered"
    assert query.shape[0] == 1, "sequences are packed into one row"
    if miles_context is None:
        raise ValueError('attention "miles" needs miles_context=PackedContext(...) or CachedContext(...): call miles.models.forward.forward')
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    layer: Any = module.layer_idx
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return miles_context.attend(layer, q, k, v, scale).unsqueeze(0), None


AttentionInterface.register(NAME, miles_attention)
