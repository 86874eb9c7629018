"""Which guarantee a configuration can be given: exact, replayed or accounted (docs/formats.md)."""

from __future__ import annotations

from dataclasses import dataclass

from miles.config.schema import RunConfig


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
        return Tier(
            "accounted",
            "no draw is lost, none is used twice",
            "training kernels on cuda are not deterministic yet",
        )
    broken = [
        reason
        for reason, holds in [
            (f"engine {rollout.engine} is not batch-invariant", rollout.engine != "embedded"),
            ("rollout.batch_invariant is off", rollout.engine == "embedded" and not rollout.batch_invariant),
            (f"batch-invariant kernels are float32, not {config.model.dtype}", config.model.dtype != "float32"),
            ("a remote reward may answer differently", (rollout.reward.type or "").removeprefix("boxed_") == "remote_rm"),
        ]
        if holds
    ]
    if broken:
        return Tier("replayed", "given the recorded batches, training has the same bits", "; ".join(broken))
    own = [name for name, path in [("reward", rollout.reward.path), ("generate", rollout.generate_path), ("filter", rollout.filter_path)] if path]
    trust = f", as far as your own {' and '.join(own)} function gives the same answer twice" if own else ""
    return Tier(
        "exact",
        "an interrupted and resumed run has the bits of an undisturbed one",
        "synchronous, batch-invariant float32 on cpu, same ranks and threads" + trust,
    )
