"""What a family's config.json means in megatron-core's TransformerConfig; refusals, by name, of what megatron-core 0.19.2 would compute otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from miles.config.exits import UserError
from miles.models.maps import deepseek, llama4, qwen
from miles.models.maps.entry import Config
from miles.models.maps.find import Known

LATENT = ("deepseek_v3", "kimi_k2", "deepseek_v32", "glm4_moe_lite")
SPARSE: dict[str, Callable[[Config, int], bool]] = {
    "llama4_text": llama4.sparse, "qwen2_moe": qwen.sparse, "qwen3_moe": qwen.sparse,
    **dict.fromkeys(("deepseek_v3", "kimi_k2", "deepseek_v32", "glm4_moe", "glm4_moe_lite"), deepseek.sparse),
}  # fmt: skip
KNOWN = ("llama", "llama4_text", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "deepseek_v3", "kimi_k2", "deepseek_v32", "glm4_moe", "glm4_moe_lite")
ABSENT = {
    "gemma2": "norms after attention and MLP, soft caps of scores and logits, or its scaled embedding",
    "gemma3_text": "norms after attention and MLP, or its scaled embedding",
    "gemma3n_text": "alternating updates, low-rank residuals and per-layer inputs",
    "minimax_m2": "QK-norm over all heads at once",
}


def check(known: Known) -> str:
    """The model_type, if megatron-core computes the model; UserError otherwise."""
    kind, config = str(known.config.get("model_type")), known.config
    if kind in ABSENT:
        raise UserError(f"{config.where}: megatron-core 0.19.2 has no {ABSENT[kind]} (model_type {kind!r}); train it with train.backend=fsdp")
    assert kind in KNOWN, "a family that has a map is computed by megatron-core or told to be absent"
    if config.get("attention_bias") and kind != "glm4_moe":
        raise UserError(f"{config.where}: attention_bias also biases o_proj, which megatron-core 0.19.2 does only together with the MLP's; train it with train.backend=fsdp")
    return kind


def transformer(known: Known, mtp_layers: int = 0) -> dict[str, Any]:
    """Arguments of TransformerConfig (or MLATransformerConfig) that the model decides: dimensions, norms, biases, experts. UserError as check."""
    kind, config = check(known), known.config
    wide = config.number("intermediate_size_mlp" if kind == "llama4_text" else "intermediate_size")
    found: dict[str, Any] = {
        "num_layers": config.layers, "hidden_size": config.hidden, "ffn_hidden_size": wide, "num_attention_heads": config.heads,
        "mtp_num_layers": mtp_layers or None, "normalization": "RMSNorm", "layernorm_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "gated_linear_unit": True, "activation_func": torch.nn.functional.silu, "add_bias_linear": False, "hidden_dropout": 0.0, "attention_dropout": 0.0,
        "moe_token_dispatcher_type": "alltoall",  # the one that takes sequences of different lengths
    }  # fmt: skip
    if kind in LATENT:
        found |= _latent(config)
    else:
        biased = kind == "qwen2" or (kind == "qwen2_moe" and bool(config.get("qkv_bias", True))) or bool(config.get("attention_bias"))
        normed = kind in ("qwen3", "qwen3_moe") or (kind == "glm4_moe" and bool(config.get("use_qk_norm")))
        found |= {"num_query_groups": config.groups, "kv_channels": config.head, "add_qkv_bias": biased, "qk_layernorm": normed}
    if kind == "llama4_text":
        found |= {"rotary_interleaved": True, "qk_l2_norm": bool(config.get("use_qk_norm", True)), "no_rope_freq": [int(not rotated) for rotated in rotated_layers(config)]}
    if kind == "deepseek_v32":
        # The Hadamard rotation of DeepSeek's kernels changes no score, and FP8's rounding is not imitated.
        found |= {
            "experimental_attention_variant": "dsa", "dsa_indexer_n_heads": config.number("index_n_heads"), "dsa_indexer_rotate_activation": False,
            "dsa_indexer_head_dim": config.number("index_head_dim"), "dsa_indexer_topk": config.number("index_topk"),
            "dsa_indexer_k_norm_epsilon": 1e-6, "dsa_indexer_loss_coeff": 0.0,
        }  # fmt: skip
    return found | (_experts(kind, config, known.family.uniform(config)) if config.experts else {})


def rotated_layers(config: Config) -> list[bool]:
    """Llama 4: whether each layer rotates queries and keys."""
    listed, every = config.get("no_rope_layers"), config.number("no_rope_layer_interval", 4)
    return [bool(flag) for flag in listed] if listed else [(i + 1) % every != 0 for i in range(config.layers)]


def longest(known: Known) -> int | None:
    """Longest sequence [tokens] that megatron-core computes as the family does; None for any.

    Llama 4's attention in chunks and its temperature begin beyond a length; up to it they change nothing.
    """
    config = known.config
    if config.get("model_type") != "llama4_text":
        return None
    bounds = [config.number("attention_chunk_size", 8192)]
    if config.get("attn_temperature_tuning", True):
        bounds.append(int(config.get("floor_scale", 8192)) - 1)
    return min(bounds)


def _latent(config: Config) -> dict[str, Any]:
    if config.get("q_lora_rank") is None and config.get("model_type") == "deepseek_v32":
        raise UserError(f"{config.where}: q_lora_rank is missing; megatron-core 0.19.2 needs it beside an indexer")
    return {
        "q_lora_rank": config.get("q_lora_rank"), "kv_lora_rank": config.number("kv_lora_rank"), "qk_head_dim": config.number("qk_nope_head_dim"),
        "qk_pos_emb_head_dim": config.number("qk_rope_head_dim"), "v_head_dim": config.number("v_head_dim"), "qk_layernorm": True,
    }  # fmt: skip


def _experts(kind: str, config: Config, uniform: bool) -> dict[str, Any]:
    """Experts and their router. A list of layers, even one of all, makes megatron-core keep layers apart in checkpoints."""
    width = config.number("intermediate_size" if kind == "llama4_text" else "moe_intermediate_size")
    found: dict[str, Any] = {
        "num_moe_experts": config.experts, "moe_router_topk": config.number("num_experts_per_tok"), "moe_ffn_hidden_size": width,
        "moe_layer_freq": 1 if uniform else [int(SPARSE[kind](config, i)) for i in range(config.layers)],
        "moe_router_load_balancing_type": "none", "moe_router_dtype": "fp32",
    }  # fmt: skip
    if kind in ("qwen2_moe", "qwen3_moe"):
        found["moe_router_pre_softmax"] = not config.get("norm_topk_prob", False)
        if kind == "qwen2_moe":
            found |= {"moe_shared_expert_intermediate_size": config.number("shared_expert_intermediate_size"), "moe_shared_expert_gate": True}
        return found
    found["moe_router_score_function"] = "sigmoid"
    if kind == "llama4_text":
        if found["moe_router_topk"] != 1:
            raise UserError(f"{config.where}: num_experts_per_tok = {found['moe_router_topk']}; megatron-core 0.19.2 scales the inputs of one expert a token (1)")
        return found | {"moe_apply_probs_on_input": True, "moe_shared_expert_intermediate_size": width}
    return found | _balanced(config, width)


def _balanced(config: Config, width: int) -> dict[str, Any]:
    """DeepSeek's router: a bias for the choice, groups, weights that sum to the scaling factor."""
    top, groups, chosen = config.number("num_experts_per_tok"), config.number("n_group", 1), config.number("topk_group", 1)
    if top == 1 or not config.get("norm_topk_prob", True):
        raise UserError(f"{config.where}: norm_topk_prob = {config.get('norm_topk_prob')!r} with num_experts_per_tok = {top}; megatron-core 0.19.2 normalises always, and only for 2 and more")
    found: dict[str, Any] = {
        "moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.0, "moe_router_topk_scaling_factor": float(config.get("routed_scaling_factor", 1.0)),
        "moe_shared_expert_intermediate_size": config.number("n_shared_experts", 0) * width or None,
    }  # fmt: skip
    if groups > chosen:
        if top // chosen != 2:
            raise UserError(f"{config.where}: num_experts_per_tok / topk_group is {top} / {chosen}; megatron-core 0.19.2 judges groups by as many experts, the family by 2")
        found |= {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}
    return found
