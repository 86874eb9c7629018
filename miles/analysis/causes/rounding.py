"""bf16 logits: log-probs of different tokens after the same context differ by whole multiples of a power of two; rounded log-probs end with zeros."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles.analysis.causes.cause import Case, Found
from miles.analysis.evidence import OPENING
from miles.analysis.sequence_kernels import BITS

FINEST = 12  # lattices of 2^-FINEST and coarser can be told from float32
TOLERANCE = 1e-5  # nats: what float32 leaves of a multiple
CERTAIN = 25.0  # nats of evidence against chance
MOST = 0.5  # of the pairs lie on the lattice, at least
ROUND = 6  # zeros at the end of a mantissa that are no chance
ADVICE = "compute the head and the log softmax in fp32 on both sides"
CONFIRM = "run one step with an fp32 head: the lattice must vanish"


def look(case: Case, residual: float) -> Found | None:
    """residual: Σ d² of plain sequences that nothing else explains."""
    for side, word in ((0, "rollout"), (1, "train")):
        if (bits := _mantissa(case.evidence.zeros[side])) is not None:
            variance = case.rounding[f"ulp_{word}"] * 4.0**-bits / 12
            return Found("bf16 logits", min(variance, residual), [f"the {word}'s log-probs have {bits} bits of mantissa (bf16: 7, fp16: 10)"], ADVICE, CONFIRM)
        if found := _lattice(_differences(case.evidence.openings, word)):
            step, count, share = found
            variance = step / 12 * case.parts["all"]["noise"]
            return Found(
                "bf16 logits", min(variance, residual),
                [f"the {word}'s log-probs of different tokens after the same context differ by whole multiples of 2^{round(math.log2(step) / 2)} or so: {100 * share:.0f} % of {count} pairs"],
                ADVICE, CONFIRM,
            )  # fmt: skip
    return None


def _mantissa(zeros: NDArray[np.int64]) -> int | None:
    """Bits that hold nearly every log-prob; None for those of a whole float32."""
    total = int(zeros.sum())
    reach = np.cumsum(zeros[::-1])[::-1]
    whole = np.flatnonzero(reach >= 0.98 * total)
    return BITS - 1 - int(whole[-1]) if total >= 8 and whole[-1] >= ROUND else None


def _differences(openings: NDArray[Any], side: str) -> NDArray[np.float64]:
    """Between siblings, at the first token where they part."""
    found = []
    for a, b in pairwise(openings):
        if a["key"] != b["key"] or a["prompt"] != b["prompt"] or a["version"] != b["version"]:
            continue
        count = min(int(a["count"]), int(b["count"]), OPENING)
        parts = np.flatnonzero(a["token"][:count] != b["token"][:count])
        if len(parts):
            found.append(float(a[side][parts[0]]) - float(b[side][parts[0]]))
    made = np.array(found)
    return made[np.isfinite(made)]


def _lattice(differences: NDArray[np.float64]) -> tuple[float, int, float] | None:
    """(mean square of the spacing, pairs, share of them on it); None where they lie anywhere."""
    count = len(differences)
    if count < 8:
        return None
    steps = 2.0 ** np.arange(FINEST + 1)
    scaled = differences[:, None] * steps
    on = np.abs(scaled - np.round(scaled)) < TOLERANCE * steps
    for k in range(FINEST + 1):
        share, chance = float(on[:, k].mean()), 2 * TOLERANCE * steps[k]
        if share >= MOST and count * _divergence(share, chance) > CERTAIN:
            first = on[on[:, k]].argmax(1)
            return float((4.0**-first).mean()), count, share
    return None


def _divergence(share: float, chance: float) -> float:
    """KL of two coins, nats: count times it bounds the odds of so many by chance (Chernoff)."""
    if share <= chance:
        return 0.0
    rest = (1 - share) * math.log((1 - share) / (1 - chance)) if share < 1 else 0.0
    return share * math.log(share / chance) + rest
