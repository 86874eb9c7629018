"""One engine, trainer rank or node whose weights are off: its sequences differ more than those of the others in the same steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles.analysis.causes.cause import Case, Found
from miles.analysis.evidence import CELL

CERTAIN = 5.0  # standard errors
LEAST = 0.1  # of the log of r²: a difference too small to matter
FEWEST = 4  # sequences
COUNT, LOG, LOG2, R2, NOISE, FAR = (CELL.index(name) for name in ("sequences", "log", "log2", "r2", "noise", "far_r2"))


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
    square = table[..., LOG2].sum() - (total**2 / np.maximum(count, 1)).sum()
    freedom = np.maximum(count - 1, 0).sum()
    if freedom < FEWEST:
        return None
    spread = max(square / freedom, 1e-4)
    others, rest = count.sum(1, keepdims=True) - count, total.sum(1, keepdims=True) - total
    usable = (count >= FEWEST) & (others >= FEWEST)
    weight = np.where(usable, 1 / (spread * (1 / np.maximum(count, 1) + 1 / np.maximum(others, 1))), 0.0)
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
                best = (float(scores[i]), i, first, last)
    if best is None:
        return None
    z, i, first, last = best
    here = table[first : last + 1]
    mine, whole = here[:, i].sum(0), here.sum((0, 1))
    level = (whole[R2] - mine[R2]) / max(whole[NOISE] - mine[NOISE], 1e-300)
    excess = max(float(mine[R2] - level * mine[NOISE]), 0.0)
    some = "" if len(table) == 1 or last - first == len(table) - 1 else f" in {last - first + 1} of {len(table)} stretches of steps"
    return Off(factor, values[i], z, excess, float(mine[FAR]), float(mine[R2] / max(level * mine[NOISE], 1e-300)), some)
