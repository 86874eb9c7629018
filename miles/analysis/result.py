"""The result of an analysis as plain values, for JSON, terminal and page; and the words of its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from miles.analysis import measure, simulate
from miles.analysis.causes import Cause
from miles.analysis.context import worst_tokens
from miles.analysis.experts import by_expert
from miles.analysis.recommend import Recommendation
from miles.analysis.state import State
from miles.analysis.verdict import Verdict

SCHEMA = "miles.mismatch/1"
WORDS = {
    "mean_diff": "mean d", "abs_diff": "mean |d|", "rms_diff": "root mean square of d", "max_abs_diff": "greatest |d|", "kl_k1": "KL(rollout‖train), k1",
    "kl_k2": "k2", "kl_k3": "k3", "reverse_kl": "KL(train‖rollout)", "ratio_mean": "mean ratio", "ratio_std": "its deviation", "chi2_token": "χ²",
    "ess": "effective sample size", "equal_share": "same bits", "slope": "slope, train on rollout", "pearson": "correlation",
    "abs_diff_p50": "median |d|", "abs_diff_p99": "99 % of |d| below", "abs_diff_p99.99": "99.99 % of |d| below",
}  # fmt: skip
COLUMNS = {"tokens": "tokens", "mean_diff": "mean d", "abs_diff": "mean |d|", "kl_k3": "k3", "ratio_mean": "mean ratio", "ess": "ESS", "equal_share": "same bits"}
ODD = {
    "rollout NaN": "rollout_nan", "rollout −∞": "rollout_infinite", "rollout beyond ±1,000 nats": "rollout_absurd",
    "train NaN": "train_nan", "train −∞": "train_infinite", "train beyond ±1,000 nats": "train_absurd",
}  # fmt: skip


def result(path: Path, state: State, tokens: dict[str, Any], verdict: Verdict, recommendation: Recommendation | None, causes: Sequence[Cause] = ()) -> dict[str, Any]:
    """Everything that was found; without a recommendation (of the core pass) the totals alone."""
    found = {"schema": SCHEMA, "run": str(path), "verdict": verdict.word, "why": verdict.why, "advice": verdict.advice, "tokens": tokens}
    if recommendation is None:
        return {**found, "read": measure.counts_of(state)}
    return {
        **found,
        "causes": [asdict(each) for each in causes],
        "intervals": measure.intervals(state),
        "sequences": measure.sequence_metrics(state),
        "first_divergence": measure.first_divergence(state),
        "slices": measure.slices(state),
        "experts": by_expert(state.experts),
        "route_files_gone": len(state.experts.gone),
        "places": simulate.places(state),
        "corrections": simulate.simulated(state, tokens),
        "recommendation": asdict(recommendation),
        "token_ids": measure.worst_token_ids(state),
        "worst_tokens": worst_tokens(path, state),
        "read": measure.counts_of(state),
    }


def facts(found: Mapping[str, Any]) -> str:
    """What was read, in one line."""
    read = found["read"]
    skipped = [f"{count} {words}" for count, words in ((read["not_trained_on"], "batches not trained on"), (read["other_batches"], "supervised batches")) if count]
    return f"{read['steps']} steps, {read['sequences']} sequences, {found['tokens']['tokens']} tokens compared" + (f"; passed over: {', '.join(skipped)}" if skipped else "")


def not_recorded(found: Mapping[str, Any]) -> list[str]:
    """Names of slices that the run's files say nothing of."""
    names = [name.replace("_", " ") for name, rows in found["slices"].items() if rows is None]
    gone = f" ({found['route_files_gone']} route files are gone: retention deletes them first)" if found["route_files_gone"] else ""
    return names if found["experts"] else [*names, f"expert{gone}"]


def passed_over(found: Mapping[str, Any]) -> str:
    """Tokens that can't be compared, by kind; nothing where there are none."""
    if not found["tokens"]["not_comparable"]:
        return ""
    kinds = ", ".join(f"{found['read'][name]} {words}" for words, name in ODD.items() if found["read"][name])
    return f"{found['tokens']['not_comparable']} tokens under the loss mask can't be compared" + (f": {kinds}" if kinds else "")
