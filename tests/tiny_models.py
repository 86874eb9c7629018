"""Tiny random models in Hugging Face folders, made by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 4096, "initializer_range": 0.1, "tie_word_embeddings": False, "eos_token_id": 1, "pad_token_id": 2,
    "bos_token_id": None,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}


def write_tiny(folder: Path, family: str = "qwen3_moe", seed: int = 0, **overrides: Any) -> Path:
    """Writes config.json and model.safetensors of a random model of the family; returns the folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = COMMON | (EXPERTS if family.endswith("_moe") else {}) | overrides
    config = AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = settings["eos_token_id"]
    model.save_pretrained(folder)
    return folder


def write_sibling(folder: Path, of: Path, seed: int) -> Path:
    """Other random weights for the configuration of another folder, in its dtype."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(of)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config, dtype=config.dtype).save_pretrained(folder)
    return folder
