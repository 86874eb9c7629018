"""A setting of training's own correction with bounds from the data, as YAML that a recipe can include; or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles.analysis import simulate
from miles.analysis.corrections import Setting
from miles.analysis.state import State
from miles.analysis.verdict import Verdict
from miles.config.exits import UserError
from miles.config.stdout import printable
from miles.data.store.files import check_target, seal_bytes, writing

ENOUGH, LARGE = 1e-4, 1e-2  # k3 from which on a correction pays; from which on it must also hold small ratios
LEAST, MOST, MOST_ROUTED = 1.2, 2.0, 1.5  # upper bounds: the tightest; the widest; the widest where routing differs or k3 is large
LOW = 0.5  # the lower bound where k3 is large


@dataclass(frozen=True)
class Recommendation:
    """reason: in one sentence. settings: of `algorithm`, None where nothing is recommended. outcome: a row of simulate.simulated()."""

    reason: str
    settings: dict[str, Any] | None = None
    outcome: dict[str, Any] | None = None


def recommend(state: State, tokens: dict[str, Any], verdict: Verdict) -> Recommendation:
    """What to set. Training truncates token by token; what else the simulator judges, it can't do yet."""
    k3 = tokens["kl_k3"]
    if verdict.word == "bitwise":
        return Recommendation("nothing is recommended: every token has the same bits on both sides, so every ratio is 1")
    if verdict.word == "broken":
        return Recommendation(f"nothing is recommended: {verdict.why[0]}, and no correction mends a bug")
    if k3 < ENOUGH:
        return Recommendation(f"nothing is recommended: k3 is {k3:.3g}, below {ENOUGH:g}, and every ratio close to 1")
    routed = any(layers and values[0] for layers, values in state.slices.values("layers_routed_differently").items())
    most = MOST_ROUTED if routed or k3 >= LARGE else MOST
    below, above = simulate.token_bounds(state)
    low, high = LOW if k3 >= LARGE else 0.0, min(max(above, LEAST), most)
    why = f"k3 is {k3:.3g}; at most one token in {1 / simulate.TAIL:,.0f} has a ratio above {above:g}"
    if high != above:
        why += f", and {high:g} is {'the widest bound that is customary here' if high == most else 'as tight as it need be'}"
    if k3 >= LARGE:
        why += f"; from a k3 of {LARGE:g} on, ratios below {LOW:g} are held, too (one in {1 / simulate.TAIL:,.0f} is below {below:g})"
    if routed:
        why += "; layers were routed differently, which replaying routes in training would end"
    if verdict.word == "biased":
        why += "; but the mismatch is more than noise: look at its cause first"
    [outcome] = simulate.judged(state, Setting(f"recommended: TIS {f'{low:g} to' if low else 'up to'} {high:g}", mode="truncate", low=low, high=high))
    return Recommendation(why, {"use_tis": True, "tis_clip": float(high), "tis_clip_low": float(low)}, outcome)


def refuse_to_replace(target: Path) -> None:
    """UserError where the file is there already, or has no folder."""
    check_target(target, "a YAML file")
    if target.exists():
        raise UserError(f"{target}: is there already; give another name, or remove it")


def write_overlay(recommendation: Recommendation, target: Path, run: Path, tokens: dict[str, Any]) -> None:
    """A YAML file to name after a recipe's own. There must be a setting; UserError rather than replace a file."""
    assert recommendation.settings is not None
    assert recommendation.outcome is not None
    there = recommendation.outcome
    lines = [
        f"# A correction for the mismatch that tools/analyze/logprob_mismatch.py found over {tokens['tokens']} tokens of",
        f"# {printable(str(run))}",
        f"# Why: {recommendation.reason}.",
        f"# On those tokens it clips {100 * there['clipped']:.3g} %; effective sample size {there['ess']:.4g} (without bounds {tokens['ess']:.4g}), bias {there['bias']:.3g}.",
        overlay_text(recommendation.settings),
    ]
    refuse_to_replace(target)
    with writing(target):
        seal_bytes(target, ("\n".join(lines) + "\n").encode())


def overlay_text(settings: dict[str, Any]) -> str:
    """Settings of `algorithm` as YAML."""
    return "\n".join(["algorithm:", *(f"  {name}: {str(value).lower()}" for name, value in settings.items())])
