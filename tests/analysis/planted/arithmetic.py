"""Floats of fewer mantissa bits: what a kernel's output is rounded to."""

from __future__ import annotations

import torch
from torch import Tensor

FP32, BF16 = 23, 7  # mantissa bits behind the leading one


def rounded(x: Tensor, bits: int) -> Tensor:
    """f32 values rounded to nearest with `bits` mantissa bits (7: a cast to bf16 and back; 23: as they are)."""
    if bits >= FP32:
        return x
    if bits == BF16:
        return x.bfloat16().float()
    large = x * float((1 << (FP32 - bits)) + 1)  # Veltkamp's splitting
    return large - (large - x)


def bits_of(roundoff: float) -> int:
    """Mantissa bits whose unit roundoff this is: 7 of 2⁻⁸, 23 of 2⁻²⁴ and of anything smaller."""
    bits = FP32 if roundoff <= 2.0**-24 else -int(torch.tensor(roundoff).log2().round()) - 1
    assert 1 <= bits <= FP32, f"a roundoff from 2**-24 to 2**-2, not {roundoff}"
    return bits
