"""Rotary embeddings: from config.json to megatron-core's settings. What megatron-core would compute otherwise is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from miles.config.exits import UserError
from miles.models.maps.entry import Config

# Where config.json names no base: transformers' default of the family, if it isn't 10,000.
BASES = {"llama4_text": 500000.0}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Rope:
    """model: arguments of GPTModel. config: of MLATransformerConfig. later: attributes that GPTModel looks for on its config (YaRN).

    llama3: Llama 3's scaling of the frequencies; GPTModel itself lets one choose the factor alone.
    """

    model: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    later: dict[str, Any] = field(default_factory=dict)
    llama3: dict[str, float] = field(default_factory=dict)


def rope(config: Config, latent: bool) -> Rope:
    """Settings of the rotary embedding; latent: of multi-head latent attention. UserError for what megatron-core doesn't compute."""
    fields = config.rope
    kind = fields.get("rope_type") or fields.get("type") or "default"
    base = float(fields.get("rope_theta") or config.get("rope_theta") or BASES.get(str(config.get("model_type")), 10000.0))
    part = float(fields.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
    if latent:
        return _latent(config, kind, base, fields)
    model: dict[str, Any] = {"rotary_base": base, "rotary_percent": part, "position_embedding_type": "rope"}
    if kind == "linear":
        return Rope(model | {"seq_len_interpolation_factor": float(fields["factor"])})
    if kind == "llama3":
        return Rope(model, llama3={name: float(fields.get(name, value)) for name, value in LLAMA3.items()})
    if kind == "yarn":
        if part != 1.0:
            raise UserError(f"{config.where}: rope_type 'yarn' with partial_rotary_factor {part}; megatron-core 0.19.2 rotates whole heads there; use train.backend=fsdp")
        return Rope(model | {"position_embedding_type": "yarn"}, later={f"yarn_{name}": value for name, value in _yarn(config, fields).items()})
    return Rope(model)


def _latent(config: Config, kind: str, base: float, fields: dict[str, Any]) -> Rope:
    """Latent attention makes its own rotary embedding, and pairs neighbouring numbers as DeepSeek does."""
    if config.get("rope_interleave", True) is not True:
        raise UserError(f"{config.where}: rope_interleave is off; megatron-core 0.19.2 rotates neighbouring pairs in latent attention; use train.backend=fsdp")
    model = {"position_embedding_type": "rope"}
    if kind == "default":
        return Rope(model, {"rope_type": "rope", "rotary_base": base})
    if kind != "yarn":
        raise UserError(f"{config.where}: rope_type {kind!r} is not computed by megatron-core 0.19.2 in latent attention; computed: default, yarn")
    yarn = _yarn(config, fields)
    if (yarn["mscale"] is None) != (yarn["mscale_all_dim"] is None) or not yarn.pop("correction_range_round_to_int"):
        raise UserError(f"{config.where}: rope_type 'yarn' needs mscale and mscale_all_dim together, and no truncate, in latent attention of megatron-core 0.19.2")
    if yarn["mscale"] is None:
        yarn |= {"mscale": 1.0, "mscale_all_dim": 0.0}
    return Rope(model, {"rope_type": "yarn", "rotary_base": base} | yarn)


def _yarn(config: Config, fields: dict[str, Any]) -> dict[str, Any]:
    attention = fields.get("attention_factor")
    if attention is not None:
        raise UserError(f"{config.where}: attention_factor = {attention!r} of rope_type 'yarn'; megatron-core 0.19.2 computes it from the factor; use train.backend=fsdp")
    return {
        "rotary_scaling_factor": float(fields["factor"]), "beta_fast": float(fields.get("beta_fast") or 32), "beta_slow": float(fields.get("beta_slow") or 1),
        "original_max_position_embeddings": int(fields.get("original_max_position_embeddings") or config.number("max_position_embeddings")),
        "mscale": fields.get("mscale") or None, "mscale_all_dim": fields.get("mscale_all_dim") or None,
        "correction_range_round_to_int": bool(fields.get("truncate", True)),
    }  # fmt: skip
