"""Accuracy of an evaluation, with its interval. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from miles.data.sample import Sample, Status

Z_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


def wilson(share: float, n: float, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share observed in n trials (Wilson 1927); (0, 1) for n = 0."""
    if n <= 0:
        return 0.0, 1.0
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    return max(0.0, low), min(1.0, high)


def summarise(samples: Iterable[Sample]) -> dict[str, float]:
    """Metrics of an evaluation (summarise_sequences) from its samples."""
    rows = list(samples)
    return summarise_sequences(
        {
            "draw": np.array([s.draw for s in rows], np.uint64),
            "reward": np.array([s.reward for s in rows], np.float32),
            "status": np.array([s.status for s in rows], np.uint8),
            "response_length": np.array([s.response_length for s in rows], np.int64),
        }
    )


def summarise_sequences(sequences: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of an evaluation from arrays of S samples: draw u64, reward f32, status u8, response_length (or offset and prompt_length).

    A sample is right when its reward is 1 (or more). eval/accuracy is the share of right samples, averaged by prompt; its interval
    is Wilson's at 95 % with n = prompts, since samples of one prompt are not independent. Raises ValueError without samples.
    """
    draw, reward = np.asarray(sequences["draw"]), np.asarray(sequences["reward"], np.float64)
    if len(draw) == 0:
        raise ValueError("an evaluation without samples; its data set is empty")
    length = sequences.get("response_length")
    if length is None:
        length = np.diff(np.asarray(sequences["offset"]).astype(np.int64)) - np.asarray(sequences["prompt_length"]).astype(np.int64)
    _, group = np.unique(draw, return_inverse=True)
    right = np.bincount(group, weights=reward >= 1.0) / np.bincount(group)
    accuracy, n = float(right.mean()), len(right)
    low, high = wilson(accuracy, n)
    return {
        "eval/accuracy": accuracy,
        "eval/accuracy_low": low,
        "eval/accuracy_high": high,
        "eval/n": n,
        "eval/reward": float(reward.mean()),
        "eval/response_len/mean": float(np.mean(length)),
        "eval/truncated_ratio": float(np.mean(np.asarray(sequences["status"]) == Status.TRUNCATED)),
    }
