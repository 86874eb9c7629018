"""The same metrics by plain numpy in float64, token by token where that is clearest: shares nothing with miles.analysis."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np


def tokens_of(made: Any) -> dict[str, np.ndarray]:
    """Of one sequence the tokens that count: position, d, mu, o, and what they are sliced by."""
    sample, train = made.sample, made.train
    mu, o = sample.rollout_logprob.astype(np.float64), train["train_logprob"].astype(np.float64)
    fine = np.isfinite(mu) & np.isfinite(o) & (np.abs(mu) < 1e30) & (np.abs(o) < 1e30)
    at = np.flatnonzero((sample.loss_mask != 0) & fine)
    return {"at": at, "mu": mu[at], "o": o[at], "d": o[at] - mu[at]}


def ratio_metrics(d: np.ndarray, equal: np.ndarray) -> dict[str, float]:
    """Of these differences."""
    c = np.clip(d, -20, 20)
    rho = np.exp(c)
    k3 = np.where(np.abs(c) < 1e-3, c**2 / 2 + c**3 / 6 + c**4 / 24, np.expm1(c) - c)
    return {
        "mean_diff": d.mean(), "abs_diff": np.abs(d).mean(), "rms_diff": np.sqrt((d**2).mean()), "kl_k1": (-d).mean(), "kl_k2": (d**2).mean() / 2,
        "kl_k3": k3.mean(), "ratio_mean": rho.mean(), "ratio_std": rho.std(), "chi2_token": (rho**2).mean() - 1,
        "ess": rho.sum() ** 2 / (len(d) * (rho**2).sum()), "equal_share": equal.mean(),
    }  # fmt: skip


def token_metrics(made: list[Any]) -> dict[str, float]:
    """Of a whole run."""
    parts = [tokens_of(each) for each in made]
    d, mu, o = (np.concatenate([part[name] for part in parts]) for name in ("d", "mu", "o"))
    found = ratio_metrics(d, mu == o)
    c = np.clip(d, -20, 20)
    found["masked"] = sum(int((each.sample.loss_mask != 0).sum()) for each in made)
    found["tokens"] = len(d)
    found["equal_bits"] = int((mu == o).sum())
    found["not_comparable"] = found["masked"] - len(d)
    found["max_abs_diff"] = np.abs(d).max()
    found["std_diff"] = d.std()
    found["reverse_kl"] = (np.exp(c) * c - np.expm1(c)).mean()
    found["slope"] = np.polyfit(mu, o, 1)[0]
    found["pearson"] = np.corrcoef(mu, o)[0, 1]
    found["rollout_logprob"], found["train_logprob"] = mu.mean(), o.mean()
    return found


def sequence_metrics(made: list[Any]) -> dict[str, float]:
    """Over sequences with a token that counts."""
    totals, means, slopes = [], [], []
    for each in made:
        part = tokens_of(each)
        if not len(part["d"]):
            continue
        totals.append(part["d"].sum())
        means.append(part["d"].mean())
        x = part["at"] - each.sample.prompt_length
        slopes.append(np.polyfit(x, np.abs(part["d"]), 1)[0] if len(x) > 1 else 0.0)
    weight = np.exp(np.clip(totals, -20, 20))
    return {
        "sequences": len(totals), "ratio_mean": weight.mean(), "chi2_sequence": (weight**2).mean() - 1, "ess": weight.sum() ** 2 / (len(weight) * (weight**2).sum()),
        "perplexity_ratio": np.exp(-np.array(means)).mean(), "abs_mean_diff": np.abs(means).mean(),
        "drift": 1000 * np.mean(slopes), "abs_drift": 1000 * np.abs(slopes).mean(),
    }  # fmt: skip


def sliced(made: list[Any], name: str) -> dict[Any, dict[str, float]]:
    """value -> metrics, and the number of tokens."""
    bags: dict[Any, list[Any]] = defaultdict(list)
    for each in made:
        part = tokens_of(each)
        for place, d, mu, o in zip(part["at"].tolist(), part["d"], part["mu"], part["o"], strict=True):
            if (value := _value(each, name, place, mu)) is not None:
                bags[value].append((d, mu == o))
    found = {}
    for key, rows in bags.items():
        d, equal = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
        found[key] = {"tokens": len(d), **ratio_metrics(d, equal)}
    return found


def _beside(sample: Any, place: int, way: int) -> str | None:
    """What lies beyond the nearest token without the mask on this side, within 8 tokens."""
    end, far = place, 0
    while 0 <= end + way < len(sample.loss_mask) and sample.loss_mask[end + way] and (way > 0 or end > 0):
        end, far = end + way, far + 1
    if far > 7:
        return None
    beyond = end + way
    word = ("first" if far == 0 else "next 7") + " after " if way < 0 else ("last" if far == 0 else "7 earlier ones") + " before "
    if beyond < sample.prompt_length or beyond == len(sample.loss_mask):
        return word + ("the prompt" if way < 0 else "the end")
    flags = sample.flags[beyond]
    return word + ("tool output" if flags & 4 else "masked tokens" if flags & 1 else "other text")


def _value(made: Any, name: str, place: int, mu: float) -> Any:
    sample, train = made.sample, made.train
    position = place - sample.prompt_length
    version = [each for start, each in sample.runs if start <= place][-1] if sample.runs else None
    if name == "position":
        low = 1 << (position.bit_length() - 1) if position >= 8 else position
        return str(low) if position < 8 else f"{low}-{2 * low - 1}"
    if name == "rollout_probability":
        low = min(int(np.exp(mu) * 20), 19)
        return f"{low / 20:.2f}-{(low + 1) / 20:.2f}"
    if name == "entropy":
        low = int(train["entropy"][place] * 4)
        return f"{low / 4:.2f}-{(low + 1) / 4:.2f}" if low < 31 else "7.75 or more"
    if name == "turn":
        starts = np.flatnonzero(sample.flags[: place + 1] & 2)
        since = place - starts[-1] if len(starts) else 1 << 30
        return "first of a turn" if since == 0 else "next 7 of a turn" if since < 8 else "later"
    if name in ("after_boundary", "before_boundary"):
        return _beside(sample, place, 1 if name == "before_boundary" else -1)
    if name == "speculative":
        return "bonus or resampled" if sample.flags[place] & 16 else "draft accepted" if sample.flags[place] & 8 else "plain"
    if name == "reward_and_advantage":
        words = {-1: "below 0", 0: "0", 1: "above 0"}
        return f"reward {words[int(np.sign(sample.reward))]}, advantage {words[int(np.sign(train['advantage'][place]))]}"
    simple = {
        "layers_routed_differently": lambda: str(train["route_miss"][place]), "used": lambda: "trained on" if train["used"][place] else "rejected by training",
        "weight_version": lambda: version, "lag": lambda: made.version - version, "step": lambda: made.step, "engine": lambda: sample.engine,
        "train_rank": lambda: made.rank, "node": lambda: str(made.node), "source": lambda: sample.source,
        "prefix_cache": lambda: "hit" if sample.cached_tokens else "no hit", "status": lambda: "completed", "token_id": lambda: int(sample.token_id[place]),
    }  # fmt: skip
    return simple[name]()
