"""A promise falls when a resumed run computes otherwise, stays down, and says why."""

from __future__ import annotations

from typing import Any

import pytest

from miles.config.compose import load_config
from miles.config.schema import RunConfig
from miles.plan.tier import facts, promise

HOST = {"machine": "x86_64", "cpu": "Xeon A", "gpus": [], "versions": {"torch": "2.9.1", "numba": "0.62", "transformers": "4.57", "h5py": "3.1", "sympy": "1.14", "reasoning-gym": "0.1"}, "cpus": 8, "host": "a", "time": 1.0}


def configuration(*overrides: str) -> RunConfig:
    return load_config([], ["rollout.reward.type=exact_match", *overrides])


def entry(config: RunConfig, **more: Any) -> dict[str, Any]:
    return {**HOST, **facts(config), "tier": "exact", "why": "synchronous", **more}


@pytest.mark.parametrize(
    ("overrides", "host", "name", "changed"),
    [
        ([], {}, "exact", []),
        ([], {"host": "b", "cpus": 64, "time": 2.0}, "exact", []),
        ([], {"versions": {**HOST["versions"], "h5py": "3.2"}}, "exact", []),
        (["num_rollout=9", "checkpoint.retain=5", "cluster.port=1234"], {}, "exact", []),
        (["cluster.threads=1"], {}, "replayed", ["threads 2 → 1"]),
        ([], {"cpu": "Epyc B"}, "replayed", ["cpu Xeon A → Epyc B"]),
        ([], {"machine": "aarch64", "cpu": None}, "replayed", ["machine x86_64 → aarch64"]),
        ([], {"gpus": ["H200"]}, "replayed", ["gpus none → H200"]),
        ([], {"versions": {**HOST["versions"], "torch": "2.10.0", "numba": "0.63"}}, "replayed", ["torch 2.9.1 → 2.10.0", "numba 0.62 → 0.63"]),
        ([], {"versions": {k: v for k, v in HOST["versions"].items() if k != "transformers"}}, "replayed", ["transformers 4.57 → none"]),
        ([], {"versions": {**HOST["versions"], "reasoning-gym": "0.2", "sympy": "1.15"}}, "replayed", ["sympy 1.14 → 1.15", "reasoning-gym 0.1 → 0.2"]),
        (["train.num_gpus_per_node=2"], {}, "accounted", ["ranks 1 → 2"]),
        (["train.num_gpus_per_node=2", "cluster.threads=1"], {}, "accounted", ["ranks 1 → 2", "threads 2 → 1"]),
        (["rollout.batch_invariant=false"], {}, "replayed", ["kernels embedded, batch-invariant, float32, cpu → embedded, not batch-invariant, float32, cpu"]),
    ],
)
def test_what_makes_a_promise_fall(overrides, host, name, changed):
    before = entry(configuration("cluster.threads=2"))
    now = configuration("cluster.threads=2", *overrides)
    tier, found = promise(now, before, {**HOST, **facts(now), **host})
    assert (tier.name, found) == (name, changed)
    if changed and "batch_invariant" not in str(overrides):
        assert changed[0] in tier.why


def test_what_has_fallen_stays_down_and_keeps_its_reason():
    one, two = configuration("cluster.threads=1"), configuration("cluster.threads=2")
    fell, _ = promise(one, entry(two), {**HOST, **facts(one)})
    again, changed = promise(one, entry(one, tier=fell.name, why=fell.why), {**HOST, **facts(one)})
    assert (again, changed) == (fell, [])
    back, changed = promise(two, entry(one, tier=fell.name, why=fell.why), {**HOST, **facts(two)})
    assert (back, changed) == (fell, ["threads 1 → 2"])


def test_a_weaker_plan_is_not_lifted_by_equal_facts():
    bfloat = configuration("cluster.device=cuda", "model.dtype=bfloat16", "rollout.batch_invariant=false")
    tier, changed = promise(bfloat, entry(bfloat, tier="accounted"), {**HOST, **facts(bfloat)})
    assert (tier.name, changed) == ("accounted", [])


def test_nothing_to_go_on_from_and_older_records_change_nothing():
    config = configuration()
    assert promise(config, None, HOST)[0].name == "exact"
    assert promise(config, {"epoch": 1, "tier": "exact"}, {**HOST, **facts(config)}) == (promise(config, None, HOST)[0], [])
