"""What is known of a model before its weights are read: dimensions, number of parameters, bytes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles.config.compose import configs_dir
from miles.config.exits import ConfigError
from miles.config.json_file import read_object
from miles.config.schema import Model, Shape
from miles.config.yaml_file import read_yaml

GIB = 1024**3
ADAM_BYTES = 16  # fp32 weight, gradient and two moments of one parameter, sharded over the ranks


@dataclass(frozen=True)
class Facts:
    """Dimensions and where they were found."""

    shape: Shape
    source: str


def known_names() -> list[str]:
    """Names in configs/models."""
    return sorted(path.stem for path in (configs_dir() / "models").glob("*.yaml"))


def facts(model: Model) -> Facts | None:
    """The model's dimensions: its own config.json, else model.shape, else configs/models by name. None when nothing is known.

    Raises ConfigError: a name that configs/models does not have, an unreadable config.json, two sources that disagree.
    """
    named = _named(model.name) if model.name and model.shape is None else model.shape
    file = Path(model.hf_checkpoint) / "config.json" if model.hf_checkpoint else None
    if file is None or not file.is_file():
        source = "model.shape" if model.shape else f"configs/models/{model.name}.yaml"
        return Facts(named, source) if named else None
    shape = shape_of_hf(read_object(file), str(file))
    if named and (named.layers, named.hidden) != (shape.layers, shape.hidden):
        raise ConfigError(
            f"model.name: {model.name} has {named.layers} layers of width {named.hidden}, "
            f"but {file} says {shape.layers} of {shape.hidden}; correct one of them"
        )
    return Facts(shape, str(file))


def shape_of_hf(config: Mapping[str, Any], where: str) -> Shape:
    """Dimensions from a Hugging Face config.json. Raises ConfigError when a necessary key is missing."""

    def first(*names: str) -> Any:
        return next((config[name] for name in names if config.get(name) is not None), None)

    needed = {"num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"} - config.keys()
    if needed:
        raise ConfigError(f"{where}: no {', '.join(sorted(needed))}; give the folder of a causal language model")
    return Shape(
        family=config.get("model_type"),
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        ffn=first("intermediate_size", "moe_intermediate_size") or 4 * config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads"),
        head_dim=config.get("head_dim"),
        vocab=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=bool(config.get("attention_bias", False)) or config.get("model_type") == "qwen2",
        qk_norm=config.get("model_type") in ("qwen3", "qwen3_moe"),
        experts=first("num_experts", "n_routed_experts", "num_local_experts") or 0,
        top_k=config.get("num_experts_per_tok") or 0,
        expert_ffn=config.get("moe_intermediate_size") or 0,
        shared_ffn=(config.get("n_shared_experts") or 0) * (config.get("moe_intermediate_size") or 0),
        dense_layers=config.get("first_k_dense_replace") or 0,
        moe_every=first("interleave_moe_layer_step", "decoder_sparse_step") or 1,
        q_lora=config.get("q_lora_rank") or 0,
        kv_lora=config.get("kv_lora_rank") or 0,
        qk_nope=config.get("qk_nope_head_dim") or 0,
        qk_rope=config.get("qk_rope_head_dim") or 0,
        v_head=config.get("v_head_dim") or 0,
    )


def parameters(shape: Shape) -> tuple[int, int]:
    """(dense, expert) parameters: those that every rank's tensor and pipeline split, and those of routed experts.

    Counted layer by layer: attention (grouped or latent), MLP or router with experts, norms, embedding and output layer.
    """
    h = shape.hidden
    moe_layers = shape.moe_layers
    mlp = (shape.layers - moe_layers) * 3 * h * shape.ffn
    router_and_shared = moe_layers * (h * shape.experts + 3 * h * shape.shared_ffn)
    norms = shape.layers * 2 * h + h
    embedding = shape.vocab * h * (1 if shape.tied else 2)
    dense = shape.layers * _attention(shape) + mlp + router_and_shared + norms + embedding
    return dense, moe_layers * shape.experts * 3 * h * shape.expert_ffn


def _attention(shape: Shape) -> int:
    h, heads = shape.hidden, shape.heads
    if shape.kv_lora:
        query_width = heads * (shape.qk_nope + shape.qk_rope)
        query = h * shape.q_lora + shape.q_lora + shape.q_lora * query_width if shape.q_lora else h * query_width
        key_value = h * (shape.kv_lora + shape.qk_rope) + shape.kv_lora + shape.kv_lora * heads * (shape.qk_nope + shape.v_head)
        return query + key_value + heads * shape.v_head * h
    kv, d = shape.kv_heads or heads, shape.head_dim or h // heads
    weights = 2 * h * heads * d + 2 * h * kv * d
    return weights + (heads + 2 * kv) * d * shape.qkv_bias + 2 * d * shape.qk_norm


def _named(name: str) -> Shape:
    path = configs_dir() / "models" / f"{name}.yaml"
    if not path.is_file():
        near = [known for known in known_names() if known.startswith(name.lower())] or difflib.get_close_matches(name, known_names(), 1, 0.5)
        mend = f"did you mean {near[0]}?" if near else "leave it out: the checkpoint's config.json says the same"
        raise ConfigError(f"model.name: {name!r} is not in configs/models; {mend}")
    return Shape.model_validate(read_yaml(path)[0]["model"]["shape"], strict=True)
