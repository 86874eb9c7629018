"""Routing: tokens that the trainer sent to other experts differ more, and so do those after them, through the cache."""

from __future__ import annotations

import math

from miles.analysis.causes.cause import Case, Found

CERTAIN, LEAST = 5.0, 0.7
SPREAD = 2.2  # of the log of the square of one Gaussian number: π / √2
LOUD = 0.2  # noise of a logit that no arithmetic of 16 bits makes
ADVICE = "replay the engine's routes in training"
CONFIRM = "train one step with routes replayed, and one without"


def look(case: Case) -> Found | None:
    alike, other, after = (case.parts[name] for name in ("routed_alike", "routed_otherwise", "after_another_route"))
    rerouted = case.classes["rerouted"]
    if not other["tokens"] and not rerouted["tokens"]:
        return None
    pair = case.pairs
    n = pair["sequences"]
    if n:
        mean = pair["log"] / n
        spread = max(math.sqrt(max(pair["log2"] / n - mean * mean, 0.0)), SPREAD)
        z = mean * math.sqrt(n) / spread
        if z > CERTAIN and mean > LEAST:
            reference = alike if alike["clear"] >= 100 else after
            level = min(reference["r2"] / max(reference["noise"], 1e-300), other["r2"] / max(other["noise"], 1e-300) * math.exp(-mean))
            variance = other["r2"] * -math.expm1(-mean) + max(after["r2"] - level * after["noise"], 0.0) + rerouted["d2"]
            share = other["tokens"] / max(case.parts["all"]["tokens"], 1)
            return Found("routing", variance, [f"{100 * share:.3g} % of the tokens went to other experts in some layer; their differences have {math.exp(mean):.3g} times the variance of those routed alike ({z:.1f} standard errors)"], ADVICE, CONFIRM)
    whole = case.parts["all"]
    loud = whole["r2"] > LOUD**2 * whole["noise"]
    if (not n or rerouted["sequences"] > 0.5 * case.sequences) and other["tokens"] >= 0.5 * whole["tokens"] and (loud or rerouted["tokens"]):
        variance = whole["r2"] + rerouted["d2"]
        return Found("routing", variance, ["nearly every token went to other experts in some layer, so that there are none to compare with; the differences are beyond those of arithmetic"], ADVICE, CONFIRM)
    return None
