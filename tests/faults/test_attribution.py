"""Planted causes above their published limits come first in at least 95 of 100 runs, alone and in pairs; clean runs have noise alone, and that is the verdict.

COUNT (100): runs of each kind. SHARD=i/n runs a part of each kind; its thresholds then go by what was run.
"""

from __future__ import annotations

import os

import attribution
import pytest
from planted import CAUSES

SHARE = 0.95


def judged(trials: list[attribution.Trial], share: float) -> None:
    index, parts = (int(each) for each in os.environ.get("SHARD", "0/1").split("/"))
    outcomes = attribution.run_all(trials[index::parts], os.cpu_count() or 1)
    print(attribution.table(outcomes))
    assert sum(each.good for each in outcomes) >= share * len(outcomes), attribution.table(outcomes)


def test_every_cause_has_a_limit_that_was_swept() -> None:
    faults = {name: cause for name, cause in CAUSES.items() if cause.family != "noise"}
    assert set(attribution.LIMITS) == set(faults)
    assert all(limit in faults[name].magnitudes for name, limit in attribution.LIMITS.items())


@pytest.mark.parametrize("cause", attribution.LIMITS)
def test_a_cause_at_its_limit_comes_first(cause: str, count: int, seed: int) -> None:
    judged(attribution.alone(cause, count, 100_000 * seed), SHARE)


def test_one_of_two_causes_comes_first(count: int, seed: int) -> None:
    judged(attribution.pairs(count, 100_000 * seed), SHARE)


def test_clean_runs_have_noise_alone(count: int, seed: int) -> None:
    judged(attribution.clean(count, 100_000 * seed), 1.0)
