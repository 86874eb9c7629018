"""One engine, trainer rank or node whose weights are off: its sequences differ more than those of the others in the same steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles.analysis.causes.cause import Case, Found
from miles.analysis.evidence import CELL

CERTAIN = 5.0  # standard errors
LEAST = 0.1  # of the log of r²: a difference too small to matter
FEWEST = 4  # sequences
COUNT, LOG, LOG2, R2, FAR = (CELL.index(name) for name in ("sequences", "log", "log2", "r2", "far_r2"))


@dataclass
class Off:
    """A copy that is off in windows [first, last]."""

    factor: str
    value: Any
    z: float
    excess: float
    far: float
    ratio: float
    windows: str


def find(case: Case) -> list[Off]:
    """The copies that are off: an engine; and a rank or its node, whichever explains more."""
    engine, rank, node = (_greatest(factor, *case.cells(factor)) for factor in ("engine", "rank", "node"))
    trainer = max((each for each in (rank, node) if each), key=lambda each: each.z, default=None)
    return [each for each in (engine, trainer) if each]


def describe(off: Off) -> Found:
    side = "the engine's weights: compare checksums of tensors after a sync" if off.factor == "engine" else "the trainer's weights or kernels there: compare checksums of tensors over ranks"
    return Found(
        f"one {off.factor} off", off.excess,
        [f"{off.factor} {off.value}{off.windows}: the variance of its differences is {off.ratio:.3g} times that of the others in the same steps ({off.z:.1f} standard errors)"],
        f"look at {side}",
        "score one sequence of its batch with each copy: only this one differs",
    )  # fmt: skip


def _greatest(factor: str, values: list[Any], table: NDArray[np.float64]) -> Off | None:
    if len(values) < 2:
        return None
    count, total = table[..., COUNT], table[..., LOG]
    log2 = table[..., LOG2]
    freedom = np.maximum(count - 1, 0).sum()
    if freedom < FEWEST:
        return None
    pooled = max((log2.sum() - (total**2 / np.maximum(count, 1)).sum()) / freedom, 1e-4)
    others, rest, rest2 = (each.sum(1, keepdims=True) - each for each in (count, total, log2))
    usable = (count >= FEWEST) & (others >= FEWEST)
    weight = np.where(usable, 1 / (_spread(count, total, log2, pooled) / np.maximum(count, 1) + _spread(others, rest, rest2, pooled) / np.maximum(others, 1)), 0.0)
    shift = total / np.maximum(count, 1) - rest / np.maximum(others, 1)
    best = None
    for first in range(len(table)):
        w, s = np.zeros(len(values)), np.zeros(len(values))
        for last in range(first, len(table)):
            w += weight[last]
            s += weight[last] * shift[last]
            scores = s / np.sqrt(np.maximum(w, 1e-300))
            i = int(scores.argmax())
            if scores[i] > CERTAIN and s[i] > LEAST * w[i] and (best is None or scores[i] > best[0]):
                best = (float(scores[i]), i, first, last, float(s[i] / w[i]))
    if best is None:
        return None
    z, i, first, last, more = best
    mine = table[first : last + 1, i].sum(0)
    excess = float(mine[R2]) * -math.expm1(-more)
    some = "" if len(table) == 1 or last - first == len(table) - 1 else f" in {last - first + 1} of {len(table)} stretches of steps"
    return Off(factor, values[i], z, excess, float(mine[FAR]), math.exp(more), some)


def _spread(count: NDArray[np.float64], total: NDArray[np.float64], square: NDArray[np.float64], pooled: float) -> NDArray[np.float64]:
    """Variance of the logs in each cell, at least the pooled one: a few sequences far off must not speak for their copy."""
    return np.maximum((square - total**2 / np.maximum(count, 1)) / np.maximum(count - 1, 1), pooled)
