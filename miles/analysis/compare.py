"""Two runs side by side: each metric with its difference, and whether that is more than the noise of the bootstrap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from miles.analysis import exact
from miles.analysis.measure import INTERVAL, ratio_metrics
from miles.analysis.state import State
from miles.config.exits import UserError

SCHEMA = "miles.mismatch_comparison/1"


def differences(state: State, tokens: Mapping[str, Any], other: State, other_tokens: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each metric that both have: value, against, difference (the first less the other), its 95 % interval and whether 0 lies beyond that.

    Replicates are drawn by step, draw and sample: of runs of the same prompts they take the same sequences, and what both share cancels.
    Metrics without replicates have neither interval nor judgement. UserError where there is no metric in common.
    """
    pairs = [
        (ratio_metrics(one), ratio_metrics(two))
        for one, two in zip(exact.value(state.bootstrap), exact.value(other.bootstrap), strict=True)
        if one[0] and two[0]
    ]
    rows = []
    for name, value in tokens.items():
        against = other_tokens.get(name)
        if value is None or against is None:
            continue
        interval = np.quantile([one[name] - two[name] for one, two in pairs], INTERVAL).tolist() if pairs and name in pairs[0][0] else None
        beyond = None if interval is None else not interval[0] <= 0 <= interval[1]
        rows.append({"metric": name, "value": value, "against": against, "difference": value - against, "interval": interval, "beyond_noise": beyond})
    if not rows or not tokens.get("tokens") or not other_tokens.get("tokens"):
        raise UserError("the two runs have no metric in common: nothing to compare")
    return rows


def verdict(rows: list[dict[str, Any]]) -> tuple[str, str]:
    """One word (closer, further off, alike) by k3, and why."""
    row = next(row for row in rows if row["metric"] == "kl_k3")
    said = f"k3 is {row['value']:.3g}, against {row['against']:.3g}"
    if row["interval"] is None or not row["beyond_noise"]:
        return "alike", f"{said}: no difference beyond noise"
    low, high = row["interval"]
    return "closer" if row["difference"] < 0 else "further off", f"{said}: {row['difference']:+.3g}, 95 % {low:.3g} to {high:.3g}"
