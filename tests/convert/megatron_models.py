"""megatron-core's own models and checkpoints on a CPU, for tiny models: python megatron_models.py HF_FOLDER CHECKPOINT WRITTEN LOGITS

Builds the model that the folder's config.json describes (written here by hand from megatron-core's options, not from our maps), loads
CHECKPOINT with megatron-core's loader, saves the logits of tokens 3 to 34 to LOGITS, and lets megatron-core write its own checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch

# The one module of megatron-core that needs triton; it serves CUDA graphs alone.
_stash: Any = types.ModuleType("megatron.core.transformer.moe.ops.paged_stash")
_stash.GLOBAL_BLOCK_SIZE, _stash.paged_stash_copy_kernel, _stash.paged_stash_pop_kernel = 1024, None, None
sys.modules[_stash.__name__] = _stash


def build(fields: dict[str, Any]) -> Any:
    """A GPTModel in float32 with the local layer spec, and Transformer Engine's names in checkpoints."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    experts, kind = fields.get("num_experts") or fields.get("num_local_experts"), fields["model_type"]
    more: dict[str, Any] = {}
    if experts:
        more = {
            "num_moe_experts": experts, "moe_router_topk": fields["num_experts_per_tok"], "moe_ffn_hidden_size": fields["moe_intermediate_size"],
            "moe_router_load_balancing_type": "none", "moe_token_dispatcher_type": "allgather", "moe_router_pre_softmax": not fields["norm_topk_prob"],
        }  # fmt: skip
        if fields.get("shared_expert_intermediate_size"):
            more |= {"moe_shared_expert_intermediate_size": fields["shared_expert_intermediate_size"], "moe_shared_expert_gate": True}
    norm = kind.startswith("qwen3")
    config = TransformerConfig(
        num_layers=fields["num_hidden_layers"], hidden_size=fields["hidden_size"], ffn_hidden_size=fields["intermediate_size"],
        num_attention_heads=fields["num_attention_heads"], num_query_groups=fields["num_key_value_heads"], kv_channels=fields["head_dim"],
        normalization="RMSNorm", layernorm_epsilon=fields["rms_norm_eps"], gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        add_bias_linear=False, add_qkv_bias=kind.startswith("qwen2"), qk_layernorm=norm, hidden_dropout=0.0, attention_dropout=0.0,
        use_cpu_initialization=True, masked_softmax_fusion=False, bias_activation_fusion=False, bias_dropout_fusion=False, apply_rope_fusion=False,
        gradient_accumulation_fusion=False, persist_layer_norm=False, params_dtype=torch.float32, **more,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(num_experts=experts, qk_layernorm=norm, normalization="RMSNorm")
    if experts:  # Transformer Engine keeps the norm before experts a module of its own
        names = spec.submodules.sharded_state_dict_keys_map
        spec.submodules.sharded_state_dict_keys_map = {old: new for old, new in names.items() if not old.startswith("pre_mlp_layernorm")}
    return GPTModel(
        config, spec, vocab_size=fields["vocab_size"], max_sequence_length=128, position_embedding_type="rope", rotary_base=fields["rope_parameters"]["rope_theta"],
        share_embeddings_and_output_weights=fields["tie_word_embeddings"],
    ).eval()  # fmt: skip


def main(folder: str, checkpoint: str, written: str, logits: str) -> None:
    """Load, compute, save."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda device=None: None
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHDYNAMO_DISABLE": "1"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{written}.rendezvous", rank=0, world_size=1)
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel()
    # Attention without dropout draws nothing; the tracker of CUDA's generators needs CUDA.
    tensor_parallel.get_cuda_rng_tracker = lambda: types.SimpleNamespace(fork=contextlib.nullcontext)
    model = build(json.loads((Path(folder) / "config.json").read_text()))
    described = {"singleton_local_shards": False}
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=described)}, checkpoint)  # as megatron.training asks for it
    assert loaded["checkpoint_version"] == 3.0, "older ones have another order of queries, keys and values"
    model.load_state_dict(loaded["model"])
    tokens = torch.arange(3, 35)[None]
    with torch.no_grad():
        masked = torch.ones(32, 32).triu(1).bool()[None, None]
        torch.save(model(tokens, torch.arange(32)[None], masked), logits)
    Path(written).mkdir()
    dist_checkpointing.save(model.sharded_state_dict(metadata=described), written)
    torch.distributed.destroy_process_group()
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
