"""The model families that this package knows, by transformers' model_type. A family enters when a test of it passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from miles.config.exits import UserError


@dataclass(frozen=True)
class Family:
    """What tells one decoder family from another."""

    model_type: str
    experts: bool


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", experts=False),
        Family("qwen2", experts=False),
        Family("qwen3", experts=False),
        Family("qwen3_moe", experts=True),
    )
}


def family_of(config: Any) -> Family:
    """The family of a transformers config; ValueError for one that has no passing test or uses what the family's test does not cover."""
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise UserError(f"model_type {kind!r} is not supported; supported: {', '.join(FAMILIES)}")
    activation = getattr(config, "hidden_act", "silu")
    if activation != "silu":
        raise UserError(f"hidden_act {activation!r} of model_type {kind!r} is not supported; supported: silu")
    if "sliding_attention" in (getattr(config, "layer_types", None) or []) or (
        getattr(config, "use_sliding_window", False) and getattr(config, "sliding_window", None)
    ):
        raise UserError(f"sliding-window attention (model_type {kind!r}) is not supported; set use_sliding_window to false")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise UserError(f"rope_type {rope!r} depends on the length of the batch and is not supported; supported: default, linear, yarn, llama3")
    return FAMILIES[kind]
