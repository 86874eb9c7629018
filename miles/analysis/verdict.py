"""The one line that comes first: bitwise, noise, biased or broken; why; what to do. And the limits that decide an exit code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from miles.analysis.causes import FAULTS, LAG, NOISE, Cause
from miles.analysis.terms import HUGE
from miles.config.exits import UserError

ORDER = ("bitwise", "noise", "biased", "broken")  # from the best to the worst
BROKEN_K3, BROKEN_RATIO, BROKEN_ESS, BROKEN_ODD = 0.1, 0.1, 0.3, 0.01
BIASED_SLOPE = 0.01
LITTLE_K3 = 1e-4  # nothing to do below it
CERTAIN = 5.0  # standard errors: a clean run is judged each time it is looked at, so 95 % would call one in twenty biased
UNEVEN = 2.0  # times the slope's standard error under even noise: it is greatest where the log-prob is far from its mean
FAULTY = 0.05  # of Σ d²: a fault that explains less doesn't change the word


@dataclass(frozen=True)
class Verdict:
    """One of ORDER, the reasons, and what to do."""

    word: str
    why: list[str]
    advice: str


def judge(tokens: dict[str, Any], errors: dict[str, float], causes: Sequence[Cause] = ()) -> Verdict:
    """From token metrics, their standard errors and the causes that were found, the leading one first. UserError where nothing can be judged: that is never a pass."""
    if not tokens["tokens"]:
        what = "no token is under the loss mask" if not tokens["masked"] else f"none of {tokens['masked']} tokens under the loss mask has both log-probs"
        raise UserError(f"nothing to compare: {what}")
    k3, ratio, odd = tokens["kl_k3"], tokens["ratio_mean"], tokens["not_comparable"] / tokens["masked"]
    if tokens["equal_bits"] == tokens["masked"]:
        return Verdict("bitwise", ["every token has the same bits on both sides"], "nothing to do")
    broken = []
    if k3 > BROKEN_K3:
        broken.append(f"k3 is {k3:.3g}, above {BROKEN_K3}")
    if abs(ratio - 1) > BROKEN_RATIO:
        broken.append(f"the mean ratio is {ratio:.4g}, and over the rollout's own samples it is 1")
    if tokens["ess"] < BROKEN_ESS:
        broken.append(f"the effective sample size is {tokens['ess']:.3g} of 1, below {BROKEN_ESS}")
    if odd > BROKEN_ODD:
        broken.append(f"{100 * odd:.3g} % of the tokens under the loss mask have no finite log-prob on one side")
    if tokens["absurd"]:
        broken.append(f"{tokens['absurd']} log-prob{'s are' if tokens['absurd'] > 1 else ' is'} finite and beyond ±{HUGE:,.0f} nats, which no softmax gives: a filler, or memory that isn't a log-prob")
    leading = causes[0] if causes and causes[0].name != NOISE else None
    words = [f"leading cause: {leading.name}, {100 * leading.share:.3g} % of the variance"] if leading else []
    if broken:
        return Verdict("broken", broken + words, f"stop: no correction mends this; {leading.advice if leading else 'look for a bug'}")
    biased = []
    error = errors.get("ratio_mean")
    if error is not None and abs(ratio - 1) > max(k3, CERTAIN * error):
        biased.append(f"the mean ratio is {ratio:.6g}, and 1 lies {abs(ratio - 1) / error:.3g} standard errors away: one-sided" if error else f"the mean ratio is {ratio:.6g}: one-sided")
    slope = tokens.get("slope")
    if slope is not None and abs(slope - 1) > max(BIASED_SLOPE, CERTAIN * _slope_error(tokens)):
        biased.append(f"the slope of the trainer's log-probs on the rollout's is {slope:.4g}, not 1: another temperature?")
    if leading and leading.share > FAULTY and (leading.name in FAULTS or (leading.name == LAG and k3 > LITTLE_K3)) and not biased:
        biased.append(f"k3 is {k3:.3g}, and not all of it is noise")
    if biased:
        return Verdict("biased", biased + words, leading.advice if leading else "look for a cause (sampling settings, weights, token ids) before correcting")
    return Verdict("noise", [f"k3 is {k3:.3g}, the mean ratio {ratio:.6g}", *words], _advice(k3))


def _slope_error(tokens: dict[str, Any]) -> float:
    """Standard error of the regression's slope, from its correlation."""
    fit = tokens["pearson"] ** 2
    return float(UNEVEN * abs(tokens["slope"]) * math.sqrt(max(1 - fit, 0.0) / (fit * tokens["tokens"]))) if fit else math.inf


def _advice(k3: float) -> str:
    if k3 < LITTLE_K3:
        return "nothing to do"
    if k3 < 1e-2:
        return "truncated importance sampling per token with a bound of 2 (1.5 for a mixture of experts)"
    return "first the same precision and the same routing on both sides; then token bounds 0.5 to 1.5 and rejection of sequences by their geometric mean"


def exceeded(
    tokens: dict[str, Any],
    sequences: dict[str, Any],
    above: Sequence[tuple[str, float]],
    below: Sequence[tuple[str, float]],
    difference: dict[str, Any] | None = None,
) -> list[str]:
    """Limits that are not kept, in words. difference: by metric, to another run. UserError for a metric that isn't there; one without a value is not kept."""
    known = {**tokens, **{f"sequence.{name}": value for name, value in sequences.items()}, **{f"difference.{name}": value for name, value in (difference or {}).items()}}
    found = []
    for limits, word in ((above, "above"), (below, "below")):
        for name, limit in limits:
            if name not in known:
                raise UserError(f"no metric is called {name}; there are {', '.join(known)}")
            value = known[name]
            if value is None or not (value <= limit if word == "above" else value >= limit):
                found.append(f"{name} is {'unknown' if value is None else f'{value:.6g}'}, {word} {limit:g}")
    return found
