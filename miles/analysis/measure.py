"""Metrics out of a state: each a plain number, computed from sums that were rounded once."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles.analysis import exact
from miles.analysis.slices import BOUNDARY_SLICES, SLICES, TOKEN_SLICES, label, position_label
from miles.analysis.state import ODD, SEEN, State
from miles.analysis.terms import BINS, COUNTS, SEQUENCE_HISTOGRAMS, SEQUENCE_SUMS, SUMS, TAUS, TOKEN_VALUES, VALUES

QUANTILES = (0.5, 0.9, 0.99, 0.999, 0.9999)
INTERVAL = (0.025, 0.975)
FEWEST = 8
HALF = BINS // 2  # bins from here on are of negative numbers


def token_metrics(state: State, core: bool = False) -> dict[str, float | int | None]:
    """Over all tokens that count. None where there are none, or where a spread is 0. core: what the core sums give."""
    s = dict(zip(SUMS, exact.value(state.sums).tolist(), strict=True))
    counts = dict(zip(COUNTS, state.counts.tolist(), strict=True))
    n = counts["tokens"]
    found: dict[str, float | int | None] = {**counts, "not_comparable": counts["masked"] - n, "absurd": int(sum(state.odd[ODD.index(f"{side}_absurd")] for side in ("rollout", "train")))}
    if not n:
        return found
    found |= ratio_metrics(np.array([n, s["d"], s["abs"], s["d2"], s["k3"], s["t"], s["t2"], counts["equal_bits"]]))
    found["max_abs_diff"] = state.greatest
    found["std_diff"] = math.sqrt(max(s["d2"] / n - (s["d"] / n) ** 2, 0.0))
    size = state.histogram[:HALF] + state.histogram[HALF:]
    found |= {f"abs_diff_p{100 * q:g}": quantile(size, q) for q in QUANTILES}
    found |= {f"diff_p{100 * q:g}": signed_quantile(state.histogram, q) for q in (0.01, 0.5, 0.99)}
    if core:
        return found
    found["reverse_kl"] = (s["d"] + s["td"] - s["t"]) / n if abs(s["d"]) < 1e300 else None
    mean, spread = s["mu"] / n, s["mu2"] / n - (s["mu"] / n) ** 2
    product = s["mud"] / n - mean * s["d"] / n  # covariance of mu and d
    other = spread + 2 * product + s["d2"] / n - (s["d"] / n) ** 2
    found["slope"] = 1 + product / spread if spread > 0 else None
    found["pearson"] = min((spread + product) / math.sqrt(spread * other), 1.0) if spread > 0 and other > 0 else None
    found["rollout_logprob"], found["train_logprob"] = mean, mean + s["d"] / n
    return found


def ratio_metrics(values: NDArray[np.float64]) -> dict[str, float]:
    """The metrics that every slice has, from sums [8] named by VALUES; at least one token."""
    v = dict(zip(VALUES, values.tolist(), strict=True))
    n = v["tokens"]
    ratio = 1 + v["t"] / n
    square = 1 + (2 * v["t"] + v["t2"]) / n
    return {
        "mean_diff": v["d"] / n,
        "abs_diff": v["abs"] / n,
        "rms_diff": math.sqrt(v["d2"] / n),
        "kl_k1": 0.0 - v["d"] / n,
        "kl_k2": v["d2"] / n / 2,
        "kl_k3": v["k3"] / n,
        "ratio_mean": ratio,
        "ratio_std": math.sqrt(max(v["t2"] / n - (v["t"] / n) ** 2, 0.0)),
        "chi2_token": square - 1,
        "ess": ratio * ratio / square if square > 0 else 0.0,  # every ratio is lost in the rounding of 1
        "equal_share": v["equal_bits"] / n,
    }


def intervals(state: State) -> dict[str, list[float]]:
    """95 % intervals of the bootstrap by sequence."""
    replicates = [ratio_metrics(row) for row in exact.value(state.bootstrap) if row[0]]
    if not replicates:
        return {}
    return {name: np.quantile([each[name] for each in replicates], INTERVAL).tolist() for name in replicates[0]}


def standard_errors(state: State) -> dict[str, float]:
    """Deviations over the bootstrap by sequence; nothing of fewer than FEWEST sequences, which don't say how much they spread."""
    if exact.value(state.sequence_sums)[SEQUENCE_SUMS.index("sequences")] < FEWEST:
        return {}
    replicates = [ratio_metrics(row) for row in exact.value(state.bootstrap) if row[0]]
    return {name: float(np.std([each[name] for each in replicates], ddof=1)) for name in replicates[0]}


def sequence_metrics(state: State) -> dict[str, Any]:
    """Over sequences with a token that counts; with S the sum of d over such a sequence, weights are e^S, S held to ±20."""
    s = dict(zip(SEQUENCE_SUMS, exact.value(state.sequence_sums).tolist(), strict=True))
    n = s["sequences"]
    if not n:
        return {"sequences": 0}
    found: dict[str, Any] = {
        "sequences": int(n),
        "ratio_mean": s["w"] / n,
        "chi2_sequence": s["w2"] / n - 1,
        "ess": s["w"] ** 2 / (n * s["w2"]),
        "perplexity_ratio": s["ppl"] / n,
        "abs_mean_diff": s["abs_mean"] / n,
        "drift": 1000 * s["drift"] / n,
        "abs_drift": 1000 * s["abs_drift"] / n,
    }
    for name, histogram in zip(SEQUENCE_HISTOGRAMS, state.sequence_histogram, strict=True):
        found |= {f"{name}_p{100 * q:g}": signed_quantile(histogram, q) for q in (0.01, 0.5, 0.99)}
    return found


def first_divergence(state: State) -> list[dict[str, Any]]:
    """For each threshold: sequences that never exceed it, and where the others first do."""
    found = []
    for tau, row in zip(TAUS, state.divergence, strict=True):
        places = {position_label(i): int(count) for i, count in enumerate(row[1:]) if count}
        found.append({"threshold": tau, "never": int(row[0]), "positions": places})
    return found


def slices(state: State) -> dict[str, list[dict[str, Any]] | None]:
    """Rows of each slice; None where the run's files don't record what it slices by."""
    found: dict[str, list[dict[str, Any]] | None] = {}
    for name in SLICES:
        rows = []
        for key, values in state.slices.values(name).items():
            if values[0]:
                rows.append({"value": label(name, key) if name in TOKEN_SLICES or name in BOUNDARY_SLICES else key, "tokens": int(values[0]), **ratio_metrics(values)})
        found[name] = rows or None
    for name, empty in (("speculative", "plain"), ("prefix_cache", "no hit"), ("entropy", "not recorded")):
        if (there := found[name]) is not None and [row["value"] for row in there] == [empty]:
            found[name] = None
    return found


def worst_token_ids(state: State, most: int = 20, prior: float = 100.0) -> list[dict[str, Any]]:
    """Token ids by mean |d|, drawn towards the mean of all as if `prior` tokens more had that: rare ids don't lead by chance."""
    tokens = state.tokens
    if not len(tokens.ids):
        return []
    digits = tokens.digits[: len(tokens.ids)]
    whole = exact.value(digits.sum(0))
    mean = whole[TOKEN_VALUES.index("abs")] / max(whole[0], 1.0)

    def pulled(count: NDArray[np.float64], size: NDArray[np.float64]) -> NDArray[np.float64]:
        return (size + prior * mean) / (count + prior)

    near = np.lexsort((tokens.ids, -pulled(*exact.rough(digits[:, :2]).T)))[: 2 * most]
    ids, values = tokens.ids[near], exact.value(digits[near])
    count, size, total, k3 = values.T
    drawn = pulled(count, size)
    order = [i for i in np.lexsort((ids, -drawn)) if count[i]][:most]
    return [
        {"token_id": int(ids[i]), "tokens": int(count[i]), "abs_diff": size[i] / count[i], "mean_diff": total[i] / count[i], "kl_k3": k3[i] / count[i], "drawn": drawn[i]}
        for i in order
    ]


def quantile(histogram: NDArray[np.int64], q: float) -> float:
    """The middle of the bin that holds the q-quantile of non-negative numbers: within 3.2 % of it; bins [BINS / 2]."""
    reach = np.cumsum(histogram)
    return middle(int(np.searchsorted(reach, math.ceil(q * reach[-1]) or 1)))


def signed_quantile(histogram: NDArray[np.int64], q: float) -> float:
    """quantile() of signed numbers; bins [BINS]."""
    falling = np.concatenate([histogram[:HALF - 1 : -1], histogram[:HALF]])  # the most negative first
    reach = np.cumsum(falling)
    place = int(np.searchsorted(reach, math.ceil(q * reach[-1]) or 1))
    return -middle(HALF - 1 - place) if place < HALF else middle(place - HALF)


def middle(bin: int) -> float:
    """Of a bin of non-negative float32, by its upper 13 bits; 0 of the first, which holds 0 and numbers below 1e-38 alone."""
    low, high = (np.array([each << 19], np.uint32).view(np.float32)[0] for each in (bin, bin + 1))
    return float((np.float64(low) + np.float64(high)) / 2) if bin else 0.0


def counts_of(state: State) -> dict[str, Any]:
    """What was read, and which log-probs under the mask can't be compared."""
    seen = dict(zip(SEEN, state.seen.tolist(), strict=True))
    return {**seen, **dict(zip(ODD, state.odd.tolist(), strict=True))}
