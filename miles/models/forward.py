"""The one forward pass that engine and trainer share."""

from __future__ import annotations

import torch
from torch import nn

from miles.models.context import CachedContext, Context, PackedContext

__all__ = ["CachedContext", "Context", "PackedContext", "forward"]


def forward(
    model: nn.Module, token_id: torch.Tensor, position_id: torch.Tensor, context: Context, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits f32 [R, V] of the chosen rows (all T rows where rows is None).

    token_id i64 [T]; position_id i64 [T], from 0 in every sequence; context: PackedContext or CachedContext over those T rows;
    rows i64 [R]. Goes through model.__call__, so FSDP2's hooks fire. In batch-invariant mode a row's logits have the same bits in
    every batch, packed or cached, for pinned threads (miles.precision.threads).
    """
    device = token_id.device
    count = token_id.shape[0]
    if device.type == "cpu" and count % 16:  # the kernels' matrix blocks: pad once here and not before every product
        pad = 16 - count % 16
        token_id = torch.cat([token_id, token_id.new_zeros(pad)])
        position_id = torch.cat([position_id, position_id.new_zeros(pad)])
        if rows is None:
            rows = torch.arange(count)
    output = model(
        input_ids=token_id.unsqueeze(0),
        position_ids=position_id.unsqueeze(0),
        use_cache=False,
        logits_to_keep=0 if rows is None else rows,
        miles_context=context,
    )
    return output.logits[0].float()
