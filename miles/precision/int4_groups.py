"""INT4 weights in groups along a row with a scale each, packed as compressed-tensors does: eight codes in an int32, lowest first."""

from __future__ import annotations

import torch
from torch import Tensor

PER_WORD = 8


def quantize(weight: Tensor, group: int = 32) -> tuple[Tensor, Tensor]:
    """[N, K] to (packed [N, K/8] int32, scales [N, K/group] in the weight's dtype).

    scale = the group's largest magnitude / 7.5, rounded to the weight's dtype; code = weight / scale to nearest, ties to even, in [-8, 7],
    stored as code + 8. A group of zeros has the scale 1. K must be a multiple of the group, the group of 8 (ValueError).
    """
    rows, columns = weight.shape
    if group < PER_WORD or group % PER_WORD or columns % group:
        raise ValueError(f"rows of {columns} numbers can't be cut into groups of {group}; both must be multiples of 8, the row of the group")
    values = weight.float().view(rows, columns // group, group)
    largest = values.abs().amax(dim=2)
    scales = torch.where(largest > 0, largest / 7.5, torch.ones_like(largest)).to(weight.dtype)
    codes = (values / scales.float()[..., None]).round().clamp(-8, 7).to(torch.int32) + 8
    words = codes.view(rows, columns // PER_WORD, PER_WORD)
    packed = torch.zeros(rows, columns // PER_WORD, dtype=torch.int32)
    for i in range(PER_WORD):
        packed |= words[..., i] << (4 * i)
    return packed, scales


def dequantize(packed: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The weight [N, K] in `dtype`: float32 product of code and scale, rounded once."""
    rows, words = packed.shape
    codes = torch.stack([(packed >> (4 * i)) & 15 for i in range(PER_WORD)], dim=2).view(rows, scales.shape[1], -1) - 8
    return (codes.float() * scales.float()[..., None]).view(rows, words * PER_WORD).to(dtype)
