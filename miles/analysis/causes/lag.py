"""Policy lag: tokens of older weights differ more than those of the newest in the same steps."""

from __future__ import annotations

import numpy as np

from miles.analysis.causes.cause import Case, Found
from miles.analysis.evidence import CELL

CERTAIN, LEAST = 4.5, 0.1
COUNT, LOG, LOG2, R2 = (CELL.index(name) for name in ("sequences", "log", "log2", "r2"))
ADVICE = "let fewer steps pass between a rollout and its training, or correct by the ratio of old and new policy"
CONFIRM = "score a lagging batch with the weights that generated it: the difference must fall to that of lag 0"


def look(case: Case) -> Found | None:
    values, table = case.cells("lag")
    whole = table.sum(0)
    behind = np.array([value > 0 for value in values], bool)
    if not behind.any():
        return None
    if behind.all() and len(values) == 1:
        return Found("policy lag", max(float(whole[:, R2].sum()), 0.0), [f"every token is {values[0]} versions behind the policy, so that nothing can be told from noise"], ADVICE, CONFIRM)
    reference = int(np.argmin(values))
    older = np.arange(len(values)) != reference
    both = (table[:, reference, COUNT] >= 2) & (table[:, older, COUNT].sum(1) >= 2)
    used = table[both] if both.any() else table.sum(0, keepdims=True)
    n0, n1 = used[:, reference, COUNT], used[:, older, COUNT].sum(1)
    if n0.sum() < 2 or n1.sum() < 2:
        return None
    shift = used[:, older, LOG].sum(1) / n1 - used[:, reference, LOG] / n0
    count = table[..., COUNT]
    spread = (table[..., LOG2].sum() - (table[..., LOG] ** 2 / np.maximum(count, 1)).sum()) / max(np.maximum(count - 1, 0).sum(), 1)
    weight = 1 / (max(spread, 1e-4) * (1 / n0 + 1 / n1))
    z, mean = (weight * shift).sum() / np.sqrt(weight.sum()), (weight * shift).sum() / weight.sum()
    if z < CERTAIN or mean < LEAST:
        return None
    logs = whole[:, LOG] / np.maximum(whole[:, COUNT], 1)
    more = np.maximum(logs - logs[reference], 0.0)
    excess = float((whole[:, R2] * -np.expm1(-more)).sum())
    sizes = ", ".join(f"lag {value}: {size:.2g}" for value, size, row in zip(values, np.exp(more), whole, strict=True) if row[COUNT])
    return Found("policy lag", excess, [f"the variance of differences rises with the lag ({sizes} times that of the least; {z:.1f} standard errors)"], ADVICE, CONFIRM)
