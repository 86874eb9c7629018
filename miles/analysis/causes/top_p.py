"""Log-probs renormalised over what top-p or top-k kept: d is the log of the kept mass, never above 0."""

from __future__ import annotations

from miles.analysis.causes.cause import Case, Found

CERTAIN, LEAST = 6.0, 0.004
NAME = "top-p or top-k"
ADVICE = "let the engine report log-probs before top-p and top-k (raw), or renormalise the trainer's over the same tokens"
CONFIRM = "sample one batch with top_p 1 and top_k off: the difference must vanish"


def recorded(case: Case) -> bool:
    """Whether the kept mass is; without it the slope of a temperature can be top-p's."""
    return case.folds["kept"] >= 0.5 * case.folds["tokens"] > 0


def look(case: Case) -> Found | None:
    slope, error, variance = case.slopes["top_p"]
    if recorded(case):
        if slope < CERTAIN * error or not 0.5 < slope < 1.5 or variance < LEAST * case.total:
            return None
        return Found(NAME, variance, [f"d follows the log of the recorded kept mass, with slope {slope:.4g} ± {error:.2g} (1: renormalised, 0: not)"], ADVICE, CONFIRM)
    ratio, error = case.mean_of_folds("t")
    above = case.folds["d2_above"]
    if case.folds["tokens"] and ratio < -CERTAIN * error and 2 * above < 0.9 * case.folds["d2"] and not case.folds["far"]:
        return Found(
            NAME, case.folds["d2"] - 2 * above,
            [f"the mean ratio is {1 + ratio:.4g} ± {error:.2g}: the trainer's probabilities of sampled tokens are below the engine's, which sum to 1 over fewer tokens",
             f"one-sided: {100 * above / case.folds['d2']:.2g} % of the sum of d² is of d above 0"],
            ADVICE, CONFIRM,
        )  # fmt: skip
    return None
