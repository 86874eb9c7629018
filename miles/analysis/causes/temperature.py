"""Another temperature: to first order d = (1 - 1/T)(μ + H), H the entropy, in every token, engine and rank alike."""

from __future__ import annotations

import numpy as np

from miles.analysis.causes.cause import Case, Found
from miles.analysis.evidence import CELL

CERTAIN, LEAST = 6.0, 0.004
ALIKE = 0.4  # of the slope of all, at least, in every engine, rank and lag


def look(case: Case) -> Found | None:
    slope, error, variance = case.slopes["temperature"]
    if abs(slope) < CERTAIN * error or variance < LEAST * case.total or not _everywhere(case, slope, error):
        return None
    return Found(
        "temperature", variance,
        [f"the slope of d on log-prob + entropy is {slope:.4g} ± {error:.2g}, in all engines and ranks alike: the engine's temperature is about {1 / max(1 - slope, 0.01):.4g} times the trainer's"],
        "give engine and trainer the same temperature; look at the engine's own defaults (generation_config.json)",
        "score the batch again with logits divided by that temperature: the slope must vanish",
    )  # fmt: skip


def _everywhere(case: Case, slope: float, error: float) -> bool:
    """Whether no engine, rank or lag is without it; their sums are over plain sequences."""
    if case.slopes["top_p"][2] > 0.1 * case.folds["d2"]:
        return True  # the cells' slopes are of μ + H alone
    whole = case.folds["xx"]
    for factor in ("engine", "rank", "lag"):
        _, table = case.cells(factor)
        xx, xd = table.sum(0)[:, CELL.index("xx")], table.sum(0)[:, CELL.index("xd")]
        there = xx > 0.02 * whole
        allowed = 4 * error * np.sqrt(whole / np.maximum(xx, 1e-300))
        if (xd[there] / xx[there] * np.sign(slope) + allowed[there] < ALIKE * abs(slope)).any():
            return False
    return True
