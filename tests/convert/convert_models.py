"""A tiny random model of every family, and MTP layers beside it: weights by transformers, MTP layers by hand under DeepSeek's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "tie_word_embeddings": False, "initializer_range": 0.1,
}  # fmt: skip
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEEPSEEK = MOE | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
MLA = DEEPSEEK | {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4}
ALTUP = {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 16, "altup_num_inputs": 4, "laurel_rank": 8, "num_kv_shared_layers": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "llama4_text": {"intermediate_size_mlp": 80, "num_local_experts": 4, "interleave_moe_layer_step": 2},
    "qwen2": {}, "qwen2_moe": MOE | {"num_experts": 4, "shared_expert_intermediate_size": 48}, "qwen3": {"tie_word_embeddings": True},
    "qwen3_moe": MOE | {"num_experts": 4}, "deepseek_v3": MLA, "deepseek_v32": MLA | {"num_experts": 4, "index_n_heads": 4, "index_head_dim": 16, "index_topk": 8},
    "glm4_moe": DEEPSEEK | {"use_qk_norm": True, "attention_bias": True}, "glm4_moe_lite": MLA,
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2}, "gemma2": {"tie_word_embeddings": True}, "gemma3_text": {"tie_word_embeddings": True},
    "gemma3n_text": ALTUP | {"tie_word_embeddings": True, "intermediate_size": [96, 96], "activation_sparsity_pattern": [0.0, 0.0]},
}  # fmt: skip


def write_model(folder: Path, family: str, mtp_layers: int = 0, **overrides: Any) -> Path:
    """A bf16 model in a Hugging Face folder."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = COMMON | FAMILIES[family] | overrides
    if family in ("deepseek_v3", "deepseek_v32", "glm4_moe_lite"):
        del settings["head_dim"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), dtype=torch.bfloat16)
        model.save_pretrained(folder)
        if mtp_layers:
            tensors = load_file(folder / "model.safetensors")
            for name, tensor in mtp_tensors(tensors, mtp_layers).items():
                tensors[name] = tensor
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": mtp_layers}))
    return folder


def mtp_tensors(tensors: dict[str, Any], count: int) -> dict[str, Any]:
    """MTP layers as DeepSeek-V3's and GLM-4.5's files have them: a layer like the last one, and their own norms and projection."""
    import torch

    layers, hidden, found = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers.")), COMMON["hidden_size"], {}
    for i in range(count):
        prefix = f"model.layers.{layers + i}."
        last = f"model.layers.{layers - 1}."
        found |= {prefix + name.removeprefix(last): torch.randn_like(tensor) for name, tensor in tensors.items() if name.startswith(last)}
        found |= {f"{prefix}{norm}.weight": torch.randn(hidden).bfloat16() for norm in ("enorm", "hnorm", "shared_head.norm")}
        found[f"{prefix}eh_proj.weight"] = torch.randn(hidden, 2 * hidden).bfloat16()
        found[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        found[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return found
