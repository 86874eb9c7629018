"""Which guarantee a run can be given: exact, replayed or accounted (docs/formats.md), and how it falls when a resumed run computes otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miles.config.schema import RunConfig

NAMES = ("exact", "replayed", "accounted")  # from the strongest
PROMISES = {
    "exact": "an interrupted and resumed run has the bits of an undisturbed one",
    "replayed": "given the recorded batches, training has the same bits",
    "accounted": "no draw is lost, none is used twice",
}
# What bits depend on, as an attempt's entry in provenance.json has it. Another layout sums in another order: replay is gone, too.
LAYOUT = ("layout",)
BITS = ("threads", "kernels", "schedule", "machine", "cpu", "gpus")
PACKAGES = ("miles", "torch", "numba", "llvmlite", "numpy", "transformers", "tokenizers", "sglang", "megatron-core", "math-verify", "sympy", "reasoning-gym")


@dataclass(frozen=True)
class Tier:
    """A guarantee and the reason for it."""

    name: str
    promise: str
    why: str


def guarantee(config: RunConfig) -> Tier:
    """The strongest promise that the configuration allows."""
    rollout = config.rollout
    if config.cluster.device == "cuda":
        return _tier("accounted", "training kernels on cuda are not deterministic yet")
    if config.debug.reassign:
        return _tier("accounted", "batches are divided anew, so sums run in another order")
    if config.debug.recorded:
        return _tier("replayed", "deterministic on cpu, same ranks and threads")
    # Evaluations are in the promise, too.
    scored = [("reward", rollout.reward)]
    if config.eval.interval and config.eval.reward not in (None, rollout.reward):
        scored.append(("eval reward", config.eval.reward))
    types = {(reward.type or "").removeprefix("boxed_") for _, reward in scored}
    broken = [
        reason
        for reason, holds in [
            (f"engine {rollout.engine} is not batch-invariant", rollout.engine != "embedded"),
            ("rollout.batch_invariant is off", rollout.engine == "embedded" and not rollout.batch_invariant),
            (f"batch-invariant kernels are float32, not {config.model.dtype}", config.model.dtype != "float32"),
            ("a remote reward may answer differently", "remote_rm" in types),
            ("reward math gives 0 where math-verify runs out of time, as it may on a busy machine", "math" in types),
        ]
        if holds
    ]
    if broken:
        return _tier("replayed", "; ".join(broken))
    paths = [*((name, reward.path) for name, reward in scored), ("generate", rollout.generate_path), ("filter", rollout.filter_path)]
    own = [name for name, path in paths if path]
    trust = f", as far as your own {' and '.join(own)} function gives the same answer twice" if own else ""
    return _tier("exact", "synchronous, batch-invariant float32 on cpu, same ranks and threads" + trust)


def facts(config: RunConfig) -> dict[str, Any]:
    """What bits depend on of a configuration; the host's part (cpu, gpus, versions) comes from where it runs."""
    train, parallel, rollout = config.train, config.train.parallel, config.rollout
    sizes = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "context": parallel.context, "expert": parallel.expert}
    invariant = "batch-invariant" if rollout.batch_invariant and rollout.engine == "embedded" else "not batch-invariant"
    return {
        "threads": config.cluster.threads,
        "layout": {"backend": train.backend, "ranks": train.num_nodes * train.num_gpus_per_node, **sizes, "engine_ranks": rollout.num_gpus_per_engine},
        "kernels": f"{rollout.engine}, {invariant}, {config.model.dtype}, {config.cluster.device}",
        "schedule": "synchronous",
    }


def promise(config: RunConfig, before: Mapping[str, Any] | None, here: Mapping[str, Any]) -> tuple[Tier, list[str]]:
    """(what an attempt can promise, what it computes otherwise than the attempt before it, in words).

    before: that attempt's entry in provenance.json, None where nothing of it is gone on from; here: this attempt's facts. A promise
    that has fallen stays down: what was computed otherwise is in the weights.
    """
    planned = guarantee(config)
    if before is None:
        return planned, []
    moved, changed = changes(before, here, LAYOUT), changes(before, here, BITS, PACKAGES)
    found = [planned]
    if before.get("tier") in NAMES:
        found.append(_tier(str(before["tier"]), str(before.get("why", ""))))
    if changed:
        found.append(_tier("replayed", f"resumed otherwise: {', '.join(changed)}"))
    if moved:
        found.append(_tier("accounted", f"resumed otherwise: {', '.join(moved)}"))
    return max(found, key=lambda tier: NAMES.index(tier.name)), moved + changed  # of equals the first: what it fell by stays said


def changes(before: Mapping[str, Any], here: Mapping[str, Any], keys: tuple[str, ...], packages: tuple[str, ...] = ()) -> list[str]:
    """Facts that differ, in words: `threads 2 → 1`. What either side doesn't know is passed over."""
    found: list[str] = []
    for key in keys:
        old, new = before.get(key), here.get(key)
        if old is None or new is None or old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += changes(old, new, tuple(new))
        else:
            found.append(f"{key} {_shown(old)} → {_shown(new)}")
    old_versions, new_versions = before.get("versions") or {}, here.get("versions") or {}
    for name in packages:
        if name in old_versions and old_versions[name] != new_versions.get(name):
            found.append(f"{name} {old_versions[name]} → {new_versions.get(name, 'none')}")
    return found


def _tier(name: str, why: str) -> Tier:
    return Tier(name, PROMISES[name], why)


def _shown(value: Any) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
