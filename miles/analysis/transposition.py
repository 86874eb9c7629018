"""Eight vectors of 16 tokens turned into rows of eight, one a token: cheap steps within the quarters of a vector first, whole rows, two a vector, when they are needed."""

from __future__ import annotations

from llvmlite import ir

from miles.analysis.terms import WIDE
from miles.analysis.vectors import I32, IVEC

COLUMNS = 8
ORDER = tuple(8 * half + 4 * second + j for j in range(4) for half in range(2) for second in range(2))  # in which tokens come out, in pairs


def fours(b: ir.IRBuilder, columns: list[ir.Value]) -> list[ir.Value]:
    """Of four vectors of 16 tokens: vectors of four tokens, four values of each together. The i-th one has tokens i, 4 + i, 8 + i, 12 + i."""
    pairs = [_woven(b, columns[i], columns[i + 1], 1, half) for half in range(2) for i in (0, 2)]
    return [_woven(b, pairs[i], pairs[i + 1], 2, half) for i in (0, 2) for half in range(2)]


def _woven(b: ir.IRBuilder, one: ir.Value, other: ir.Value, size: int, half: int) -> ir.Value:
    """Of each quarter of two vectors one half, `size` lanes of each in turn."""
    lanes = [4 * quarter + 2 * half + k + side for quarter in range(4) for start in range(0, 2, size) for side in (0, WIDE) for k in range(start, start + size)]
    return b.shuffle_vector(one, other, ir.Constant(IVEC, lanes))


def pair_of(b: ir.IRBuilder, one: ir.Value, other: ir.Value, which: int) -> ir.Value:
    """Rows of two tokens out of four first halves and four second ones."""
    lanes = [4 * lane + i + side for lane in (2 * which, 2 * which + 1) for side in (0, WIDE) for i in range(4)]
    return b.shuffle_vector(one, other, ir.Constant(IVEC, lanes))


def half(b: ir.IRBuilder, both: ir.Value, which: int) -> ir.Value:
    """The lower or upper half of a vector."""
    size = both.type.count // 2
    return b.shuffle_vector(both, both, ir.Constant(ir.VectorType(I32, size), list(range(which * size, (which + 1) * size))))
