"""FP8 weights in blocks of 128 × 128 with a scale each, as DeepSeek-V3's files hold them: value = code × scale."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
SCALE = "_scale_inv"  # follows the weight's name
MAX = 448.0  # of float8_e4m3fn


def quantize(weight: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """[N, K] of any float dtype to (codes [N, K] float8_e4m3fn, scales [ceil(N/128), ceil(K/128)] float32).

    scale = the block's largest magnitude / 448, rounded up to a power of two on request; a block of zeros has the scale 1. Rounding is to
    nearest, ties to even, saturating.
    """
    rows, columns = weight.shape
    tall, wide = -(-rows // BLOCK), -(-columns // BLOCK)
    padded = torch.zeros(tall * BLOCK, wide * BLOCK, dtype=torch.float32)
    padded[:rows, :columns] = weight
    blocks = padded.view(tall, BLOCK, wide, BLOCK)
    largest = blocks.abs().amax(dim=(1, 3))
    scales = torch.where(largest > 0, largest / MAX, torch.ones_like(largest))
    if power_of_two:
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    codes = (blocks / scales[:, None, :, None]).clamp(-MAX, MAX).to(torch.float8_e4m3fn)
    return codes.reshape(tall * BLOCK, wide * BLOCK)[:rows, :columns].contiguous(), scales


def dequantize_rows(codes: Tensor, scales: Tensor, first: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rows [n, K] of a quantised matrix, which begin at its row `first`, in `dtype`: float32 product of code and scale, rounded once.

    scales: those of the whole matrix. Works in strips of a block's height, so memory beyond the result stays small.
    """
    rows, columns = codes.shape
    out = torch.empty(rows, columns, dtype=dtype)
    strip = torch.empty(BLOCK, columns, dtype=torch.float32)
    at = 0
    while at < rows:
        block = (first + at) // BLOCK
        count = min(rows - at, (block + 1) * BLOCK - first - at)
        part = strip[:count]
        part.copy_(codes[at : at + count])
        whole = columns // BLOCK * BLOCK
        scale = scales[block].float()
        if whole:
            part[:, :whole].view(count, whole // BLOCK, BLOCK).mul_(scale[None, : whole // BLOCK, None])
        if whole < columns:
            part[:, whole:].mul_(scale[whole // BLOCK])
        out[at : at + count] = part
        at += count
    return out
