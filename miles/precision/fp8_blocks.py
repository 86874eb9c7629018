"""FP8 weights in blocks of 128 × 128 with a scale each, as DeepSeek-V3's files hold them: value = code × scale."""

from __future__ import annotations

import torch
from torch import Tensor

from miles.precision.cpu_fp8 import dequantize
from miles.precision.threads import launch

BLOCK = 128
SCALE = "_scale_inv"  # follows the weight's name
MAX = 448.0  # of float8_e4m3fn


def quantize(weight: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """[N, K] of any float dtype to (codes [N, K] float8_e4m3fn, scales [ceil(N/128), ceil(K/128)] float32).

    scale = the block's largest magnitude / 448, rounded up to a power of two on request; a block of zeros has the scale 1. Rounding is to
    nearest, ties to even, saturating.
    """
    rows, columns = weight.shape
    tall, wide = scales_shape((rows, columns))
    padded = torch.zeros(tall * BLOCK, wide * BLOCK, dtype=torch.float32)
    padded[:rows, :columns] = weight
    blocks = padded.view(tall, BLOCK, wide, BLOCK)
    largest = blocks.abs().amax(dim=(1, 3))
    scales = torch.where(largest > 0, largest / MAX, torch.ones_like(largest))
    if power_of_two:
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    codes = (blocks / scales[:, None, :, None]).clamp(-MAX, MAX).to(torch.float8_e4m3fn)
    return codes.reshape(tall * BLOCK, wide * BLOCK)[:rows, :columns].contiguous(), scales


def scales_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the scales of a matrix [N, K]."""
    return tuple(-(-size // BLOCK) for size in shape)


def dequantize_rows(codes: Tensor, scales: Tensor, first: int, out: Tensor) -> None:
    """Fill `out` with rows [n, K] of a quantised matrix, which begin at its row `first`: float32 product of code and scale, rounded once to
    bfloat16 (and then to out's dtype, if another).

    scales: those of the whole matrix. codes and out are contiguous.
    """
    rows, columns = codes.shape
    begin, end = first // BLOCK, -(-(first + rows) // BLOCK)
    assert scales.shape[0] >= end, "the source is checked before"
    assert scales.shape[1] == -(-columns // BLOCK), "the source is checked before"
    needed = scales[begin:end].float().contiguous()
    filled = out if out.dtype == torch.bfloat16 else torch.empty(rows, columns, dtype=torch.bfloat16)
    args = (codes.data_ptr(), needed.data_ptr(), filled.data_ptr(), rows, columns, first, BLOCK)
    launch(dequantize, rows, args, rows * columns)
    if filled is not out:
        out.copy_(filled)
