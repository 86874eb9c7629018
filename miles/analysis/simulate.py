"""What each correction would have done to a run, judged from what the pass has counted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles.analysis import exact, measure
from miles.analysis.corrections import (
    CLASS_COLUMNS,
    DENSITY,
    FIXED,
    HIGHS,
    LOWS,
    MEAN_BINS,
    TOKEN_COLUMNS,
    VETO_BINS,
    VETOES,
    WEIGHT_BINS,
    WIDTHS,
    Setting,
)
from miles.analysis.simulation_pass import PLACES
from miles.analysis.state import State

SPREADS = 3.0  # standard errors of a mean log-ratio that geometric bounds from the data leave room for
TAIL = 1e-3  # share of tokens beyond either bound from the data


def simulated(state: State, tokens: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a setting, fixed ones and then those with bounds from the data; tokens: token_metrics()."""
    return judged(state, *FIXED, *derived(state, tokens))


def judged(state: State, *settings: Setting) -> list[dict[str, Any]]:
    """A row of outcome() each."""
    classes = exact.value(state.simulation.classes).reshape(MEAN_BINS, VETO_BINS, CLASS_COLUMNS)
    weights = exact.value(state.simulation.weights)
    return [outcome(setting, classes, weights) for setting in settings]


def derived(state: State, tokens: dict[str, Any]) -> list[Setting]:
    """Settings whose bounds come from the data: the nearest of the counted bounds beyond a quantile of the ratio, or z sigma / sqrt(T)."""
    low, high = token_bounds(state)
    width = mean_width(state, tokens)
    names = f"{1 - width:g} to {1 + width:g}"
    return [
        Setting(f"data: TIS up to {high:g}", mode="truncate", high=high),
        Setting(f"data: TIS {low:g} to {high:g}", mode="truncate", low=low, high=high),
        Setting(f"data: IcePop, MIS token mask {low:g} to {high:g}", mode="mask", low=low, high=high),
        Setting(f"data: geometric {names}", geometric=(1 - width, 1 + width)),
        Setting(f"data: TIS up to {high:g}, geometric {names}", mode="truncate", high=high, geometric=(1 - width, 1 + width)),
    ]


def token_bounds(state: State) -> tuple[float, float]:
    """The tightest counted bounds (low, high) with at most some TAIL of the tokens beyond either: from the histogram, so within its bins."""
    below, above = (math.exp(min(max(measure.signed_quantile(state.histogram, q), -20.0), 20.0)) for q in (TAIL, 1 - TAIL))
    return next((low for low in LOWS if low <= below), LOWS[-1]), next((high for high in HIGHS if high >= above), HIGHS[-1])


def mean_width(state: State, tokens: dict[str, Any]) -> float:
    """The counted x next above z sigma / sqrt(T): the spread of a sequence's mean log-ratio if its tokens were independent; T tokens a sequence on average."""
    sequences = exact.value(state.simulation.weights)[:, 0].sum()
    wanted = SPREADS * tokens["std_diff"] / math.sqrt(max(tokens["tokens"] / sequences, 1.0)) if sequences else 0.0
    return next((width for width in WIDTHS if width >= wanted), WIDTHS[-1])


def outcome(setting: Setting, classes: NDArray[np.float64], weights: NDArray[np.float64]) -> dict[str, Any]:
    """What a setting would have done. classes f64 [MEAN_BINS, VETO_BINS, CLASS_COLUMNS], weights f64 [WEIGHT_BINS, 5].

    Shares: clipped (of what has a weight: tokens or sequences), masked_tokens and dropped_tokens (of tokens), dropped_sequences; effective sample size
    (sum w)^2 / (N sum w^2); bias sum |w - rho| / sum rho. What is masked or dropped has w = 0 and counts in N. With nothing left, ess is None; with no ratio left, so is bias.
    """
    found = {
        "name": setting.name, "level": setting.level, "mode": setting.mode, "low": setting.low, "high": setting.high if math.isfinite(setting.high) else None,
        "geometric": setting.geometric and list(setting.geometric), "veto": setting.veto,
    }  # fmt: skip
    if setting.level == "sequence":
        assert (setting.geometric, setting.veto) == (None, None), "no class of sequences keeps their weights"
        sums = weights[:, [0, 2, 3, 4]]
        lost, sequences = np.zeros(4), 0.0
    else:
        kept = _kept(setting)
        tokens = classes[..., : WEIGHT_BINS * len(TOKEN_COLUMNS)]
        shape = (-1, WEIGHT_BINS, len(TOKEN_COLUMNS))
        sums, lost = tokens[kept].reshape(shape).sum(0), tokens[~kept].reshape(shape).sum((0, 1))
        sequences = classes[~kept][:, -2].sum() / max(classes[..., -2].sum(), 1.0)
    beyond, held = _beyond(setting)
    n, t, t2, size = sums.T
    total = n.sum() + lost[0]
    if not total:
        return found | dict.fromkeys(("clipped", "masked_tokens", "dropped_tokens", "dropped_sequences", "ess", "bias", "mean_weight"))
    ratio = n + t
    if setting.mode == "off":
        w, w2, bias = n, n, size
    else:
        weight = held if setting.mode == "truncate" else np.zeros(WEIGHT_BINS)
        w, w2 = np.where(beyond, n * weight, ratio), np.where(beyond, n * weight**2, n + 2 * t + t2)
        bias = np.where(beyond, np.abs(ratio - n * weight), 0.0)
    outside = float(n[beyond].sum() / total) if setting.mode != "off" else 0.0
    masked, of_all = setting.mode == "mask", ratio.sum() + lost[0] + lost[1]  # 0 where every ratio is lost in the rounding of 1
    if setting.level == "sequence" and masked:
        sequences, tokens_out, masked_tokens = outside, float(weights[beyond, 1].sum() / weights[:, 1].sum()), 0.0
    else:
        tokens_out, masked_tokens = float(lost[0] / total), outside if masked else 0.0
    return found | {
        "clipped": 0.0 if masked else outside, "masked_tokens": masked_tokens, "dropped_tokens": tokens_out, "dropped_sequences": float(sequences),
        "ess": float(w.sum() ** 2 / (total * w2.sum())) if w2.sum() else None, "bias": float((bias.sum() + lost[0] + lost[1]) / of_all) if of_all > 0 else None,
        "mean_weight": float(w.sum() / total),
    }  # fmt: skip


def _beyond(setting: Setting) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Of each bin of weights: whether it lies beyond the setting's bounds, and which bound it is then held to. Bounds are among HIGHS and LOWS, or none."""
    assert setting.high in (*HIGHS, math.inf), f"{setting.name}: a bound that the pass counts by"
    assert setting.low in (*LOWS, 0.0), f"{setting.name}: a bound that the pass counts by"
    above = [high >= setting.high for high in HIGHS]
    below = [low <= setting.low for low in LOWS]
    bound = [0.0, *(setting.high if over else 0.0 for over in above), *(setting.low if under else 0.0 for under in below)]
    return np.array([False, *above, *below]), np.array(bound)


def _kept(setting: Setting) -> NDArray[np.bool_]:
    """Which classes of sequences, [MEAN_BINS, VETO_BINS], are not dropped."""
    kept = np.ones((MEAN_BINS, VETO_BINS), bool)
    if setting.geometric is not None:
        down, up = (_width(abs(bound - 1)) for bound in setting.geometric)
        for place, width in enumerate(WIDTHS):
            kept[1 + place] &= width < up
            kept[1 + len(WIDTHS) + place] &= width < down
    if setting.veto is not None:
        kept[:, 1 + VETOES.index(setting.veto) :] = False
    return kept


def _width(distance: float) -> float:
    return next(width for width in WIDTHS if math.isclose(width, distance, rel_tol=1e-6))


def places(state: State) -> dict[str, list[dict[str, Any]]]:
    """Of train ranks and of engines, by stretches of steps (each named by its first, and `last_step`): tokens, mean d and mean |d|."""
    return {
        kind: [
            {kind: name, "step": first, "last_step": last, "tokens": int(values[0]), "mean_diff": values[1] / values[0], "abs_diff": values[2] / values[0]}
            for (name, first, last), values in state.simulation.places.values(kind).items()
            if values[0]
        ]
        for kind in PLACES
    }


def density(state: State) -> NDArray[np.int64]:
    """Tokens by a quarter of a nat of -log-prob, [DENSITY rollout, DENSITY train]; one in SAMPLED."""
    assert state.simulation.density.shape == (DENSITY, DENSITY)
    return state.simulation.density
